"""Filling devices: which block goes where, and why.

Invariants:
- every block has exactly one device; layers that no map pins are contiguous and never return to an earlier device;
- as many layers as fit in that order are on accelerators, and what room they leave goes to what a token reads most of;
- where not all fits, a mixture's experts leave the accelerators before the rest of their layers does;
- on an accelerator, weights + KV cache + activations + reserved bytes never exceed the budget;
- a tied block shares the device of the block that holds its weight, unless a custom map parts them;
- only blocks in their stored form are left on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from lyra_emergence.dividing import divide_layers
from lyra_emergence.filler import Filler
from lyra_emergence.guests import with_guests
from lyra_emergence.placement import CPU, DISK, Placement
from lyra_emergence.spilling import spill_to_disk

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lyra_emergence.budgets import Budget, Request
    from lyra_emergence.footprint import Footprint

__all__ = ["crossings", "fast_layers", "place", "slow_bytes"]

_MOST_HEADS = 3
"""Accelerators that are tried as the head's place before layers have theirs: planning time grows with their number."""


def place(
    footprint: Footprint,
    request: Request,
    *,
    accelerators: Sequence[Budget] | None = None,
    layer_limit: int | None = None,
) -> tuple[Placement, ...]:
    """Place every block.

    Args:
        footprint: The blocks and their bytes.
        request: Budgets, and the devices that a custom map pins.
        accelerators: Budgets to use in place of the request's.
        layer_limit: How many layers may be on accelerators. With a limit the embeddings go to the first accelerator
            and everything behind the layers to the CPU, which is the documented map of the fallback's middle rung.
    """
    budgets = request.accelerators if accelerators is None else accelerators
    if layer_limit is None:
        placed = _best(footprint, request, budgets)
    else:
        ways = [_limited(Filler(footprint, budgets, apart=apart), layer_limit) for apart in (False, True)]
        placed = min(ways, key=lambda way: (-fast_layers(way), slow_bytes(way, footprint)))
    settled = spill_to_disk(placed, footprint, request.cpu)
    return with_guests(settled, footprint, budgets, request.cpu) if request.guests else settled


def _best(footprint: Footprint, request: Request, budgets: Sequence[Budget]) -> tuple[Placement, ...]:
    """Return the best of some ways to fill: most layers, least read from slow memory, none left there, few crossings.

    Where all fits, it is the fewest accelerators that hold it. Where not, the ways differ in the accelerator that keeps
    room for the head before layers are placed, and in whether layers are placed without their experts: then also in
    what comes first, and in how layers are divided so that most experts fit beside them.
    """

    def rank(way: tuple[Placement, ...]) -> tuple[int, float, bool, int]:
        return -fast_layers(way), slow_bytes(way, footprint), not all(map(_is_fast, way)), crossings(way)

    best = _filled(footprint, request, budgets)
    if all(_is_fast(p) for p in best):
        fewer = (_largest(budgets, count) for count in range(1, len({p.device for p in best})))
        ways = (_filled(footprint, request, some) for some in fewer)
        return next((way for way in ways if all(_is_fast(p) for p in way)), best)
    choices = _choices(footprint, request, budgets)
    return min([best, *(_filled(footprint, request, budgets, choice) for choice in choices)], key=rank)


@dataclass(frozen=True, slots=True)
class _Choice:
    """How to fill.

    Attributes:
        apart: Whether a layer may be placed without its experts.
        experts_first: Whether the experts come before the head then.
        head_on: The accelerator that gets the head before any layer, or None.
        layers: How many layers each accelerator gets, where not all that it has room for.
    """

    apart: bool = False
    experts_first: bool = False
    head_on: str | None = None
    layers: Mapping[str, int] | None = None


def _choices(footprint: Footprint, request: Request, budgets: Sequence[Budget]) -> Iterator[_Choice]:
    several = len(budgets) > 1
    roomiest = _largest(budgets, _MOST_HEADS) if several else []
    for head_on in (None, *(budget.device for budget in roomiest)):
        yield _Choice(head_on=head_on)
        if any(block.kind == "experts" for block in footprint.blocks):
            for first in (False, True):
                yield _Choice(apart=True, experts_first=first, head_on=head_on)
                if several and not request.pinned:
                    layers = divide_layers(footprint, budgets, head_on)
                    yield _Choice(apart=True, experts_first=first, head_on=head_on, layers=layers)


def _largest(budgets: Sequence[Budget], count: int) -> list[Budget]:
    """Return the `count` accelerators with the most room, in their own order."""
    chosen = sorted(budgets, key=lambda budget: budget.reserved - budget.limit)[:count]
    return [budget for budget in budgets if budget in chosen]


def crossings(placements: Sequence[Placement]) -> int:
    """Return how often a token's hidden state goes from one device to another, the way back among them."""
    route = [CPU if p.device == DISK else p.device for p in placements if p.kind != "other"]
    return sum(one != other for one, other in pairwise([*route, *route[:1]]))


def _is_fast(placement: Placement) -> bool:
    return placement.device not in (CPU, DISK)


def slow_bytes(placements: Sequence[Placement], footprint: Footprint) -> float:
    """Return the bytes of weights that a token reads from main memory or the disk: what its time goes into."""
    blocks = {block.name: block for block in footprint.blocks}
    slow = [p for p in placements if p.device in (CPU, DISK) and p.kind not in ("embedding", "other")]
    return sum(blocks[p.block].read_from(blocks) * blocks[p.block].active_share for p in slow)


def fast_layers(placements: Sequence[Placement]) -> int:
    """Return how many layers are on accelerators."""
    return sum(p.kind == "layer" and p.device not in (CPU, DISK) for p in placements)


def _filled(
    footprint: Footprint, request: Request, budgets: Sequence[Budget], choice: _Choice | None = None
) -> tuple[Placement, ...]:
    """Fill as `choice` says; by default layers whole, and the head after them."""
    choice = choice or _Choice()
    filler = Filler(footprint, budgets, apart=choice.apart)
    filler.pin(request.pinned)
    if choice.head_on is not None:
        filler.keep_head(choice.head_on)
    filler.fill_layers(most=choice.layers)
    steps = [filler.fill_head, filler.fill_experts]
    for step in reversed(steps) if choice.experts_first else steps:
        step()
    filler.fill_lookups()
    return filler.finish(None)


def _limited(filler: Filler, layer_limit: int) -> tuple[Placement, ...]:
    filler.fill_embeddings()
    if not filler.fill_layers(layer_limit):
        filler.clear()  # embeddings alone gain nothing there
    filler.fill_experts()
    return filler.finish(layer_limit)
