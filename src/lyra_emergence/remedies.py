"""What is tried, in order, where a model does not fit the fastest memory as it was asked for.

The order: a shorter context, if the user left it open; packed layers, if the user allows it; layers on the CPU; weights
left in the file; a refusal. A remedy is taken only where it reaches its goal: a context is not shortened for a model
that needs the CPU all the same.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lyra_emergence.footprint import default_context

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lyra_emergence.checkpoint import CheckpointIndex
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.packing import Quantization

__all__ = ["SHORTEST_CONTEXT", "Attempt", "Goal", "attempts"]

SHORTEST_CONTEXT = 512
"""Tokens below which a context left open is not shortened: less holds no conversation."""
SHORTEST_FOR_SPEED = 2048
"""Tokens below which it is not shortened only to keep a model on its accelerators."""
_PROMPT = 1024
"""Tokens of a prompt that a context shortened for speed has room for beside the longest answer."""

Goal = Literal["fast", "memory", "any"]
"""Where weights must go: all on accelerators (in main memory where there are none), none left in the file, or any."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to plan.

    Attributes:
        context: Tokens of prompt and answer together.
        quantization: How the layers are packed.
        goal: What its plan must reach to be taken.
    """

    context: int
    quantization: Quantization | None
    goal: Goal


def attempts(config: ModelConfig, index: CheckpointIndex) -> Iterator[Attempt]:
    """Yield what to try, in order; the last ones are those that only have to fit."""
    forms = _forms(config)
    contexts = _contexts(config, index)
    if not isinstance(config.device_map, dict):
        longest = (config.pipeline_kwargs or {}).get("max_new_tokens") or 0
        shortest = max(SHORTEST_FOR_SPEED, longest + _PROMPT)
        for form in forms:
            for context in contexts:
                if context == contexts[0] or context >= shortest:
                    yield Attempt(context, form, "fast")
        for form in forms[1:]:
            yield Attempt(contexts[0], form, "memory")
    for form in forms:
        for context in contexts:
            yield Attempt(context, form, "any")


def _forms(config: ModelConfig) -> tuple[Quantization | None, ...]:
    if config.load_in_8bit:
        return ("8bit",)
    if config.load_in_4bit:
        return ("4bit",)
    if config.allow_quantization and importlib.util.find_spec("bitsandbytes") is not None:
        return (None, "8bit", "4bit")
    return (None,)


def _contexts(config: ModelConfig, index: CheckpointIndex) -> tuple[int, ...]:
    if config.context_length is not None:
        return (config.context_length,)
    found = [default_context(index)]
    while found[-1] // 2 >= SHORTEST_CONTEXT:
        found.append(found[-1] // 2)
    return tuple(found)
