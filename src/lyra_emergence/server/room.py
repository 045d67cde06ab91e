"""How many answers run at once: what the plan has room for.

A plan has keys and values for one context. What it leaves unused on the devices that keep them holds more. Room is
counted in tokens: an answer takes those of its prompt and the most that it may generate, so that several short ones go
where one long one would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from lyra_emergence.plan import Plan

__all__ = ["DEFAULT_PARALLEL", "Room", "room_of"]

DEFAULT_PARALLEL: Final = 4
"""Answers that run at once at most: each takes a thread, and the model's passes take turns anyway."""


@dataclass(frozen=True, slots=True)
class Room:
    """Room for answers.

    Attributes:
        context: Tokens of prompt and answer that one request may have.
        contexts: Contexts that there is memory for at once; at least 1.
        parallel: Answers that run at once at most.
        reason: Why there are so many contexts.
    """

    context: int
    contexts: int
    parallel: int
    reason: str

    @property
    def tokens(self) -> int:
        """Tokens of all running answers together, at most."""
        return self.context * self.contexts

    def __str__(self) -> str:
        contexts = "1 context" if self.contexts == 1 else f"{self.contexts} contexts"
        return f"{self.parallel} answers at once, with room for {contexts} of {self.context} tokens: {self.reason}"


def room_of(plan: Plan, parallel: int = DEFAULT_PARALLEL, *, as_planned: bool = True) -> Room:
    """Return the room that a plan has.

    Args:
        plan: What the model was loaded by.
        parallel: Answers that run at once at most.
        as_planned: Whether the model was loaded where the plan begins, so that what the plan leaves unused is unused.
    """
    if not as_planned:
        return Room(plan.context_length, 1, parallel, "memory ran out while the model was loaded")
    keeping = [use for use in plan.devices if use.kv_cache and use.limit]
    if not keeping:
        return Room(plan.context_length, parallel, parallel, "the model keeps no keys and values")
    scarcest = min(keeping, key=lambda use: use.unused // use.kv_cache)
    contexts = 1 + max(0, scarcest.unused // scarcest.kv_cache)
    if contexts >= parallel:
        return Room(plan.context_length, parallel, parallel, "one for each")
    return Room(plan.context_length, contexts, parallel, f"{scarcest.device} holds no more")
