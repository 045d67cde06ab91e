"""The key `distributed`: how one model is divided between the processes that torchrun starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lyra_emergence.config.problems import did_you_mean, mismatch, shown

if TYPE_CHECKING:
    from lyra_emergence.config.problems import Problems

__all__ = ["DISTRIBUTED_SIZES", "check_distributed", "distributed_schema"]

DISTRIBUTED_SIZES: Final = {
    "tp_size": "Processes that share each layer (tensor parallelism).",
    "pp_size": "Processes that hold layers in turn (pipeline parallelism).",
}
"""The keys of `distributed`, with the names that transformers' DistributedConfig has for them."""
_MOST: Final = 4096
"""Processes at most: more than any machine's file descriptors let talk to each other."""
_EXAMPLE: Final = 'an object such as {"tp_size": 2}, or null'
_TRAINING: Final = ("fsdp_size", "dp_replicate_size", "fsdp_plan", "fsdp_cpu_offload", "fsdp_mixed_precision")
_TAKEN_FROM_MODEL: Final = ("tp_plan", "ep_plan", "pp_plan")


def check_distributed(value: object, at: str, problems: Problems) -> dict[str, int] | None:
    """Return a checked copy of `value`; whatever is wrong goes to `problems`."""
    if value is None:
        return None
    if not isinstance(value, dict):
        problems.add(mismatch(value, _EXAMPLE), at=at)
        return None
    checked: dict[str, int] = {}
    for name, size in value.items():
        if name not in DISTRIBUTED_SIZES:
            problems.add(f"unknown key {shown(name)}; {_remedy(str(name))}", at=at)
        elif _check_size(size, f"{at}.{name}", problems):
            checked[name] = size
    return checked


def _check_size(size: object, at: str, problems: Problems) -> bool:
    expected = f"a whole number of processes from 1 to {_MOST}"
    if isinstance(size, bool) or not isinstance(size, (int, float)):
        problems.add(mismatch(size, expected), at=at)
    elif isinstance(size, float):
        problems.add(f"{shown(size)} has a decimal point; write {expected}", at=at)
    elif not 1 <= size <= _MOST:
        problems.add(f"{shown(size)} is too {'small' if size < 1 else 'large'}; write {expected}", at=at)
    else:
        return True
    return False


def _remedy(name: str) -> str:
    if name in _TRAINING:
        return "it divides a batch, and Lyra runs one sequence; write 'tp_size' or 'pp_size'"
    if name in _TAKEN_FROM_MODEL:
        return "the plan is the architecture's own; remove it"
    nearest = did_you_mean(name, DISTRIBUTED_SIZES)
    return f"did you mean {nearest!r}?" if nearest else f"the keys are {', '.join(DISTRIBUTED_SIZES)}"


def distributed_schema() -> dict[str, Any]:
    """Return the JSON Schema of `distributed`."""
    properties = {
        name: {"type": "integer", "minimum": 1, "maximum": _MOST, "description": text}
        for name, text in DISTRIBUTED_SIZES.items()
    }
    return {
        "anyOf": [{"type": "object", "properties": properties, "additionalProperties": False}, {"type": "null"}],
    }
