"""A plan as text: bars for the devices, a strip of layers, the ladder; at any width, with and without color."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Final

from lyra_emergence.errors import ConfigError
from lyra_emergence.placement import DISK
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lyra_emergence.cli.console import Console, Style
    from lyra_emergence.plan import DeviceUse, Placement, Plan
    from lyra_emergence.speed import Band, Speed

__all__ = ["band_text", "explain_block", "render_plan", "render_speed", "summary"]

_FILLS: Final = ("█", "▓", "▒", "▚", "░", "·")
_ASCII_FILLS: Final = ("#", "=", "~", "%", ":", ".")
_PARTS: Final = ("weights", "KV cache", "activations", "streaming", "headroom")
_ACCELERATOR_STYLES: Final[tuple[Style, ...]] = ("green", "magenta", "cyan", "yellow")
_HOST_STYLES: Final[dict[str, Style]] = {"cpu": "blue", "disk": "dim"}
_NARROWEST_BAR: Final = 10
_WIDEST_BAR: Final = 60
_LONGEST_FIGURES: Final = len("9.99 GB of 9.99 GB")
_INDENT: Final = "  "
_TWO_DIGITS: Final = 10


def summary(plan: Plan, name: str) -> str:
    """Return the plan in a line: "phi-2: 5.56 GB of weights, 16 layers on cuda:0, 16 on cpu, context 2048"."""
    uses = [use for use in plan.devices if use.layers]
    first, *others = [f"{use.layers} on {use.device}" for use in uses] or ["nothing"]
    placed = f"on {uses[0].device}" if len(uses) == 1 else ", ".join((first.replace(" on", " layers on"), *others))
    placed += "".join(f", experts of {use.experts} on {use.device}" for use in _holders_of_experts(plan))
    return f"{name}: {format_bytes(plan.footprint.weights)} of weights, {placed}, context {plan.context_length}"


def _holders_of_experts(plan: Plan) -> list[DeviceUse]:
    """Return the devices that hold experts of more layers than they hold layers: experts placed apart."""
    return [use for use in plan.devices if use.experts > use.layers]


def explain_block(plan: Plan, name: str) -> str:
    """Return why the block called `name` is where it is.

    Raises:
        ConfigError: The plan has no such block.
    """
    found = next((p for p in plan.placements if p.block == name), None)
    if found is None:
        names = [p.block for p in plan.placements]
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"blocks are named like {names[0]}"
        raise ConfigError(f"the plan has no block '{name}'", hint=hint)
    cache = f" and {format_bytes(found.kv_cache)} of KV cache" if found.kv_cache else ""
    prompts = f"; a long prompt runs it on {found.through}" if found.through else ""
    weights = f"({format_bytes(found.weights)} of weights{cache})"
    return f"{found.block} is on {found.device}: {found.reason} {weights}{prompts}"


def render_plan(plan: Plan, name: str, console: Console) -> Iterator[str]:
    """Yield the lines that show `plan` at the console's width."""
    yield from _header(plan, name, console)
    yield ""
    for use in plan.devices:
        yield from _device(use, plan, console)
    yield ""
    yield from _strip(plan, console)
    yield ""
    yield from _ladder(plan, console)


def render_speed(speed: Speed | None, console: Console, *, known: bool = False) -> Iterator[str]:
    """Yield the lines that show a plan's speed; `known` says that it cannot be had by measuring this machine."""
    if speed is None:
        if not known:
            yield ""
            yield "speed   not measured on this machine yet; lyra.py plan --measure does it in half a minute"
        return
    decode, prefill = band_text(speed.decode_tokens_per_second), band_text(speed.prefill_tokens_per_second)
    yield ""
    yield f"speed   {decode} tokens/s, prompt {prefill} tokens/s"
    yield from _hanging(_INDENT, len(_INDENT), speed.rests_on, console.width)


