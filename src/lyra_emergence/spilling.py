"""What main memory cannot hold: which blocks stay in the file, and which of those are streamed.

What a token reads whole is streamed: it is read in order into a few buffers (`runtime/streaming.py`), which take memory
themselves, so that it pays from one block more than there are buffers. Left to the kernel, a model a little larger than
memory is read whole for every token, since each page goes just before it is wanted again. What a token reads little of,
tables and experts, is left to the kernel.

Invariants:
- only blocks in their stored form are left on disk;
- layers that are streamed lie evenly between those that stay, so that reading and computing go on side by side;
- no more layers than that takes are streamed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lyra_emergence.placement import CPU, DISK, STREAM_BUFFERS, Placement, measure_use

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lyra_emergence.budgets import Budget
    from lyra_emergence.footprint import Footprint

__all__ = ["spill_to_disk"]

_STREAMED = ("layer", "head")


def spill_to_disk(placed: tuple[Placement, ...], footprint: Footprint, cpu: Budget) -> tuple[Placement, ...]:
    """Leave CPU blocks in the file until the rest fits main memory: tables and experts first, then what is streamed.

    Where the buffers have no room beside what has to stay, nothing is streamed: the kernel reads pages as they are met.
    """
    spill = _Spill(placed, footprint)
    over = -measure_use(placed, footprint, (cpu,))[0].unused
    names = next((names for names in spill.ways() if over <= spill.freed(names)), None)
    if names is not None:
        return spill.left_in_file(names, cpu, streaming=True)
    return spill.left_in_file(spill.unstreamed(over), cpu, streaming=False)


class _Spill:
    """The blocks that may be left in the file.

    Args:
        placed: Where all blocks are.
        footprint: Their bytes.
    """

    def __init__(self, placed: tuple[Placement, ...], footprint: Footprint) -> None:
        self._placed = placed
        self._blocks = {block.name: block for block in footprint.blocks}
        self._pinned = [p.block for p in placed if self._is_streamable(p) and p.device == DISK]
        shared = {block.tied_to for block in footprint.blocks}
        here = [p for p in reversed(placed) if p.device == CPU and self._blocks[p.block].mapped and p.weights > 0]
        tables = [p.block for p in here if p.kind == "embedding" and p.block not in shared]
        self._little_read = [*tables, *(p.block for p in here if p.kind == "experts")]
        self._layers = [p.block for p in reversed(here) if p.kind == "layer"]
        self._rest = [p.block for p in here if p.block not in {*self._little_read, *self._layers}]

    def _is_streamable(self, placement: Placement) -> bool:
        return placement.kind in _STREAMED and self._blocks[placement.block].read_from(self._blocks) > 0

    def ways(self) -> Iterator[list[str]]:
        """Yield what to leave in the file, less first."""
        for count in range(len(self._little_read) + 1):
            yield self._little_read[:count]
        for count in range(1, len(self._layers) + 1):
            streamed = self._evenly(count)
            if len(streamed) + len(self._pinned) > STREAM_BUFFERS:
                yield [*self._little_read, *streamed]
        for count in range(1, len(self._rest) + 1):
            yield [*self._little_read, *self._layers, *self._rest[:count]]

    def _evenly(self, count: int) -> list[str]:
        among = len(self._layers)
        return [name for at, name in enumerate(self._layers) if (at + 1) * count // among > at * count // among]

    def freed(self, names: Sequence[str]) -> int:
        """Return the bytes of main memory that leaving `names` in the file frees, less those of buffers."""
        reads = [self._blocks[name].read_from(self._blocks) for name in (*self._pinned, *self._streamed_of(names))]
        buffers = STREAM_BUFFERS * max(reads) if len(reads) > STREAM_BUFFERS else 0
        return sum(self._blocks[name].weights for name in names) - buffers

    def _streamed_of(self, names: Sequence[str]) -> list[str]:
        spilled = self._with_tied(names)
        return [p.block for p in self._placed if p.block in spilled and self._is_streamable(p)]

    def _with_tied(self, names: Sequence[str]) -> set[str]:
        spilled = set(names)
        free = (p.block for p in self._placed if p.device == CPU and not p.weights)
        return spilled | {name for name in free if self._blocks[name].tied_to in spilled}

    def unstreamed(self, over: int) -> list[str]:
        """Return what to leave in the file where nothing is streamed: layers from the last one, as few as can be."""
        order = [*self._little_read, *reversed(self._layers), *self._rest]
        names: list[str] = []
        for name in order:
            if over <= 0:
                break
            names.append(name)
            over -= self._blocks[name].weights
        return names

    def left_in_file(self, names: Sequence[str], cpu: Budget, *, streaming: bool) -> tuple[Placement, ...]:
        """Return where all blocks are with `names` in the file, and what has no weights but theirs.

        Args:
            names: The blocks to leave there.
            cpu: Main memory, for the reason.
            streaming: Whether what can be streamed is, where that is more than the buffers hold.
        """
        spilled = self._with_tied(names)
        streamed = {*self._pinned, *self._streamed_of(names)} if streaming else set()
        if len(streamed) <= STREAM_BUFFERS:
            streamed = set()
        lacks = f"main memory cannot hold it ({cpu.reason})"
        read = {True: "read from the file ahead of its use", False: "read from the file as it is used"}
        placements = []
        for placement in self._placed:
            ahead = placement.block in streamed
            if placement.block in spilled:
                placements.append(replace(placement, device=DISK, streamed=ahead, reason=f"{lacks}: {read[ahead]}"))
            else:
                placements.append(replace(placement, streamed=ahead))
        return tuple(placements)
