"""Going down the ladder of a plan: promote block by block, and when memory runs out keep what the next rung keeps.

A rung is looked at before it is tried: where what is free now is less than what it needs, nothing is copied. Nothing is
loaded twice: a block that is already where the next rung wants it stays, and a block that has to leave an
accelerator points back at the checkpoint's map. Recovery happens after the `except` block: while the exception lives,
its frames hold the tensors of the failed copy.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lyra_emergence.errors import DoesNotFitError, is_out_of_memory, without_frames
from lyra_emergence.load_report import Attempt, LoadEvent
from lyra_emergence.runtime.blocks import REST
from lyra_emergence.runtime.memory import allocated_bytes, free_bytes, give_back
from lyra_emergence.runtime.recovery import failing_device
from lyra_emergence.runtime.residency import CPU
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lyra_emergence.placement import Placement
    from lyra_emergence.plan import Plan, Rung
    from lyra_emergence.runtime.blocks import PlacedBlock

__all__ = ["Ladder"]


@dataclass(frozen=True, slots=True)
class _Failure:
    """Memory that ran out, or would: why and where in words, block, device, bytes missing, and torch's error if any."""

    reason: str
    where: str
    block: str
    device: str
    bytes_short: int
    cause: BaseException | None


class Ladder:
    """One descent: the blocks, their plan, the attempts so far, and the placements that were loaded."""

    def __init__(self, blocks: Sequence[PlacedBlock], plan: Plan, on_event: Callable[[LoadEvent], None]) -> None:
        self.attempts: list[Attempt] = []
        self.placements: tuple[Placement, ...] = ()
        self._blocks = {block.name: block for block in blocks}
        self._plan = plan
        self._tell = on_event
        self._accelerators = [budget.device for budget in plan.request.accelerators]

    def descend(self) -> None:
        """Promote the blocks of the first rung that memory allows.

        Raises:
            DoesNotFitError: Memory ran out on the last rung, or no fallback is allowed; every copy is dropped.
            BaseException: Any error that is not about memory, unchanged; every copy is dropped.
        """
        for rung in self._plan.rungs[: self._plan.start]:
            self._pass_over(rung, rung.reason)
        failure: _Failure | None = None
        loaded = False
        try:
            for rung in self._plan.rungs[self._plan.start :]:
                placements = self._placements(rung)
                if not placements:
                    self._pass_over(rung, rung.reason)
                    continue
                failure = self._attempt(rung, placements)
                if failure is not None and failure.device == CPU and failure.cause is not None:
                    # Other rungs ask main memory for the same and more; what it lacked may be back by now.
                    failure = self._attempt(rung, placements)
                if failure is None:
                    self.placements, loaded = placements, True
                    return
        finally:
            if not loaded:
                self.release()
        assert failure is not None  # the plan's start rung was tried
        raise self._refusal(failure) from failure.cause

    def release(self) -> None:
        """Drop every copy of every block."""
        for block in self._blocks.values():
            block.release()
        give_back()

    def _pass_over(self, rung: Rung, reason: str) -> None:
        self.attempts.append(Attempt(rung.name, "passed over", reason))
        self._tell(LoadEvent("rung-passed", f"{rung.name}: passed over, {reason}"))

    def _placements(self, rung: Rung) -> tuple[Placement, ...]:
        if not rung.adaptive:
            return rung.placements if rung.fits else ()
        layers = [p.block for p in self._plan.placements if p.kind == "layer"]
        # Where memory ran out in the middle, what was promoted is what fits; where a look was enough, ask the bytes.
        promoted = sum(self._blocks[name].device != CPU for name in layers)
        limits = {d: allocated_bytes(d) + free_bytes(d) for d in self._accelerators}
        return self._plan.with_layers(promoted or len(layers), limits)

    def _attempt(self, rung: Rung, placements: Sequence[Placement]) -> _Failure | None:
        """Bring every block where `placements` wants it; return what stopped it, if memory did."""
        before, started, copied = self._allocated(), time.perf_counter(), 0
        failure = self._shortfall(placements)
        if failure is None:
            copied, failure = self._promote(placements)
        self.attempts.append(
            Attempt(
                rung=rung.name,
                outcome="loaded" if failure is None else "out of memory",
                reason=failure.reason if failure else "",
                block=failure.block if failure else "",
                bytes_short=failure.bytes_short if failure else 0,
                bytes_copied=copied,
                seconds=time.perf_counter() - started,
                device_bytes_before=before,
                device_bytes_after=self._allocated(),
            )
        )
        if failure is not None:
            self._tell(LoadEvent("rung-failed", f"{rung.name}: out of memory on {failure.device}{failure.where}"))
        return failure

    def _shortfall(self, placements: Sequence[Placement]) -> _Failure | None:
        """Compare what each accelerator would hold with what is free now: a look costs less than a copy that fails."""
        for use in self._plan.use_of(tuple(placements)):
            if use.device not in self._accelerators:
                continue
            held = sum(p.weights for p in self._plan.placements if self._is_on(p.block, use.device))
            available = held + free_bytes(use.device)
            needed = use.weights + use.kv_cache + use.activations
            if needed > available:
                reason = f"needs {format_bytes(needed)}, {format_bytes(available)} is free"
                return _Failure(reason, f", {reason}", REST, use.device, needed - available, None)
        return None

    def _is_on(self, name: str, device: str) -> bool:
        return name in self._blocks and self._blocks[name].device == device

    def _promote(self, placements: Sequence[Placement]) -> tuple[int, _Failure | None]:
        """Copy block by block; return the bytes copied, and what stopped it, if memory did."""
        copied, where, device = 0, REST, CPU
        total = sum(p.weights for p in placements if p.device in self._accelerators)
        stopped: BaseException | None = None
        try:
            for where, device in self._moves(placements):
                moved = self._blocks[where].move_to(device)
                copied += moved
                if moved and where != REST:
                    self._tell(LoadEvent("promote", f"{where} is on {device}", copied, total))
            where = REST
            for device, reserve in self._reserves(placements):
                # Proves that the KV cache and the activations have room, and lets it go again.
                torch.empty(reserve, dtype=torch.uint8, device=device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            stopped = without_frames(error)
        if stopped is None:
            return copied, None
        give_back()
        at = f" at {where}" if where else " for the KV cache and activations"
        reason = (str(stopped) or type(stopped).__name__).splitlines()[0]
        if failing_device(stopped, self._accelerators) == CPU:
            device = CPU  # a conversion before the copy
        return copied, _Failure(reason, at, where, device, self._bytes_short(where, device, placements), stopped)

    def _moves(self, placements: Sequence[Placement]) -> Iterator[tuple[str, str]]:
        """Demote what has to leave its accelerator, which frees what promotions need; then yield (block, device)."""
        known = [p for p in placements if p.block in self._blocks]
        wanted = {p.block: CPU if p.device == "disk" else p.device for p in known}
        layers = [p for p in placements if p.kind == "layer"]
        wanted[REST] = wanted[layers[0].block] if layers else CPU
        leaving = [name for name, device in wanted.items() if self._blocks[name].device not in (CPU, device)]
        if leaving:
            self._tell(LoadEvent("demote", f"{len(leaving)} blocks go back to the checkpoint's map"))
        for name in leaving:
            self._blocks[name].release()
        if leaving:
            give_back()
        # Accelerators first: what is left to the CPU is decided once they are full. Experts that are placed apart from
        # their layers follow these: where memory runs out, they are the ones to stay behind.
        last = {p.block for p in placements if p.kind == "experts"} if _are_apart(placements) else set()
        for name in sorted(wanted, key=lambda name: (wanted[name] == CPU, name in last)):
            yield name, wanted[name]

    def _reserves(self, placements: Sequence[Placement]) -> Iterator[tuple[str, int]]:
        for use in self._plan.use_of(tuple(placements)):
            reserve = use.kv_cache + use.activations
            if use.device in self._accelerators and reserve:
                yield use.device, reserve

    def _bytes_short(self, block: str, device: str, placements: Sequence[Placement]) -> int:
        weights = sum(p.weights for p in placements if p.block == block)
        return max(0, weights + dict(self._reserves(placements)).get(device, 0) - free_bytes(device))

    def _allocated(self) -> dict[str, int]:
        return {device: allocated_bytes(device) for device in self._accelerators}

    def _refusal(self, failure: _Failure) -> DoesNotFitError:
        free = free_bytes(failure.device)
        hint = 'close what else uses the memory, shorten the context, or set "load_in_4bit": true'
        if not any(rung.name == "cpu" for rung in self._plan.rungs):
            hint = 'set "enable_progressive_fallback": true, or a lower "max_memory"'
        message = f"out of memory on {failure.device} while loading '{self._plan.model}': {failure.reason}"
        needed = free + failure.bytes_short
        return DoesNotFitError(message, needed=needed, available=free, device=failure.device, hint=hint)


def _are_apart(placements: Sequence[Placement]) -> bool:
    """Return whether some experts are on another device than their layer, which stands before them."""
    layer = ""
    for placement in placements:
        if placement.kind == "layer":
            layer = placement.device
        elif placement.kind == "experts" and placement.device != layer:
            return True
    return False