def band_text(band: Band) -> str:
    """Return a band as "21 (13 to 34)"."""
    low, likely, high = (f"{figure:.2g}" if figure < _TWO_DIGITS else f"{figure:.0f}" for figure in _figures(band))
    return f"{likely} ({low} to {high})"


def _figures(band: Band) -> tuple[float, float, float]:
    return band.low, band.likely, band.high


def _header(plan: Plan, name: str, console: Console) -> Iterator[str]:
    footprint = plan.footprint
    dot = " · " if console.can_show("·") else " - "
    stored = f"{footprint.quantization}, {footprint.dtype}" if footprint.quantization else footprint.dtype
    weights = f"{format_bytes(footprint.weights)} of weights"
    facts = dot.join((stored, weights, f"context {plan.context_length} tokens"))
    title = console.style(name, "bold", stream=console.stdout)
    if len(name) + len(dot) + len(facts) <= console.width:
        yield f"{title}{dot}{facts}"
    else:
        yield title
        yield from _hanging(_INDENT, len(_INDENT), facts, console.width)


def _device(use: DeviceUse, plan: Plan, console: Console) -> Iterator[str]:
    label = use.device.ljust(max(len(u.device) for u in plan.devices))
    fills = _FILLS if console.can_show("".join(_FILLS)) else _ASCII_FILLS
    amounts = (use.weights, use.kv_cache, use.temporaries, use.streaming, use.reserved)
    if use.limit == 0:
        ahead = any(p.streamed for p in plan.placements)
        on_disk = f"{format_bytes(use.used)}, read from the file {'ahead of its use' if ahead else 'as it is used'}"
        yield f"{label}  {on_disk if use.device == DISK else 'nothing free that may be used'}"
        return
    figures = f"{format_bytes(use.used)} of {format_bytes(use.limit)}"
    # "999 MB of 99.9 GB" is as long as figures get; one width keeps the bars of all devices comparable.
    width = min(_WIDEST_BAR, max(_NARROWEST_BAR, console.width - len(label) - _LONGEST_FIGURES - 5))
    bar = _bar(amounts, use.limit, width, fills)
    style = _device_style(use.device, plan)
    yield f"{label}  [{console.style(bar, style, stream=console.stdout)}] {figures}"
    parts = [
        f"{fill} {part} {format_bytes(amount)}"
        for fill, part, amount in zip(fills, _PARTS, amounts, strict=False)
        if amount
    ]
    free = f"{fills[-1]} free {format_bytes(use.unused)}" if use.unused > 0 else ""
    yield from _flow([*parts, free] if free else parts, " " * (len(label) + 3), console.width)


def _bar(amounts: tuple[int, ...], limit: int, width: int, fills: tuple[str, ...]) -> str:
    """Return `width` characters of which each part fills its share of `limit`, cut at cumulative positions."""
    bar, filled, total = "", 0, 0
    for fill, amount in zip(fills, amounts, strict=False):
        total += amount
        end = min(width, max(round(width * total / limit), filled + (1 if amount else 0)))
        bar += fill * (end - filled)
        filled = end
    return bar + fills[-1] * (width - filled)


def _flow(parts: list[str], indent: str, width: int) -> Iterator[str]:
    line = ""
    for part in parts:
        if line and len(indent) + len(line) + len(part) + 2 > width:
            yield indent + line
            line = ""
        line += ("  " if line else "") + part
    if line:
        yield indent + line


