"""Where a model's blocks are now, and how full that makes each device: what the page draws.

The figures are the plan's own sums (`placement.measure_use`) over the devices that the blocks are on at this moment. As
long as nothing moved they equal the plan's, but for what packing takes while a model loads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lyra_emergence.errors import is_out_of_memory
from lyra_emergence.machine import probe_machine
from lyra_emergence.placement import CPU, DISK

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.machine import Device
    from lyra_emergence.placement import DeviceUse, Placement

__all__ = ["BlockPicture", "DevicePicture", "blocks_now", "devices_now", "free_now", "present_placements"]


@dataclass(frozen=True, slots=True)
class DevicePicture:
    """How full one device is, in bytes.

    Attributes:
        device: torch's name, or "disk".
        name: What it is, for people; "" for the disk.
        limit: What the plan may fill; 0 for the disk.
        total: What it has; 0 for the disk.
        weights: Weights there.
        kv_cache: Keys and values of one context of the blocks that compute there.
        activations: Temporaries at their most.
        streaming: Buffers through which weights pass that do not stay.
        reserved: What the framework itself takes.
        used: All of these.
        unused: What they leave of the limit; negative where they are more.
        free_now: What can be taken at this moment, as the machine says; None where it does not say.
        layers: How many layers are there.
    """

    device: str
    name: str
    limit: int
    total: int
    weights: int
    kv_cache: int
    activations: int
    streaming: int
    reserved: int
    used: int
    unused: int
    free_now: int | None
    layers: int


@dataclass(frozen=True, slots=True)
class BlockPicture:
    """One block, in the order in which they run.

    Attributes:
        block: Its module path.
        kind: "embedding", "layer", "experts", "norm", "head" or "other".
        index: The number of its layer; None for what belongs to none.
        device: Where it is now.
        home: Where it was loaded; another device than `device` where memory ran out since.
        weights: Bytes of its weights.
        kv_cache: Bytes of its keys and values for one context.
        reason: Why it is there.
    """

    block: str
    kind: str
    index: int | None
    device: str
    home: str
    weights: int
    kv_cache: int
    reason: str


def present_placements(loaded: LoadedModel) -> tuple[Placement, ...]:
    """Return the placements of the rung that was loaded, with each block where it is now."""
    now = {block.name: block.device for block in loaded.blocks}
    return tuple(_moved(p, now.get(p.block, p.device)) for p in _as_loaded(loaded))


def devices_now(loaded: LoadedModel) -> tuple[DevicePicture, ...]:
    """Return how full each device is; asks the machine what is free."""
    machine = {device.name: device for device in _devices()}
    return tuple(_device(use, machine.get(use.device)) for use in loaded.plan.use_of(present_placements(loaded)))


def blocks_now(loaded: LoadedModel) -> tuple[BlockPicture, ...]:
    """Return where each block is."""
    numbers = {block.name: block.index for block in loaded.plan.footprint.blocks}
    away = frozenset(loaded.residency.away)
    homes = {p.block: p.device for p in _as_loaded(loaded)}
    return tuple(
        _block(p, numbers, homes[p.block] if p.block in away else p.device) for p in present_placements(loaded)
    )


def free_now(loaded: LoadedModel) -> dict[str, int]:
    """Return the bytes that can be taken now on each device of the plan that the machine knows."""
    wanted = {use.device for use in loaded.plan.devices}
    return {device.name: device.free_bytes for device in _devices() if device.name in wanted}


def _as_loaded(loaded: LoadedModel) -> tuple[Placement, ...]:
    rung = next((rung for rung in loaded.plan.rungs if rung.name == loaded.report.rung), loaded.plan.rung)
    return rung.placements or loaded.plan.placements


def _moved(placement: Placement, device: str) -> Placement:
    if device == placement.device or (device, placement.device) == (CPU, DISK):  # what is on disk runs on the CPU
        return placement
    reason = f"memory ran out on {placement.device}"
    return replace(placement, device=device, reason=reason, streamed=False, through="")


def _device(use: DeviceUse, found: Device | None) -> DevicePicture:
    used = use.weights + use.kv_cache + use.activations + use.streaming + use.reserved
    return DevicePicture(
        device=use.device,
        name=found.description if found is not None else "",
        limit=use.limit,
        total=use.total,
        weights=use.weights,
        kv_cache=use.kv_cache,
        activations=use.activations,
        streaming=use.streaming,
        reserved=use.reserved,
        used=used,
        unused=use.limit - used,
        free_now=found.free_bytes if found is not None else None,
        layers=use.layers,
    )


def _block(placement: Placement, numbers: Mapping[str, int | None], home: str) -> BlockPicture:
    return BlockPicture(
        block=placement.block,
        kind=placement.kind,
        index=numbers.get(placement.block),
        device=placement.device,
        home=home,
        weights=placement.weights,
        kv_cache=placement.kv_cache,
        reason=placement.reason,
    )


def _devices() -> tuple[Device, ...]:
    try:
        machine = probe_machine(with_torch=True)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return ()  # there is no memory left to look with
    return (*machine.accelerators, machine.cpu)
