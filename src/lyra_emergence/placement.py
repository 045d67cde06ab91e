"""Where blocks are, and how full that makes each device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lyra_emergence.errors import DoesNotFitError
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lyra_emergence.budgets import Budget
    from lyra_emergence.footprint import BlockFootprint, Footprint

__all__ = [
    "CPU",
    "DISK",
    "STAGING_PIECE",
    "STAGING_PIECES",
    "STREAM_BUFFERS",
    "DeviceUse",
    "Placement",
    "check_fits",
    "measure_use",
    "refuse",
]

CPU, DISK = "cpu", "disk"
STREAM_BUFFERS = 2
"""Blocks that are in main memory at once of those that are streamed: one runs while the next is read."""
STAGING_PIECES, STAGING_PIECE = 2, 8 * 2**20
"""Pinned pieces of main memory through which weights go to an accelerator, and the bytes of one at most: a bus takes a
third of a millisecond for it, many times what it takes to begin."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one block goes.

    Attributes:
        block: The block's module path.
        kind: "embedding", "layer", "experts", "norm", "head" or "other".
        device: torch's device name, or "disk" for weights that are read from the file as they are used.
        weights: Bytes of its weights there.
        kv_cache: Bytes of its keys and values there.
        reason: Why there.
        streamed: Whether a block on disk is read ahead, in order, into buffers that are used again; else its pages are
            read as they are met.
        through: The accelerator that runs it for a long prompt, though its weights stay; "" for none.
    """

    block: str
    kind: str
    device: str
    weights: int
    kv_cache: int
    reason: str
    streamed: bool = False
    through: str = ""

    @property
    def nbytes(self) -> int:
        """Weights and KV cache together, in bytes."""
        return self.weights + self.kv_cache


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """How full one device is under a placement, in bytes.

    Attributes:
        device: torch's device name, or "disk".
        limit: What the plan may fill; 0 for the disk.
        total: What the device has; 0 for the disk.
        weights: Weights there; in main memory also those that stay there though their copies are elsewhere.
        mapped: Bytes of the weights that are a map of the file, whose pages the kernel may take back.
        kv_cache: Keys and values of the blocks that compute there.
        activations: Temporaries at their most while its blocks run.
        streaming: Buffers in main memory through which blocks on disk are streamed, and pieces through which weights go
            to an accelerator; there, the keys and values of a block that it runs for a prompt.
        packing: What packing layers takes for a moment in main memory while they load: before there is a KV cache.
        reserved: What the framework itself takes.
        layers: How many layers are there, with or without their experts.
        experts: How many layers' experts are there.
    """

    device: str
    limit: int
    total: int
    weights: int
    kv_cache: int
    activations: int
    reserved: int
    layers: int
    mapped: int = 0
    experts: int = 0
    packing: int = 0
    streaming: int = 0

    @property
    def temporaries(self) -> int:
        """What comes on top of weights and KV cache, in bytes: activations, or packing where that takes more."""
        return max(self.activations, self.packing - self.kv_cache)

    @property
    def used(self) -> int:
        """Everything together, in bytes."""
        return self.weights + self.kv_cache + self.temporaries + self.streaming + self.reserved

    @property
    def unused(self) -> int:
        """Bytes of the limit that stay free; negative where the plan does not fit."""
        return self.limit - self.used


def measure_use(
    placements: Sequence[Placement], footprint: Footprint, budgets: Sequence[Budget]
) -> tuple[DeviceUse, ...]:
    """Add up what each device of `budgets`, and the disk where it is used, holds under `placements`.

    Blocks on disk compute on the CPU: their keys, values and activations count there.
    """
    uses = [_use(budget.device, placements, footprint, budget) for budget in budgets]
    if any(p.device == DISK for p in placements):
        uses.append(_use(DISK, placements, footprint, None))
    return tuple(uses)


def _use(device: str, placements: Sequence[Placement], footprint: Footprint, budget: Budget | None) -> DeviceUse:
    here = [p for p in placements if p.device == device]
    runs = (
        [] if device == DISK else [p for p in placements if p.device == device or (device == CPU and p.device == DISK)]
    )
    blocks = {block.name: block for block in footprint.blocks}
    parts = {kind: True for kind in ("embedding", "layer", "experts", "head") if any(p.kind == kind for p in runs)}
    kv_cache = sum(p.kv_cache for p in runs)
    return DeviceUse(
        device=device,
        limit=budget.limit if budget else 0,
        total=budget.total if budget else 0,
        weights=sum(p.weights for p in here) + (_homes(placements, blocks) if device == CPU else 0),
        kv_cache=kv_cache,
        activations=footprint.activations.of(**parts, kv_cache=kv_cache, on_cpu=device == CPU),
        reserved=budget.reserved if budget and runs else 0,
        layers=sum(p.kind == "layer" for p in here),
        experts=len({blocks[p.block].index for p in here if p.kind == "experts"}),
        packing=footprint.packing if device == CPU and any(_packs(p, blocks) for p in runs) else 0,
        mapped=sum(blocks[p.block].mapped_on_cpu for p in here if device in (CPU, DISK) and p.weights),
        streaming=streaming_bytes(device, placements, blocks),
    )


def _packs(placement: Placement, blocks: Mapping[str, BlockFootprint]) -> bool:
    return placement.kind == "layer" and blocks[placement.block].packs


def streaming_bytes(device: str, placements: Sequence[Placement], blocks: Mapping[str, BlockFootprint]) -> int:
    """Return the bytes of a device through which weights pass that do not stay there."""
    if device == CPU:
        streamed = max((blocks[p.block].read_from(blocks) for p in placements if p.streamed), default=0)
        most = max((p.weights for p in placements if p.through), default=0)
        return STREAM_BUFFERS * streamed + STAGING_PIECES * min(STAGING_PIECE, most)
    # As they come, and once more as the prompt adds to them.
    return 2 * max((p.kv_cache for p in placements if p.through == device), default=0)


def _homes(placements: Sequence[Placement], blocks: Mapping[str, BlockFootprint]) -> int:
    """Return the bytes of main memory that blocks take beside the copies that `placements` counts."""
    return sum(blocks[p.block].home for p in placements if p.device != CPU or not blocks[p.block].home_is_copy)


def check_fits(uses: Iterable[DeviceUse]) -> str | None:
    """Return why the devices are too small ("needs 5.61 GB, cuda:0 has 4.00 GB"), or None where all fit."""
    for use in uses:
        if use.device != DISK and use.unused < 0:
            return f"needs {format_bytes(use.used)} of {use.device}, which has {format_bytes(use.limit)}"
    return None


def refuse(uses: Sequence[DeviceUse], hint: str) -> DoesNotFitError:
    """Return the error for the first device that is too small."""
    use = min((use for use in uses if use.device != DISK), key=lambda use: use.unused)
    message = (
        f"the model does not fit: it needs {format_bytes(use.used)} of {use.device} (weights "
        f"{format_bytes(use.weights)}, KV cache {format_bytes(use.kv_cache)}, activations "
        f"{format_bytes(use.temporaries)}), which has {format_bytes(use.limit)}"
    )
    return DoesNotFitError(message, needed=use.used, available=use.limit, device=use.device, hint=hint)
