"""The program as one of several that torchrun starts: rank 0 is the program, the others follow it in silence."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lyra_emergence.cli.console import Console
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from lyra_emergence.distributed.launch import Launch
    from lyra_emergence.distributed.rank_plan import RankPlan
    from lyra_emergence.distributed.rank_report import RankReport

__all__ = ["claim_last_word", "planned_lines", "report_lines", "run_rank"]


def run_rank(launch: Launch, program: Callable[[], int]) -> int:
    """Be one rank, and return its exit status.

    Args:
        launch: Which one.
        program: Runs the program on rank 0.

    Raises:
        LyraError: The ranks cannot meet.
    """
    if launch.rank:
        from lyra_emergence.distributed.following import follow

        return follow(launch)
    from lyra_emergence.distributed.leader import Leader, hold_signal

    hold_signal()
    leader = Leader(launch, lambda message, hint: Console().error(message, hint))
    try:
        return program()
    finally:
        leader.end()


def claim_last_word() -> None:
    """Wait here for good where another rank's error is being told, so that a person reads of one."""
    from lyra_emergence.distributed.leader import leading

    leader = leading()
    if leader is not None:
        leader.claim()


def report_lines(ranks: Sequence[RankReport]) -> Iterator[str]:
    """Yield what each rank holds beside what was planned, a line each."""
    for one in ranks:
        planned = "" if one.weights == one.planned_weights else f", planned {format_bytes(one.planned_weights)}"
        held = f"{format_bytes(one.weights)} of weights{planned}"
        room = f"KV cache {format_bytes(one.kv_cache)} of {format_bytes(one.planned_kv_cache)}"
        yield f"rank {one.rank} on {one.host}, {one.device}: {held}, {room}, process {format_bytes(one.private)}"


def planned_lines(ranks: Sequence[RankPlan]) -> Iterator[str]:
    """Yield what was planned for each rank, a line each."""
    rows = [("ranks", "device", "weights", "KV cache", "activations", "of")]
    for one in ranks:
        use = one.use
        figures = (use.weights, use.kv_cache, use.activations, use.limit)
        rows.append((f"{one.rank}", use.device, *map(format_bytes, figures)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        name, device, *figures = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        right = (cell.strip().rjust(width) for cell, width in zip(figures, widths[2:], strict=True))
        yield f"{name}  {device}  {'  '.join(right)}".rstrip()