def _strip(plan: Plan, console: Console) -> Iterator[str]:
    layers: list[Placement] = []
    experts: list[Placement | None] = []
    for placement in plan.placements:
        if placement.kind == "layer":
            layers.append(placement)
            experts.append(None)
        elif placement.kind == "experts" and experts:
            experts[-1] = placement
    apart = _holders_of_experts(plan)
    digits = len(str(max(0, len(layers) - 1)))
    strips: dict[str, list[str | None]] = {"layers": [layer.device for layer in layers]}
    if apart:
        strips["experts"] = [placement.device if placement else None for placement in experts]
    wide = max(map(len, strips))
    row = max(8, (console.width - wide - digits - 6) // 8 * 8)
    for start in range(0, len(layers), row):
        for title, devices in strips.items():
            cells = "".join(_cell(device, plan, console) for device in devices[start : start + row])
            yield f"{title if start == 0 else '':<{wide}} {start:>{digits}} {cells}".rstrip()
    for use in plan.devices:
        held = _held(plan, use.device)
        if held:
            lead = f"{_INDENT}{_symbol(use.device)} {use.device}: "
            yield from _hanging(lead, len(lead), held, console.width)
    for device, numbers in _guests(plan).items():
        told = f"long prompts run {_ranges('layer', numbers)} on {device} as well, copied there as they run"
        yield from _hanging(_INDENT, len(_INDENT), told, console.width)


def _guests(plan: Plan) -> dict[str, list[int]]:
    """Return, by accelerator, the numbers of the layers that it runs for a long prompt, wholly or their experts."""
    found: dict[str, list[int]] = {}
    number = -1
    for placement in plan.placements:
        number += placement.kind == "layer"
        if placement.through and number not in found.setdefault(placement.through, []):
            found[placement.through].append(number)
    return found


def _cell(device: str | None, plan: Plan, console: Console) -> str:
    if device is None:
        return " "
    return console.style(_symbol(device), _device_style(device, plan), stream=console.stdout)


def _held(plan: Plan, device: str) -> str:
    """Return what a device holds in execution order: "embedding, layers 0-15", "experts of layers 2-15"."""
    before: list[str] = []
    behind: list[str] = []
    layers: list[int] = []
    experts: list[int] = []
    number = -1
    for placement in plan.placements:
        number += placement.kind == "layer"
        if placement.device != device:
            continue
        if placement.kind == "layer":
            layers.append(number)
        elif placement.kind == "experts":
            experts.append(number)
        else:
            named = placement.kind if placement.kind != "other" else placement.block
            (before if number < 0 else behind).append(named)
    held = [_ranges("layer", layers)] if layers else []
    if experts and _holders_of_experts(plan):
        held.append(_ranges("experts of layer", sorted(set(experts))))
    return ", ".join((*before, *held, *behind))


def _ranges(noun: str, numbers: list[int]) -> str:
    """Return "layers 0-3, 7" for [0, 1, 2, 3, 7]."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    listed = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{noun}{'s'[: len(numbers) > 1]} {listed}"


def _ladder(plan: Plan, console: Console) -> Iterator[str]:
    yield "ladder (> is where loading starts)"
    widest = max(len(rung.name) for rung in plan.rungs)
    for number, rung in enumerate(plan.rungs):
        mark = ">" if number == plan.start else "x" if number < plan.start else " "
        style: tuple[Style, ...] = ("bold",) if number == plan.start else ()
        line = f"{_INDENT}{mark} {rung.name.ljust(widest)}  "
        yield from _hanging(console.style(line, *style, stream=console.stdout), len(line), rung.reason, console.width)


def _hanging(lead: str, lead_width: int, text: str, width: int) -> Iterator[str]:
    import textwrap

    lines = textwrap.wrap(text, max(20, width - lead_width)) or [""]
    yield lead + lines[0]
    for line in lines[1:]:
        yield " " * lead_width + line


def _device_style(device: str, plan: Plan) -> Style:
    host = _HOST_STYLES.get(device)
    if host is not None:
        return host
    names = [use.device for use in plan.devices]
    return _ACCELERATOR_STYLES[names.index(device) % len(_ACCELERATOR_STYLES)]


def _symbol(device: str) -> str:
    """Return one character for a device: the ordinal of an accelerator, else the first letter of its name."""
    kind, _, ordinal = device.partition(":")
    if not ordinal:
        return kind[0]
    return ordinal if len(ordinal) == 1 else chr(ord("A") + int(ordinal) - 10)
