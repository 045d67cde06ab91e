"""The check of each configuration key: strict about types, exact about what to write instead.

Every source of configuration (a call, a file, the environment, the command line) passes through `check_values`, so
that the same mistake reads the same wherever it stands. Neither pydantic nor torch is needed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lyra_emergence.config.devices import check_device_map, check_max_memory, check_size
from lyra_emergence.config.distributed import check_distributed
from lyra_emergence.config.generation import GENERATION_SETTINGS, check_pipeline_kwargs
from lyra_emergence.config.problems import Problems, did_you_mean, mismatch, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["CHECKS", "DTYPES", "TASKS", "check_together", "check_values"]

TASKS = ("text-generation",)
"""The tasks that Lyra runs."""

DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "float32": "float32",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "auto": None,
}
"""What `dtype` may say, each with the form that is kept; None is the checkpoint's own."""

_SCHEMA_KEY = "$schema"
_MOST = 2**31 - 1
_QUANTIZED = ("int8", "int4", "8bit", "4bit", "nf4", "fp4", "uint8")


def check_values(values: Mapping[str, object], problems: Problems) -> dict[str, Any]:
    """Return the checked and normalized values, in the order of the fields.

    `$schema` is accepted and left out; keys with a problem are left out too.

    Args:
        values: Keys and values as a user wrote them; they are copied, never changed.
        problems: Receives a line for everything that is wrong.
    """
    for key, value in values.items():
        if key == _SCHEMA_KEY:
            if not isinstance(value, str):
                problems.add(mismatch(value, "the address of a JSON Schema, or remove it"), at=_SCHEMA_KEY)
        elif key not in CHECKS:
            problems.add(f"unknown key {shown(key)}; {_remedy_for_unknown(key)}")
    checked: dict[str, Any] = {}
    for key, check in CHECKS.items():
        if key not in values:
            continue
        before = len(problems.lines)
        result = check(values[key], key, problems)
        if len(problems.lines) == before:
            checked[key] = result
    return checked


def _remedy_for_unknown(key: object) -> str:
    if not isinstance(key, str):
        return "keys are text"
    if key in GENERATION_SETTINGS:
        return "write it inside 'pipeline_kwargs'"
    nearest = did_you_mean(key, CHECKS)
    return f"did you mean {nearest!r}?" if nearest else f"the keys are {', '.join(CHECKS)}"


def check_together(values: Mapping[str, Any], problems: Problems, sources: Mapping[str, str] | None = None) -> None:
    """Check what no single key can show: settings that contradict each other.

    Args:
        values: Checked values, of all sources together.
        problems: Receives a line for each contradiction.
        sources: Where each key was set, if that is more than one place.
    """
    keys = ("load_in_8bit", "load_in_4bit")
    if all(values.get(key) is True for key in keys):
        names = [f"{key!r} ({sources[key]})" if sources and key in sources else repr(key) for key in keys]
        problems.add(f"in {names[0]} and {names[1]}: both are true; set one of them to false")


def _text(example: str) -> Callable[[object, str, Problems], object]:
    def check(value: object, at: str, problems: Problems) -> object:
        if not isinstance(value, str):
            problems.add(mismatch(value, f"text, such as {example!r}"), at=at)
        elif not value.strip():
            problems.add(f"the text is empty; write one such as {example!r}", at=at)
        elif value != value.strip() or not value.isprintable():
            problems.add(f"{shown(value)} has blanks around it or control characters; remove them", at=at)
        return value

    return check


def _optional(check: Callable[[object, str, Problems], object]) -> Callable[[object, str, Problems], object]:
    return lambda value, at, problems: None if value is None else check(value, at, problems)


def _check_task(value: object, at: str, problems: Problems) -> object:
    supported = ", ".join(repr(task) for task in TASKS)
    if not isinstance(value, str):
        problems.add(mismatch(value, supported), at=at)
    elif value not in TASKS:
        problems.add(f"{shown(value)} is not a task that Lyra runs; write {supported}", at=at)
    return value


def _check_boolean(value: object, at: str, problems: Problems) -> object:
    if not isinstance(value, bool):
        problems.add(mismatch(value, "true or false"), at=at)
    return value


def _whole(minimum: int, example: int) -> Callable[[object, str, Problems], object]:
    def check(value: object, at: str, problems: Problems) -> object:
        expected = f"a whole number of at least {minimum}, such as {example}, or null"
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            problems.add(mismatch(value, expected), at=at)
        elif isinstance(value, float):
            problems.add(f"{shown(value)} has a decimal point; write {expected}", at=at)
        elif value < minimum:
            problems.add(f"{shown(value)} is too small; write {expected}", at=at)
        elif value > _MOST:
            problems.add(f"{shown(value)} is too large; write {expected}", at=at)
        return value

    return check


def _check_dtype(value: object, at: str, problems: Problems) -> str | None:
    if value is None:
        return None
    # A torch.dtype prints as "torch.bfloat16"; its type is recognized by name, so that torch need not be loaded.
    is_torch_dtype = f"{type(value).__module__}.{type(value).__name__}" == "torch.dtype"
    if not isinstance(value, str) and not is_torch_dtype:
        problems.add(mismatch(value, "'bfloat16', 'float16', 'float32', 'auto' or null"), at=at)
        return None
    name = str(value).removeprefix("torch.")
    if name in DTYPES:
        return DTYPES[name]
    if name in _QUANTIZED:
        remedy = "to quantize, set 'load_in_8bit' or 'load_in_4bit'"
    else:
        nearest = did_you_mean(name, DTYPES)
        remedy = f"did you mean {nearest!r}?" if nearest else "write 'bfloat16', 'float16', 'float32' or 'auto'"
    problems.add(f"{shown(str(value))} is not a dtype that Lyra computes in; {remedy}", at=at)
    return None


CHECKS: dict[str, Callable[[object, str, Problems], Any]] = {
    "model_id": _text("microsoft/phi-2"),
    "task": _check_task,
    "device_map": check_device_map,
    "max_memory": check_max_memory,
    "low_cpu_mem_usage": _check_boolean,
    "gpu_layers_fallback": _whole(0, 16),
    "enable_progressive_fallback": _check_boolean,
    "load_in_8bit": _check_boolean,
    "load_in_4bit": _check_boolean,
    "allow_quantization": _check_boolean,
    "pipeline_kwargs": check_pipeline_kwargs,
    "dtype": _check_dtype,
    "context_length": _whole(1, 2048),
    "cpu_kernels": _check_boolean,
    "prompt_streaming": _check_boolean,
    "prefill_chunk": _whole(64, 4096),
    "compile_decode": _check_boolean,
    "packed_cache": check_size,
    "distributed": check_distributed,
    "embedding_model": _optional(_text("sentence-transformers/all-MiniLM-L6-v2")),
    "rerank_model": _optional(_text("cross-encoder/ms-marco-MiniLM-L6-v2")),
    "trust_remote_code": _check_boolean,
}
"""The check of every key, in the order in which a file is written."""
