"""A plan for several machines as text: a table of layouts, why the first is chosen, and the commands that run it."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Final

from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lyra_emergence.cli.console import Console
    from lyra_emergence.fleet import FleetPlan, Layout
    from lyra_emergence.fleet.handover import Handover

__all__ = ["render_fleet"]

_TITLES: Final = ("tensor", "stages", "replicas", "fullest GPU", "at once", "tokens/s", "prompt/s")
_GAP: Final = "  "
_TWO_DIGITS: Final = 10


def render_fleet(plan: FleetPlan, handover: Handover, name: str, console: Console) -> Iterator[str]:
    """Yield the lines that show `plan` at the console's width; commands are never broken."""
    yield from _header(plan, name, console)
    yield ""
    yield from _table(plan.layouts, console)
    yield ""
    yield from _hanging("chosen   ", _chosen(plan), console)
    yield from _hanging("traffic  ", _traffic(plan.chosen), console)
    for passed in plan.passed_over:
        yield from _hanging("not      ", passed, console)
    yield ""
    for line in handover.lines():
        yield from [line] if line.startswith("    ") else textwrap.wrap(line, console.width)
    yield ""
    for note in plan.notes:
        yield from _hanging("note     ", note, console)


def _header(plan: FleetPlan, name: str, console: Console) -> Iterator[str]:
    footprint = plan.model.footprint
    dot = " · " if console.can_show("·") else " - "
    stored = f"{footprint.quantization}, {footprint.dtype}" if footprint.quantization else footprint.dtype
    facts = [stored, f"{format_bytes(footprint.weights)} of weights", f"context {footprint.context_length} tokens"]
    if footprint.batch > 1:
        facts.append(f"{footprint.batch} sequences")
    yield console.style(name, "bold", stream=console.stdout)
    yield from _hanging("  ", dot.join(facts), console)
    yield from _hanging("  ", f"on {', and '.join(map(str, plan.machines))}", console)


def _table(layouts: Sequence[Layout], console: Console) -> Iterator[str]:
    """Yield a line for each layout; on a narrow terminal without the columns that do not fit it."""
    rows = [_TITLES, *map(_cells, layouts)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown = len(widths)
    while shown > 1 and sum(widths[:shown]) + len(_GAP) * shown > console.width:
        shown -= 1
    for number, row in enumerate(rows):
        cells = _GAP.join(cell.rjust(width) for cell, width in zip(row[:shown], widths[:shown], strict=True))
        line = f"{'>' if number == 1 else ' '} {cells}"
        yield console.style(line, "bold", stream=console.stdout) if number == 1 else line


def _cells(layout: Layout) -> tuple[str, ...]:
    full = layout.fullest
    speed = layout.speed
    stages = str(len(layout.stages))
    return (
        str(layout.tensor),
        stages if layout.machines == 1 else f"{stages} on {layout.machines}",
        str(layout.replicas),
        f"{format_bytes(full.used)} of {format_bytes(full.limit)}",
        str(layout.sequences),
        _figure(speed.decode_tokens_per_second.likely),
        _figure(speed.prefill_tokens_per_second.likely),
    )


def _figure(number: float) -> str:
    return f"{number:.2g}" if number < _TWO_DIGITS else f"{number:.0f}"


def _chosen(plan: FleetPlan) -> str:
    best = plan.chosen
    decode = best.speed.decode_tokens_per_second
    band = f"{_figure(decode.likely)} ({_figure(decode.low)} to {_figure(decode.high)}) tokens/s"
    gpus = f"{best.gpus} GPU{'s' * (best.gpus > 1)} on {best.machines} machine{'s' * (best.machines > 1)} for a replica"
    return f"{plan.reason}: {band}, {gpus}; {best.speed.rests_on}"


def _traffic(layout: Layout) -> str:
    traffic = layout.traffic
    parts = []
    if traffic.per_gpu:
        parts.append(f"each GPU sends {format_bytes(traffic.per_gpu)} to those that share its layers")
    if traffic.per_boundary:
        between = f", {traffic.between} time{'s' * (traffic.between != 1)} between machines" if traffic.between else ""
        parts.append(f"each stage hands {format_bytes(traffic.per_boundary)} to the next{between}")
    return f"for a token, {' and '.join(parts)}" if parts else "none: one GPU holds the model"


def _hanging(lead: str, text: str, console: Console) -> Iterator[str]:
    yield from textwrap.wrap(text, console.width, initial_indent=lead, subsequent_indent=" " * len(lead))
