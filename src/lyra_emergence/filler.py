"""One pass over a model's blocks that puts them on devices, and says of each why it is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lyra_emergence.placement import CPU, DISK, Placement

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lyra_emergence.budgets import Budget
    from lyra_emergence.footprint import BlockFootprint, Footprint

__all__ = ["Filler"]


class Filler:
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
        """Put blocks where a map says, and with them what they share weights with."""
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
        """Put the embeddings on the first accelerator, as the documented map of the fallback does."""
        for block in self._of_kind("embedding"):
            self._try([block], list(self._left)[:1], "the embeddings feed the first layer")

    def keep_head(self, device: str) -> None:
        """Put the head on an accelerator before anything else is there; the norm comes along later."""
        for block in self._of_kind("head"):
            if block.name not in self._placed:
                self._try([block], [device], "fits, with the layers that fit beside it")

    def fill_layers(self, limit: int | None = None, *, most: Mapping[str, int] | None = None) -> int:
        """Fill accelerator after accelerator with consecutive layers; the first that fits nowhere ends it.

        Args:
            limit: How many layers at most.
            most: How many an accelerator gets at most, where not all that it has room for.

        Returns:
            How many layers this put there.
        """
        devices, filled = list(self._left), 0
        room = {device: (most or {}).get(device, len(self._layers)) for device in devices}
        for count, block in enumerate(self._of_kind("layer")[:limit]):
            if block.name in self._placed:
                continue
            unit = [block] if self._apart else [block, *self._unplaced_experts(block)]
            reason = f"fits, layer {count + 1} in order"
            while devices and not (room[devices[0]] and self._try(unit, devices[:1], reason)):
                devices.pop(0)
            if not devices:
                break
            room[devices[0]] -= 1
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

        Beside the last layer, the norm does not wait for the head; behind a layer or experts on the CPU, both come or
        neither, so that the hidden state crosses once.
        """
        fast = [device for device in self._layer_devices() if device in self._left]
        if not fast:
            return
        order = [fast[-1], *(device for device in self._left if device != fast[-1])]
        norms, heads = self._of_kind("norm"), self._of_kind("head")
        together = self._apart or self._awaits_layers()
        units = [[*norms, *heads]] if together else [[block] for block in (*norms, *heads)]
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
