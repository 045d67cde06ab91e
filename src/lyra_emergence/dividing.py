"""Dividing layers between accelerators so that most of a mixture's experts fit beside them."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lyra_emergence.budgets import Budget
    from lyra_emergence.footprint import Footprint

__all__ = ["divide_layers"]


def divide_layers(footprint: Footprint, budgets: Sequence[Budget], head_on: str | None) -> Mapping[str, int]:
    """Return how many layers, without their experts, each accelerator gets.

    As many layers as fit in order are placed, and of all ways to divide these the one with most room for experts, in
    whole blocks of experts, is taken; of several such, one with most layers on earlier accelerators. Exact where all
    experts have one size; the largest counts where they differ. It is a dynamic programme over accelerators and layers
    placed so far: the steps are at most the accelerators times half the square of the layers.

    Args:
        footprint: The blocks.
        budgets: The accelerators, in order.
        head_on: The accelerator that holds the head, or None.
    """
    layers = [block.nbytes for block in footprint.blocks if block.kind == "layer"]
    ends = [0, *accumulate(layers)]
    # Experts placed, and layers of each accelerator, by the number of layers placed so far.
    found: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for budget in budgets:
        room = _Room(footprint, budget, with_head=budget.device == head_on)
        reached: dict[int, tuple[int, tuple[int, ...]]] = {}
        for start, (experts, counts) in found.items():
            for end in range(start, len(layers) + 1):
                more = room.experts_beside(ends[end] - ends[start], layers=end > start)
                if more is None:
                    break
                if end not in reached or reached[end][0] <= experts + more:
                    reached[end] = (experts + more, (*counts, end - start))
        found = reached or {start: (experts, (*counts, 0)) for start, (experts, counts) in found.items()}
    counts = found[max(found)][1]
    return dict(zip((budget.device for budget in budgets), counts, strict=True))


class _Room:
    """What one accelerator has room for."""

    def __init__(self, footprint: Footprint, budget: Budget, *, with_head: bool) -> None:
        activations = footprint.activations
        free = budget.limit - budget.reserved
        if with_head:
            shared = [block.tied_to or block.name for block in footprint.blocks if block.kind == "head"]
            free -= sum(block.weights for block in footprint.blocks if block.name in shared)
        self._alone = {layers: free - activations.of(layer=layers, head=with_head) for layers in (False, True)}
        self._with_experts = {
            layers: free - activations.of(layer=layers, experts=True, head=with_head) for layers in (False, True)
        }
        self._each = max((block.nbytes for block in footprint.blocks if block.kind == "experts"), default=0)

    def experts_beside(self, nbytes: int, *, layers: bool) -> int | None:
        """Return how many blocks of experts fit beside `nbytes` of layers; None where these do not fit."""
        if nbytes > self._alone[layers]:
            return None
        return max(0, self._with_experts[layers] - nbytes) // self._each if self._each else 0
