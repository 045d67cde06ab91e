"""Filling devices: which block goes where, and why.

Invariants:
- every block has exactly one device; layers that no map pins are contiguous and never return to an earlier device;
- as many layers as fit in that order are on accelerators, and what room they leave goes to what a token reads most of;
- where not all fits, and a token reads no more than half of a mixture's experts, these leave the accelerators before
  the rest of their layers does;
- on an accelerator, weights + KV cache + activations + reserved bytes never exceed the budget;
- a tied block shares the device of the block that holds its weight, unless a custom map parts them;
- only blocks in their stored form are left on disk.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lyra_emergence.placement import CPU, DISK, Placement, measure_use

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lyra_emergence.budgets import Budget, Request
    from lyra_emergence.footprint import BlockFootprint, Footprint

__all__ = ["fast_layers", "place", "slow_bytes"]

_FEW_EXPERTS = 0.5
"""Share of a mixture's experts that a token reads, at most, where they are placed after the layers."""


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
    placed = _fill(_Filler(footprint, budgets), request, layer_limit)
    if budgets and slow_bytes(placed, footprint) and _can_part(footprint):
        ways = [
            _fill(_Filler(footprint, budgets, apart=True), request, layer_limit, experts_first=first)
            for first in (False, True)
        ]
        placed = min((placed, *ways), key=lambda way: (-fast_layers(way), slow_bytes(way, footprint)))
    return _spill_to_disk(placed, footprint, request.cpu)


def slow_bytes(placements: Sequence[Placement], footprint: Footprint) -> float:
    """Return the bytes of weights that a token reads from main memory or the disk: what its time goes into."""
    blocks = {block.name: block for block in footprint.blocks}
    slow = [p for p in placements if p.device in (CPU, DISK) and p.kind not in ("embedding", "other")]
    return sum(_read(blocks[p.block], blocks) * blocks[p.block].active_share for p in slow)


def fast_layers(placements: Sequence[Placement]) -> int:
    """Return how many layers are on accelerators."""
    return sum(p.kind == "layer" and p.device not in (CPU, DISK) for p in placements)


def _read(block: BlockFootprint, blocks: Mapping[str, BlockFootprint]) -> int:
    return block.weights + (blocks[block.tied_to].weights if block.tied_to else 0)


def _can_part(footprint: Footprint) -> bool:
    """Return whether experts are worth less fast memory than the rest of their layers: bytes that few tokens read."""
    return any(block.kind == "experts" and block.active_share <= _FEW_EXPERTS for block in footprint.blocks)


def _fill(
    filler: _Filler, request: Request, layer_limit: int | None, *, experts_first: bool = False
) -> tuple[Placement, ...]:
    if layer_limit is None:
        filler.pin(request.pinned)
        filler.fill_layers()
        steps = [filler.fill_head, filler.fill_experts]
        for step in reversed(steps) if experts_first else steps:
            step()
        filler.fill_lookups()
    else:
        filler.fill_embeddings()
        if not filler.fill_layers(layer_limit):
            filler.clear()  # embeddings alone gain nothing there
        filler.fill_experts()
    return filler.finish(layer_limit)


