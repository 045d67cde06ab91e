"""The ladder of a plan: placements from the best one down to the CPU, each with its reason.

It has up to four rungs. "full" holds the whole model on accelerators; "planned" holds as many layers there as the
budgets allow, or what a custom map says; "fallback" holds `gpu_layers_fallback` layers there, by the documented map;
"cpu" uses no accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lyra_emergence.budgets import Request
from lyra_emergence.filling import fast_layers, place
from lyra_emergence.placement import Placement, check_fits, measure_use
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lyra_emergence.config import ModelConfig
    from lyra_emergence.footprint import Footprint

__all__ = ["NO_LAYER_FITS", "Rung", "RungName", "build_ladder", "forced_placements"]

NO_LAYER_FITS = "no layer fits an accelerator"

RungName = Literal["full", "planned", "fallback", "cpu"]


@dataclass(frozen=True, slots=True)
class Rung:
    """One stop on the way down.

    Attributes:
        name: "full", "planned", "fallback" or "cpu".
        placements: One per block in execution order; empty where the rung is passed over or adaptive.
        fits: Whether the budgets allow it.
        reason: Why it stands here, or why it is passed over.
        adaptive: Whether its placements are worked out when memory runs out, from what is free then.
    """

    name: RungName
    placements: tuple[Placement, ...]
    fits: bool
    reason: str
    adaptive: bool = False


def build_ladder(config: ModelConfig, footprint: Footprint, request: Request) -> Iterator[Rung]:
    """Yield the rungs from the best one down, each with its reason, those that do not fit among them."""
    if not request.accelerators:
        yield _checked("planned" if request.pinned else "cpu", place(footprint, request), footprint, request, "")
        if request.pinned and config.enable_progressive_fallback:
            yield _cpu_rung(footprint, request)
        return
    top = _top_rungs(config, footprint, request)
    yield from top
    if not config.enable_progressive_fallback:
        return
    yield from _fallback_rung(config.gpu_layers_fallback, top[-1], footprint, request)
    yield _cpu_rung(footprint, request)


def _top_rungs(config: ModelConfig, footprint: Footprint, request: Request) -> tuple[Rung, ...]:
    placements = place(footprint, request)
    if request.pinned:
        return (_checked("planned", placements, footprint, request, "the custom device map"),)
    if all(_is_fast(p) for p in placements):
        return (_checked("full", placements, footprint, request, "the whole model fits"),)
    full = Rung("full", (), fits=False, reason=_whole_model_shortfall(footprint, request))
    if request.whole_on is not None:
        return (full,)
    if fast_layers(placements):
        return (full, _checked("planned", placements, footprint, request, _as_many(placements)))
    if not config.enable_progressive_fallback:
        # The CPU is then no fallback, but the best that an automatic map can do.
        return (full, _checked("cpu", placements, footprint, request, NO_LAYER_FITS))
    return (full, Rung("planned", placements, fits=False, reason=NO_LAYER_FITS))


def _is_fast(placement: Placement) -> bool:
    return placement.device not in ("cpu", "disk")


def _as_many(placements: tuple[Placement, ...]) -> str:
    layers, experts = (sum(p.kind == kind and _is_fast(p) for p in placements) for kind in ("layer", "experts"))
    apart = any(p.kind == "experts" for p in placements) and experts < layers
    return f"as many layers as the budgets allow{', and then their experts' * apart}"


def forced_placements(footprint: Footprint, request: Request) -> tuple[Placement, ...]:
    """Return every block where the request insists on it, whether that fits or not: what a refusal measures."""
    device = request.whole_on or request.cpu.device
    reason = "the device map says so"
    return tuple(Placement(b.name, b.kind, device, b.weights, b.kv_cache, reason) for b in footprint.blocks)


def _whole_model_shortfall(footprint: Footprint, request: Request) -> str:
    experts = any(block.kind == "experts" for block in footprint.blocks)
    busy = footprint.activations.of(layer=True, experts=experts, kv_cache=footprint.kv_cache) * len(
        request.accelerators
    )
    needed = footprint.weights + footprint.kv_cache + busy + sum(b.reserved for b in request.accelerators)
    limit = sum(b.limit for b in request.accelerators)
    names = " and ".join(b.device for b in request.accelerators)
    has = "which have" if request.accelerators[1:] else "which has"
    if needed <= limit:
        return f"its blocks cannot be divided so that {names} hold them all"
    return f"needs {format_bytes(needed)} of {names}, {has} {format_bytes(limit)}"


def _fallback_rung(wanted: int | None, above: Rung, footprint: Footprint, request: Request) -> Iterator[Rung]:
    planned = fast_layers(above.placements)
    if wanted == 0 or (above.fits and planned == 0):
        return
    if not above.fits:
        yield from _lower_rung(wanted, footprint, request)
    elif wanted is None:
        reason = "as many layers as memory allows when it runs out"
        yield Rung("fallback", (), fits=False, reason=reason, adaptive=True)
    elif wanted >= planned:
        yield Rung("fallback", (), fits=False, reason=f"{wanted} layers are not fewer than the {planned} planned")
    else:
        yield from _lower_rung(wanted, footprint, request)


def _lower_rung(wanted: int | None, footprint: Footprint, request: Request) -> Iterator[Rung]:
    layers = sum(block.kind == "layer" for block in footprint.blocks)
    placements = place(footprint, request, layer_limit=layers if wanted is None else wanted)
    if fast_layers(placements):
        reason = _as_many(placements) if wanted is None else f"gpu_layers_fallback is {wanted}"
        yield _checked("fallback", placements, footprint, request, reason)
    elif wanted is not None:
        yield Rung("fallback", (), fits=False, reason=NO_LAYER_FITS)


def _cpu_rung(footprint: Footprint, request: Request) -> Rung:
    bare = Request((), request.cpu, {}, None, ())
    return _checked("cpu", place(footprint, bare), footprint, request, "no accelerator memory needed")


def _checked(
    name: RungName, placements: tuple[Placement, ...], footprint: Footprint, request: Request, reason: str
) -> Rung:
    uses = measure_use(placements, footprint, (*request.accelerators, request.cpu))
    short = check_fits(uses)
    return Rung(name, placements, fits=short is None, reason=short or reason or "no accelerator to use")
