"""Filling devices with blocks: which block goes where, how many bytes it takes there, and why.

Invariants:
- every block has exactly one device; layers that no map pins are contiguous and never return to an earlier device;
- as many layers as fit in that order are on accelerators;
- on an accelerator, weights + KV cache + activations + reserved bytes never exceed the budget;
- a tied block shares the device of the block that holds its weight, unless a custom map parts them;
- only blocks in their stored form are left on disk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lyra_emergence.errors import DoesNotFitError
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lyra_emergence.budgets import Budget, Request
    from lyra_emergence.footprint import BlockFootprint, Footprint

__all__ = ["CPU", "DISK", "DeviceUse", "Placement", "measure_use", "place"]

CPU, DISK = "cpu", "disk"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one block goes.

    Attributes:
        block: The block's module path.
        kind: "embedding", "layer", "norm", "head" or "other".
        device: torch's device name, or "disk" for weights that are read from the file as they are used.
        weights: Bytes of its weights there.
        kv_cache: Bytes of its keys and values there.
        reason: Why there.
    """

    block: str
    kind: str
    device: str
    weights: int
    kv_cache: int
    reason: str

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
        reserved: What the framework itself takes.
        layers: How many layers are there.
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

    @property
    def used(self) -> int:
        """Everything together, in bytes."""
        return self.weights + self.kv_cache + self.activations + self.reserved

    @property
    def unused(self) -> int:
        """Bytes of the limit that stay free; negative where the plan does not fit."""
        return self.limit - self.used


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
    filler = _Filler(footprint, budgets)
    if layer_limit is None:
        filler.pin(request.pinned)
        filler.fill_layers(len(footprint.blocks))
        filler.fill_rest()
    else:
        filler.fill_embeddings()
        if not filler.fill_layers(layer_limit):
            filler = _Filler(footprint, budgets)  # embeddings alone gain nothing there
    return _spill_to_disk(filler.finish(layer_limit), footprint, request.cpu)


class _Filler:
    """One pass over the blocks, with what is left on each accelerator."""

    def __init__(self, footprint: Footprint, accelerators: Sequence[Budget]) -> None:
        self._footprint = footprint
        self._blocks = {block.name: block for block in footprint.blocks}
        self._left = {budget.device: budget.limit - budget.reserved for budget in accelerators}
        # What runs on each device so far, as the names that `Activations.of` takes.
        self._runs: dict[str, frozenset[str]] = {}
        self._placed: dict[str, tuple[str, str]] = {}
        # The block that makes logits where it is: the head, or what holds its weight and takes it along.
        self._logits = {block.tied_to or block.name for block in footprint.blocks if block.kind == "head"}

    def pin(self, pinned: Mapping[str, str]) -> None:
        devices = dict(pinned)
        for block in self._footprint.blocks:
            pair = (block.name, block.tied_to)
            if block.tied_to is None or not any(name in devices for name in pair):
                continue
            device = devices.get(block.name) or devices[block.tied_to]
            if device != DISK or self._blocks[block.tied_to].mapped:
                devices.setdefault(block.tied_to, device)
            devices.setdefault(block.name, device)
            if block.kind == "head" and devices.get(block.tied_to) != devices[block.name]:
                self._logits = {block.name}
        # Holders first: whether a tied block needs a copy of its own depends on where they are.
        for name in sorted(devices, key=lambda name: self._blocks[name].tied_to is not None):
            self._take(self._blocks[name], devices[name], "the device map says so")

    def fill_embeddings(self) -> None:
        for block in self._of_kind("embedding"):
            self._try(block, list(self._left)[:1], "the embeddings feed the first layer")

    def fill_layers(self, limit: int) -> int:
        """Fill accelerator after accelerator with consecutive layers; the first that fits nowhere ends it.

        Returns:
            How many layers this put there.
        """
        devices, filled = list(self._left), 0
        for count, block in enumerate(self._of_kind("layer")[:limit]):
            if block.name in self._placed:
                continue
            while devices and not self._try(block, devices[:1], f"fits, layer {count + 1} in order"):
                devices.pop(0)
            if not devices:
                break
            filled += 1
        return filled

    def fill_rest(self) -> None:
        """Give what is left to norm, head and embeddings, once no layer is left to place."""
        last = self._last_fast_layer()
        if last is None:
            return
        order = [last, *(device for device in self._left if device != last)]
        for block in (*self._of_kind("norm"), *self._of_kind("head")):
            self._try(block, order, "fits, beside the last layer")
        for block in (*self._of_kind("embedding"), *self._of_kind("other")):
            self._try(block, list(self._left), "fits; one row is read per token, so it comes last")

    def finish(self, layer_limit: int | None) -> tuple[Placement, ...]:
        """Send what is not placed to the CPU, tied blocks to their weights, and return all in execution order."""
        for block in self._footprint.blocks:
            if block.tied_to in self._placed and block.name not in self._placed:
                self._take(block, self._placed[block.tied_to or ""][0], f"shares the weights of {block.tied_to}")
        fast = self._last_fast_layer() is not None
        for block in self._footprint.blocks:
            if block.name not in self._placed:
                self._take(block, CPU, self._why_cpu(block, fast=fast, layer_limit=layer_limit))
        return tuple(self._placement(block) for block in self._footprint.blocks)

    def _why_cpu(self, block: BlockFootprint, *, fast: bool, layer_limit: int | None) -> str:
        if not self._left:
            return "no accelerator to use"
        if layer_limit is not None and block.kind in ("layer", "norm", "head"):
            return f"at most {layer_limit} layers stay on accelerators"
        if not fast and block.kind in ("norm", "head"):
            return "runs after the last layer, which is on the CPU"
        if not fast and block.kind == "embedding":
            return "one row is read per token, so layers go first"
        return "no accelerator has room left"

    def _last_fast_layer(self) -> str | None:
        """Return the accelerator of the last layer on one; None where there is none, or a layer awaits its place."""
        devices = [self._placed.get(block.name, ("", ""))[0] for block in self._of_kind("layer")]
        fast = [device for device in devices if device in self._left]
        return fast[-1] if fast and all(devices) else None

    def _placement(self, block: BlockFootprint) -> Placement:
        device, reason = self._placed[block.name]
        return Placement(block.name, block.kind, device, self._weights_on(block, device), block.kv_cache, reason)

    def _weights_on(self, block: BlockFootprint, device: str) -> int:
        # Parted from the block that holds its weight, a tied block needs a copy of its own.
        if block.tied_to is None or self._placed.get(block.tied_to, (device, ""))[0] == device:
            return block.weights
        return self._blocks[block.tied_to].weights

    def _of_kind(self, kind: str) -> list[BlockFootprint]:
        return [block for block in self._footprint.blocks if block.kind == kind]

    def _try(self, block: BlockFootprint, devices: Iterable[str], reason: str) -> bool:
        if block.name in self._placed:
            return True
        if block.tied_to is not None:
            # It goes where its weight goes.
            return self._try(self._blocks[block.tied_to], devices, f"{reason}; shared by {block.name}")
        for device in devices:
            if self._cost(block, device) <= self._left[device]:
                self._take(block, device, reason)
                return True
        return False

    def _cost(self, block: BlockFootprint, device: str) -> int:
        before = self._runs.get(device, frozenset())
        busy = self._busy(before | self._part(block)) - self._busy(before)
        return self._weights_on(block, device) + block.kv_cache + busy

    def _part(self, block: BlockFootprint) -> frozenset[str]:
        parts = {block.kind} & {"embedding", "layer"}
        return frozenset(parts | ({"head"} if block.name in self._logits else set()))

    def _busy(self, parts: frozenset[str]) -> int:
        # As if no cache were there yet to be filled: how much of it comes here is not known before the end.
        return self._footprint.activations.of(**dict.fromkeys(parts, True))

    def _take(self, block: BlockFootprint, device: str, reason: str) -> None:
        if device in self._left:
            self._left[device] -= self._cost(block, device)
        self._runs[device] = self._runs.get(device, frozenset()) | self._part(block)
        self._placed[block.name] = (device, reason)


