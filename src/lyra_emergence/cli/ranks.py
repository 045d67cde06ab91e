"""The program as one of several that torchrun starts: rank 0 is the program, the others follow it in silence."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from lyra_emergence.cli.console import Console
from lyra_emergence.cli.plan_view import explain_block, render_plan
from lyra_emergence.cli.status import INTERRUPTED
from lyra_emergence.distributed.launch import find_launch
from lyra_emergence.distributed.layout import Layout
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lyra_emergence.checkpoint import CheckpointIndex
    from lyra_emergence.cli.plan import PlanRequest
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.distributed.launch import Launch
    from lyra_emergence.distributed.rank_plan import RankPlan
    from lyra_emergence.machine import Machine

__all__ = ["claim_last_word", "end_ranks", "planned_lines", "print_plans", "run_rank"]


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
        code = program()
    finally:
        leader.end()
    # torchrun would answer any other status with a traceback of its own, and a person has left on purpose.
    return 0 if code == INTERRUPTED else code


def claim_last_word() -> None:
    """Wait here for good where another rank's error is being told, so that a person reads of one."""
    from lyra_emergence.distributed.leader import leading

    leader = leading()
    if leader is not None:
        leader.claim()


def end_ranks() -> None:
    """End the other ranks, if there are any: this process ends at once."""
    from lyra_emergence.distributed.leader import leading

    leader = leading()
    if leader is not None:
        leader.end()


def print_plans(
    config: ModelConfig,
    index: CheckpointIndex,
    machine: Machine,
    request: PlanRequest,
    console: Console,
    *,
    as_json: bool,
) -> int:
    """Print the plan of rank 0 and the bytes of every rank, and return 0.

    Raises:
        ConfigError: The model cannot be divided as it is configured, or there is no block to explain.
        DoesNotFitError: A share does not fit.
    """
    from lyra_emergence.distributed.layout import settle
    from lyra_emergence.distributed.rank_plan import plan_ranks

    launch = find_launch(os.environ)
    if launch is not None:
        settle(config, launch)
    ranks = plan_ranks(config, index, machine, batch=request.batch)
    first = ranks[0].plan
    if launch is None:
        console.note(_assumed(len(ranks), len(machine.accelerators)))
    for note in first.notes:
        console.warning(note)
    if as_json:
        more = {"distributed": config.distributed, "ranks": [one.to_json() for one in ranks]}
        console.print(json.dumps(first.to_json() | more, indent=2))
    elif request.explain is not None:
        console.print(explain_block(first, request.explain))
    else:
        title = f"{config.model_id}, rank 0 of {len(ranks)} ({Layout.of(config)})"
        console.print("\n".join((*render_plan(first, title, console), "", *planned_lines(ranks))))
    return 0


def _assumed(ranks: int, accelerators: int) -> str:
    """Return what is taken for granted of machines that this process does not see."""
    if not accelerators:
        return f"main memory is divided as if all {ranks} ranks ran on this machine"
    return "each rank is planned as if it had one of this machine's GPUs"


def planned_lines(ranks: Sequence[RankPlan]) -> Iterator[str]:
    """Yield what was planned for each rank, as a table."""
    rows: list[tuple[str, ...]] = [("rank", "device", "weights", "KV cache", "activations", "of")]
    for one in ranks:
        use = one.use
        figures = map(format_bytes, (use.weights, use.kv_cache, use.activations, use.limit))
        rows.append((str(one.rank), use.device, *figures))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for rank, device, *amounts in rows:
        cells = (amount.rjust(width) for amount, width in zip(amounts, widths[2:], strict=True))
        yield "  ".join((rank.ljust(widths[0]), device.ljust(widths[1]), *cells))
