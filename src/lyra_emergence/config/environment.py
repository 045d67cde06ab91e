"""Configuration from environment variables: LYRA_<KEY> for every key of the configuration.

Values are text, so each key has a reading:
    booleans            true, 1, yes, on; false, 0, no, off (in any case)
    whole numbers       digits
    LYRA_MAX_MEMORY     0=6GB,cpu=16GB, or a JSON object
    LYRA_DEVICE_MAP     a word such as auto, or a JSON object
    LYRA_PIPELINE_KWARGS  a JSON object
    LYRA_DISTRIBUTED    a JSON object
"null" clears a key that may be null. An empty variable counts as not set.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lyra_emergence.config.checks import CHECKS, check_values
from lyra_emergence.config.problems import Problems, did_you_mean, shown
from lyra_emergence.config.strict_json import parse_json_object

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PREFIX", "parse_memory_limits", "read_environment", "variable_for"]

PREFIX = "LYRA_"
_WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_BOOLEANS = (
    "low_cpu_mem_usage",
    "enable_progressive_fallback",
    "load_in_8bit",
    "load_in_4bit",
    "allow_quantization",
    "cpu_kernels",
    "prompt_streaming",
    "compile_decode",
    "trust_remote_code",
)
_WHOLE_NUMBERS = ("gpu_layers_fallback", "context_length", "prefill_chunk")
_NULLABLE = ("device_map", "max_memory", "pipeline_kwargs", "distributed", "dtype", *_WHOLE_NUMBERS)
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
_NEAR = 0.8


def variable_for(key: str) -> str:
    """Return the environment variable that sets `key`."""
    return f"{PREFIX}{key.upper()}"


def read_environment(environ: Mapping[str, str], problems: Problems) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the values that the environment sets, and notes on variables that look like slips.

    Args:
        environ: The environment.
        problems: Receives a line for everything that is wrong, each naming its variable.
    """
    values: dict[str, Any] = {}
    for key in CHECKS:
        text = environ.get(variable_for(key), "").strip()
        if not text:
            continue
        found = Problems(variable_for(key))
        raw = _read(key, text, found)
        if not found.lines:
            values |= check_values({key: raw}, found)
        problems.lines += found.lines
    return values, _notes(environ)


def _read(key: str, text: str, problems: Problems) -> object:
    if key in _NULLABLE and text.lower() in ("null", "none"):
        return None
    if key in _BOOLEANS:
        if text.lower() not in _WORDS:
            problems.add(f"{shown(text)} is neither true nor false; write 'true' or 'false'", at=key)
        return _WORDS.get(text.lower())
    if key in _WHOLE_NUMBERS:
        return int(text) if _WHOLE_NUMBER.fullmatch(text) else text
    if key == "max_memory" and not text.startswith("{"):
        return parse_memory_limits(text, key, problems)
    if key in ("max_memory", "pipeline_kwargs", "distributed") or (key == "device_map" and text.startswith("{")):
        return parse_json_object(text, key, problems)
    return text


def parse_memory_limits(text: str, at: str, problems: Problems) -> dict[str, str]:
    """Return the limits that "0=6GB,cpu=16GB" writes, as text by device; they are not checked further.

    A device named twice and a part without "=" go to `problems`.
    """
    limits: dict[str, str] = {}
    for part in text.split(","):
        device, equals, amount = (piece.strip() for piece in part.partition("="))
        if not (device and equals and amount):
            problems.add(f"{shown(part.strip())} is not a device and its limit; write '0=6GB,cpu=16GB'", at=at)
        elif device in limits:
            problems.add("the device stands twice; keep one", at=f"{at}.{device}")
        else:
            limits[device] = amount
    return limits


def _notes(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return a note for each variable that nearly has the name of a key; others with the prefix are not ours."""
    known = [variable_for(key) for key in CHECKS]
    slips = sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
    nearest = ((name, did_you_mean(name, known, cutoff=_NEAR)) for name in slips)
    return tuple(f"{shown(name)[1:-1]} is not read; did you mean {near}?" for name, near in nearest if near)
