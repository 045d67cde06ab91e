"""Going down the ladder of a plan: promote block by block, and when memory runs out keep what the next rung keeps.

Nothing is loaded twice: a block that is already where the next rung wants it stays, and a block that has to leave an
accelerator points back at the checkpoint's map. Recovery happens after the `except` block: while the exception lives,
its frames hold the tensors of the failed copy.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from lyra_emergence.errors import DoesNotFitError, is_out_of_memory, without_frames
from lyra_emergence.load_report import Attempt, LoadEvent, Outcome
from lyra_emergence.runtime.blocks import REST
from lyra_emergence.runtime.memory import allocated_bytes, free_bytes, give_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lyra_emergence.placement import Placement
    from lyra_emergence.plan import Plan, Rung
    from lyra_emergence.runtime.blocks import PlacedBlock

__all__ = ["Ladder"]

CPU = "cpu"


class Ladder:
    """One descent: the blocks, their plan, and the attempts so far."""

    def __init__(self, blocks: Sequence[PlacedBlock], plan: Plan, on_event: Callable[[LoadEvent], None]) -> None:
        self.attempts: list[Attempt] = []
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
        failure: BaseException | None = None
        loaded = False
        try:
            for rung in self._plan.rungs[self._plan.start :]:
                placements = self._placements(rung)
                if not placements:
                    self._pass_over(rung, rung.reason)
                    continue
                failure = self._attempt(rung, placements)
                if failure is None:
                    loaded = True
                    return
        finally:
            if not loaded:
                self.release()
        raise self._refusal() from failure

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
        kept = sum(self._blocks[name].device != CPU for name in layers)
        limits = {d: allocated_bytes(d) + free_bytes(d) for d in self._accelerators}
        return self._plan.with_layers(kept, limits) if kept else ()

    def _attempt(self, rung: Rung, placements: Sequence[Placement]) -> BaseException | None:
        """Bring every block where `placements` wants it; return the out-of-memory error that stopped it, if any."""
        before, started, copied = self._allocated(), time.perf_counter(), 0
        failure: BaseException | None = None
        where = REST
        total = sum(p.weights for p in placements if p.device in self._accelerators)
        try:
            for where, device in self._moves(placements):
                moved = self._blocks[where].move_to(device)
                copied += moved
                if moved and where != REST:
                    self._tell(LoadEvent("promote", f"{where} is on {device}", copied, total))
            where = REST
            self._prove_reserve(placements)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = without_frames(error)
        if failure is not None:
            give_back()
        outcome: Outcome = "loaded" if failure is None else "out of memory"
        self.attempts.append(
            Attempt(
                rung.name,
                outcome,
                str(failure or "").split("\n")[0],
                where,
                self._bytes_short(where, placements) if failure else 0,
                copied,
                time.perf_counter() - started,
                before,
                self._allocated(),
            )
        )
        if failure is not None:
            at = f" at {where}" if where else " for the KV cache and activations"
            self._tell(LoadEvent("rung-failed", f"{rung.name}: out of memory{at}"))
        return failure

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
        # Accelerators first: what is left to the CPU is decided once they are full.
        for name in sorted(wanted, key=lambda name: wanted[name] == CPU):
            yield name, wanted[name]

    def _prove_reserve(self, placements: Sequence[Placement]) -> None:
        """Allocate what the KV cache and the activations will take, and let it go again."""
        for use in self._plan.use_of(tuple(placements)):
            reserve = use.kv_cache + use.activations
            if use.device in self._accelerators and reserve:
                torch.empty(reserve, dtype=torch.uint8, device=use.device)

    def _bytes_short(self, block: str, placements: Sequence[Placement]) -> int:
        chosen = next((p for p in placements if p.block == block), None)
        device = chosen.device if chosen else next(iter(self._accelerators), CPU)
        use = next((u for u in self._plan.use_of(tuple(placements)) if u.device == device), None)
        reserve = use.kv_cache + use.activations if use else 0
        needed = reserve + (chosen.weights if chosen else 0)
        return max(0, needed - free_bytes(device))

    def _allocated(self) -> dict[str, int]:
        return {device: allocated_bytes(device) for device in self._accelerators}

    def _refusal(self) -> DoesNotFitError:
        failed = next(attempt for attempt in reversed(self.attempts) if attempt.outcome == "out of memory")
        device = next(iter(self._accelerators), CPU) if failed.rung != "cpu" else CPU
        free = free_bytes(device)
        allowed = any(rung.name == "cpu" for rung in self._plan.rungs)
        hint = 'close what else uses the memory, shorten the context, or set "load_in_4bit": true'
        if not allowed:
            hint = 'set "enable_progressive_fallback": true, or a lower "max_memory"'
        message = f"out of memory on {device} while loading '{self._plan.model}': {failed.reason}"
        return DoesNotFitError(message, needed=free + failed.bytes_short, available=free, device=device, hint=hint)