class _Filler:
    """One pass over the blocks, with what is left on each accelerator.

    Args:
        footprint: The blocks.
        accelerators: What may be filled.
        apart: Whether a layer may be placed without its experts.
    """

    def __init__(self, footprint: Footprint, accelerators: Sequence[Budget], *, apart: bool = False) -> None:
        self._footprint = footprint
        self._accelerators = accelerators
        self._apart = apart
        self._layers = {block.index: block.name for block in self._of_kind("layer")}
        self._experts: dict[int | None, list[BlockFootprint]] = {}
        for block in self._of_kind("experts"):
            self._experts.setdefault(block.index, []).append(block)
        self.clear()

    def clear(self) -> None:
        """Take everything back."""
        footprint, accelerators = self._footprint, self._accelerators
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
            self._try([block], list(self._left)[:1], "the embeddings feed the first layer")

    def fill_layers(self, limit: int | None = None) -> int:
        """Fill accelerator after accelerator with consecutive layers; the first that fits nowhere ends it.

        Returns:
            How many layers this put there.
        """
        devices, filled = list(self._left), 0
        for count, block in enumerate(self._of_kind("layer")[:limit]):
            if block.name in self._placed:
                continue
            unit = [block] if self._apart else [block, *self._unplaced_experts(block)]
            while devices and not self._try(unit, devices[:1], f"fits, layer {count + 1} in order"):
                devices.pop(0)
            if not devices:
                break
            filled += 1
        return filled

    def fill_experts(self) -> None:
        """Give what is left to experts whose layers are on accelerators: beside their layer, else on another one."""
        for layer in self._of_kind("layer"):
            device = self._placed.get(layer.name, ("", ""))[0]
            if device not in self._left:
                continue
            order = [device, *(other for other in self._left if other != device)]
            for block in self._unplaced_experts(layer):
                self._try([block], order, "fits, after all layers had their place")

    def _unplaced_experts(self, layer: BlockFootprint) -> list[BlockFootprint]:
        return [block for block in self._experts.get(layer.index, ()) if block.name not in self._placed]

    def fill_head(self) -> None:
        """Give what is left to norm and head, which a token reads whole.

        Beside the last layer, the norm does not wait for the head; behind a layer on the CPU, both come or neither, so
        that the hidden state crosses once.
        """
        fast = [device for device in self._layer_devices() if device in self._left]
        if not fast:
            return
        order = [fast[-1], *(device for device in self._left if device != fast[-1])]
        norms, heads = self._of_kind("norm"), self._of_kind("head")
        units = [[*norms, *heads]] if self._awaits_layers() else [[block] for block in (*norms, *heads)]
        for unit in units:
            self._try(unit, order, "fits, beside the last layer there")

    def fill_lookups(self) -> None:
        """Give what is left to embeddings and the like, once nothing else is left to place."""
        if self._awaits_layers():
            return
        for block in (*self._of_kind("embedding"), *self._of_kind("other")):
            self._try([block], list(self._left), "fits; one row is read per token, so it comes last")

    def finish(self, layer_limit: int | None) -> tuple[Placement, ...]:
        """Send what is not placed to the CPU, tied blocks to their weights, and return all in execution order."""
        for block in self._footprint.blocks:
            if block.tied_to in self._placed and block.name not in self._placed:
                self._take(block, self._placed[block.tied_to or ""][0], f"shares the weights of {block.tied_to}")
        fast = not self._awaits_layers() and any(device in self._left for device in self._layer_devices())
        for block in self._footprint.blocks:
            if block.name not in self._placed:
                self._take(block, CPU, self._why_cpu(block, fast=fast, layer_limit=layer_limit))
        return tuple(self._placement(block) for block in self._footprint.blocks)

    def _why_cpu(self, block: BlockFootprint, *, fast: bool, layer_limit: int | None) -> str:
        if not self._left:
            return "no accelerator to use"
        if block.kind == "experts" and self._apart and self._is_fast_layer(block.index):
            return "no accelerator has room left; a token reads few of its experts, so layers go first"
        if layer_limit is not None and block.kind in ("layer", "experts", "norm", "head"):
            return f"at most {layer_limit} layers stay on accelerators"
        if not fast and block.kind in ("norm", "head"):
            return "runs after the last layer, which is on the CPU"
        if not fast and block.kind == "embedding":
            return "one row is read per token, so layers go first"
        return "no accelerator has room left"

    def _is_fast_layer(self, index: int | None) -> bool:
        return self._placed.get(self._layers.get(index, ""), ("", ""))[0] in self._left

    def _layer_devices(self) -> list[str | None]:
        """Return the device of each layer, None where it awaits its place."""
        return [self._placed.get(name, (None, ""))[0] for name in self._layers.values()]

    def _awaits_layers(self) -> bool:
        return None in self._layer_devices()

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

    def _try(self, unit: Sequence[BlockFootprint], devices: Iterable[str], reason: str) -> bool:
        """Put all of `unit` on the first of `devices` that has room for it; what is placed already stays there."""
        # A tied block goes where its weight goes.
        shared = {block.tied_to: f"; shared by {block.name}" for block in unit if block.tied_to is not None}
        holders = dict.fromkeys(block.tied_to or block.name for block in unit)
        waiting = [self._blocks[name] for name in holders if name not in self._placed]
        for device in devices if waiting else ():
            if self._cost(waiting, device) <= self._left[device]:
                for block in waiting:
                    self._take(block, device, reason + shared.get(block.name, ""))
                return True
        return not waiting

    def _cost(self, unit: Sequence[BlockFootprint], device: str) -> int:
        before = self._runs.get(device, frozenset())
        busy = self._busy(before.union(*map(self._part, unit))) - self._busy(before)
        return sum(self._weights_on(block, device) + block.kv_cache for block in unit) + busy

    def _part(self, block: BlockFootprint) -> frozenset[str]:
        parts = {block.kind} & {"embedding", "layer", "experts"}
        return frozenset(parts | ({"head"} if block.name in self._logits else set()))

    def _busy(self, parts: frozenset[str]) -> int:
        # As if no cache were there yet to be filled: how much of it comes here is not known before the end.
        return self._footprint.activations.of(**dict.fromkeys(parts, True))

    def _take(self, block: BlockFootprint, device: str, reason: str) -> None:
        if device in self._left:
            self._left[device] -= self._cost([block], device)
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
    """Return the CPU's blocks that may stay in the file: lookups, experts and layers from the last, then the rest."""
    mapped = {block.name for block in footprint.blocks if block.mapped}
    shared = {block.tied_to for block in footprint.blocks}
    here = [p for p in reversed(placed) if p.device == CPU and p.block in mapped and p.weights > 0]
    rank = {p.block: {"experts": 1, "layer": 2}.get(p.kind, 3) for p in here}
    rank |= {p.block: 0 for p in here if p.kind == "embedding" and p.block not in shared}
    return sorted(here, key=lambda p: rank[p.block])