def _spill_to_disk(placed: tuple[Placement, ...], footprint: Footprint, cpu: Budget) -> tuple[Placement, ...]:
    """Leave CPU blocks in the file until the rest fits main memory."""
    over = -measure_use(placed, footprint, (cpu,))[0].unused
    spilled: set[str] = set()
    for placement in _spill_order(placed, footprint):
        if over <= 0:
            break
        spilled.add(placement.block)
        over -= placement.weights
    if not spilled:
        return placed
    tied = {block.name: block.tied_to for block in footprint.blocks}
    spilled |= {p.block for p in placed if p.device == CPU and p.weights == 0 and tied[p.block] in spilled}
    reason = f"main memory cannot hold it ({cpu.reason}): read from the file as it is used"
    return tuple(replace(p, device=DISK, reason=reason) if p.block in spilled else p for p in placed)


def _spill_order(placed: Sequence[Placement], footprint: Footprint) -> list[Placement]:
    """Return the CPU's blocks that may stay in the file: lookups first, then layers from the last, then the rest."""
    mapped = {block.name for block in footprint.blocks if block.mapped}
    shared = {block.tied_to for block in footprint.blocks}
    here = [p for p in reversed(placed) if p.device == CPU and p.block in mapped and p.weights > 0]
    rank = {p.block: 1 if p.kind == "layer" else 2 for p in here}
    rank |= {p.block: 0 for p in here if p.kind == "embedding" and p.block not in shared}
    return sorted(here, key=lambda p: rank[p.block])


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
    parts = {kind: True for kind in ("embedding", "layer", "head") if any(p.kind == kind for p in runs)}
    kv_cache = sum(p.kv_cache for p in runs)
    activations = footprint.activations.of(**parts, kv_cache=kv_cache)
    if device == CPU and "layer" in parts:
        # Packing is over before there is a cache.
        activations = max(activations, footprint.packing - kv_cache)
    return DeviceUse(
        device=device,
        limit=budget.limit if budget else 0,
        total=budget.total if budget else 0,
        weights=sum(p.weights for p in here) + (_homes(placements, blocks) if device == CPU else 0),
        kv_cache=kv_cache,
        activations=activations,
        reserved=budget.reserved if budget and runs else 0,
        layers=sum(p.kind == "layer" for p in here),
        mapped=sum(p.weights for p in here if device in (CPU, DISK) and blocks[p.block].mapped),
    )


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
        f"{format_bytes(use.activations)}), which has {format_bytes(use.limit)}"
    )
    return DoesNotFitError(message, needed=use.used, available=use.limit, device=use.device, hint=hint)
