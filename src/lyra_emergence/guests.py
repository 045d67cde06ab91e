"""Guests: which blocks of main memory an accelerator runs for a long prompt, and from how many tokens on.

A token reads every weight once, so main memory is the place to compute what lies there. A prompt of thousands of tokens
multiplies every weight that often, which takes a CPU seconds for a layer, and a bus milliseconds to bring it. The
memory for that is lent: while a prompt runs, guests take the place of two blocks of their size that live on the
accelerator, their hosts, which are copied back at its end (`runtime/guests.py`). So no layer has to stay away for it.

Invariants:
- a guest has the size and kind of its hosts, and no packed weights;
- its keys and values, and the pinned pieces that weights go through, fit what the placement leaves free;
- placements are those of before, but for `through`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lyra_emergence.placement import CPU, DISK, Placement, measure_use

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lyra_emergence.budgets import Budget
    from lyra_emergence.footprint import BlockFootprint, Footprint
    from lyra_emergence.speed import MachineRates

__all__ = ["DEFAULT_LEAST_TOKENS", "HOSTS", "least_tokens", "with_guests"]

HOSTS = 2
"""Blocks that lend their memory: one guest runs while the next is copied."""
DEFAULT_LEAST_TOKENS = 128
"""Tokens of a prompt from which guests pay, where the machine was not measured: a CPU of 500 GFLOP/s and a bus of
8 GB/s are even at half of it."""
_FEWEST_TOKENS = 16
_MARGIN = 1.25
"""How much shorter guests have to take than the CPU does: copying disturbs what else uses the bus."""
_KINDS = ("layer", "experts")
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def with_guests(
    placed: tuple[Placement, ...], footprint: Footprint, accelerators: Sequence[Budget], cpu: Budget
) -> tuple[Placement, ...]:
    """Return `placed` with the accelerator that runs each guest for a long prompt; none where there is no room."""
    if footprint.quantization is not None:
        return placed
    blocks = {block.name: block for block in footprint.blocks}
    hosts = _hosts(placed, blocks)
    found = tuple(
        replace(p, through=hosts.get(_size(p, blocks), "")) if _stays_out(p) and p.kind in _KINDS else p for p in placed
    )
    used = {p.through for p in found} - {""}
    budgets = [budget for budget in accelerators if budget.device in used]
    before = {use.device: use.unused for use in measure_use(placed, footprint, (*budgets, cpu))}
    after = measure_use(found, footprint, (*budgets, cpu))
    fits = all(use.unused >= min(0, before[use.device]) for use in after if use.device != DISK)
    return found if budgets and fits else placed


def _stays_out(placement: Placement) -> bool:
    return placement.device == CPU or (placement.device == DISK and placement.streamed)


def _size(placement: Placement, blocks: Mapping[str, BlockFootprint]) -> tuple[str, int]:
    return placement.kind, blocks[placement.block].read_from(blocks)


def _hosts(placed: Sequence[Placement], blocks: Mapping[str, BlockFootprint]) -> dict[tuple[str, int], str]:
    """Return the accelerator that hosts blocks of a kind and size: of those with most of them, `HOSTS` being enough."""
    counts: dict[tuple[str, int], dict[str, int]] = {}
    for placement in placed:
        if placement.kind in _KINDS and placement.device not in (CPU, DISK):
            here = counts.setdefault(_size(placement, blocks), {})
            here[placement.device] = here.get(placement.device, 0) + 1
    # Of equals the last: it holds the layers before those that main memory holds.
    return {size: max(reversed(here), key=lambda name: min(HOSTS, here[name])) for size, here in counts.items()}


def least_tokens(placements: Sequence[Placement], footprint: Footprint, rates: MachineRates | None) -> int:
    """Return the tokens of a pass, all sequences together, from which guests take less time than the CPU would.

    In place a guest takes its products at the CPU's rate; as a guest, what the bus takes for its bytes, and the hosts
    as much again at the end.

    Args:
        placements: The blocks, with guests among them.
        footprint: Their bytes.
        rates: What was measured on the machine; None where nothing was.
    """
    guests = [p for p in placements if p.through]
    device = rates.of(guests[0].through) if rates is not None and guests else None
    copy = (device.staged or device.copy) if device is not None else None
    product = rates.cpu.dtypes.get(footprint.dtype) if rates is not None else None
    if copy is None or product is None:
        return DEFAULT_LEAST_TOKENS
    shares = {block.name: block.active_share for block in footprint.blocks}
    nbytes = sum(p.weights for p in guests)
    restored = HOSTS * max(p.weights for p in guests)
    active = sum(p.weights * shares[p.block] for p in guests)
    per_token = 2 * active / _ITEM_BYTES[footprint.dtype] / product.matmul.likely
    return max(_FEWEST_TOKENS, int(_MARGIN * (nbytes + restored) / copy.likely / per_token))
