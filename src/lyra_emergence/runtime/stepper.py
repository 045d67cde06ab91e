"""Running a model step by step, and going on where memory ran out.

When a step runs out of memory, its caches are cut back to what they held before it, or dropped and made anew from the
tokens; then less is asked of the device that fell short, one remedy after the other: what the frameworks hold on to is
given back; a prompt runs in shorter chunks; blocks leave for the CPU, their caches with them; the caches of what is
left go to main memory; the last blocks follow. No token is lost, and the step is taken again. Recovery happens after
the `except` block: while the exception lives, its frames hold the tensors of the failed step.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lyra_emergence.errors import AbandonedError, DoesNotFitError, is_out_of_memory, lost_onednn, without_frames
from lyra_emergence.load_report import LoadEvent
from lyra_emergence.runtime.compute_threads import one_thread, settle_for_fewer_threads
from lyra_emergence.runtime.headroom import Headroom
from lyra_emergence.runtime.held_caches import HeldCaches
from lyra_emergence.runtime.kv_cache import can_move
from lyra_emergence.runtime.memory import give_back, keep_freed_memory, return_freed_memory, stop_using_onednn
from lyra_emergence.runtime.recovery import Recovery, failing_device
from lyra_emergence.runtime.residency import CPU
from lyra_emergence.runtime.scratch import keeping_scratch
from lyra_emergence.runtime.stepping import caches_of, feeding_of
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.runtime.prompt_cache import PromptCache

__all__ = ["Recovery", "Stepper"]

T = TypeVar("T")

_SHORTEST_CHUNK = 64
"""Tokens of a prompt that run at once at least: shorter chunks save little and cost a pass each."""
_CHUNK_STEP = 4
_MOST_NAMES = 2


class Stepper:
    """Runs the model forward and keeps its caches between steps.

    Args:
        loaded: The model.
        batch: Sequences that run together, all of the same tokens.
        most_tokens: Tokens of prompt and answer that are to come at most; the context by default.
        kept: What an earlier answer of the same conversation left, and where this one leaves what it has.
        abandoned: Asked before every pass whether nobody waits for the answer any more.

    Attributes:
        cached: What was computed so far.
        reused: Tokens of the prompt that `kept` held.
        recoveries: The times that memory ran out, in order.
        warnings: What main memory being short may come to, a line each.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        batch: int = 1,
        *,
        most_tokens: int | None = None,
        kept: PromptCache | None = None,
        abandoned: Callable[[], bool] | None = None,
    ) -> None:
        self.reused = 0
        self.recoveries: list[Recovery] = []
        self.warnings: list[str] = []
        self._loaded = loaded
        self._batch = batch
        self._most_tokens = min(most_tokens or loaded.context_length, loaded.context_length)
        self._seen: list[int] = []
        feeding = feeding_of(loaded.model, loaded.plan.footprint.chunk)
        self._last_only = feeding.arguments
        self._divides = feeding.chunk is not None
        config, context = loaded.model.config, loaded.context_length
        self.cached = HeldCaches(config, context, self._most_tokens, batch, known=self._divides)
        self._chunk = feeding.chunk or loaded.context_length
        self._failures = 0
        self._headroom = Headroom(loaded.residency, batch, min(loaded.plan.footprint.chunk, loaded.context_length))
        self._kept = kept
        self._abandoned = abandoned or bool
        self._ran_on = loaded.residency.accelerators
        with loaded.step_lock:
            loaded.residency.give_up_kept(kept)
            loaded.residency.add(self.cached)
            if kept is not None:
                loaded.residency.add(kept)

    def make_room(self) -> None:
        """Bring blocks back where memory is free again, or send blocks away where the tokens to come want more.

        Raises:
            DoesNotFitError: As `prefill`.
        """
        self.surviving(self._make_room)

    def _make_room(self) -> None:
        with self._loaded.step_lock:
            back = self._loaded.residency.climb()
            if back:
                self._tell_climb(back)
            for device in self._loaded.residency.accelerators:
                self._make_room_on(device)
            if self._loaded.residency.uses_main_memory:
                self._heed_main_memory()

    def _make_room_on(self, device: str) -> None:
        residency = self._loaded.residency
        if not residency.shortfall(device):
            return
        give_back()
        short = residency.shortfall(device)
        if short and self._loaded.config.enable_progressive_fallback:
            moved = residency.step_down(device, short)
            self._loaded.tell(LoadEvent("demote", f"{_blocks(moved)} left {device}, which has too little free"))

    def _heed_main_memory(self) -> None:
        """Shorten the chunks of the prompt to come where main memory is short; say so, and where it may not do."""
        chunk = min(self._chunk, self._most_tokens)
        short, left = self._headroom.short_by(chunk)
        if not short:
            return
        while short and self._divides and chunk > _SHORTEST_CHUNK:
            chunk = max(_SHORTEST_CHUNK, chunk // _CHUNK_STEP)
            short, left = self._headroom.short_by(chunk)
        self._chunk = min(self._chunk, chunk)
        told = f"main memory has {format_bytes(left)} left"
        if short:
            told += f", {format_bytes(short)} less than this answer may want: it may end early"
        else:
            told += f": the prompt runs in chunks of {self._chunk} tokens"
        self.warnings.append(told)
        self._loaded.tell(LoadEvent("note", told))

    def prefill(self, ids: Sequence[int]) -> torch.Tensor:
        """Run the prompt and return the last token's logits, (batch, vocab).

        Raises:
            DoesNotFitError: Memory ran out and nothing is left to be done about it.
            AbandonedError: Nobody waits for it any more.
        """
        if self._kept is not None and not self._seen:
            with self._loaded.step_lock:
                self.cached.caches, self.cached.held = self._kept.take(ids)
                self.reused = self.cached.held
        return self._advance(ids)

    def step(self, token: int) -> torch.Tensor:
        """Run one token and return its logits, (batch, vocab).

        Raises:
            DoesNotFitError: As `prefill`.
            AbandonedError: As `prefill`.
        """
        return self._advance([token])

    def close(self) -> None:
        """Drop the caches and return their memory, or leave them to the next answer of the conversation."""
        with self._loaded.step_lock:
            # A step that was broken off left more in some layers than in others.
            held = self.cached
            if self._kept is not None and held.caches and not held.offloaded and held.cut_back():
                self._kept.keep(self._seen[: held.held], held.caches)
            held.drop()
            if self._loaded.compiled is not None:
                self._loaded.compiled.release(self)
            self._loaded.residency.end_step()
        return_freed_memory()

    def surviving(self, action: Callable[[], T]) -> T:
        """Return what `action` returns; where memory runs out, take the next remedy and try again.

        Raises:
            DoesNotFitError: As `prefill`.
        """
        while True:
            try:
                result = action()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = without_frames(error)
            else:
                self._failures = 0
                return result
            stopped = False
            try:
                self._recover(failure)
            except DoesNotFitError:
                raise
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                stopped = True  # there is not even enough to recover with
            if stopped:
                self._kept = None
                self.close()
                raise self._refusal(CPU, _reason(failure)) from failure

    def _advance(self, ids: Sequence[int]) -> torch.Tensor:
        self._seen += ids
        return self.surviving(self._catch_up)

    def _catch_up(self) -> torch.Tensor:
        """Run the tokens that the caches do not hold yet."""
        logits: torch.Tensor | None = None
        long = len(self._seen) - self.cached.held > 1
        if long:
            return_freed_memory()
        with keeping_scratch():
            while self.cached.held < len(self._seen):
                if self._abandoned():
                    raise AbandonedError("nobody waits for this answer any more")
                logits = self._run()
        if long:
            keep_freed_memory()
        assert logits is not None  # there is at least the token that was just given
        return logits

    @torch.inference_mode()
    def _run(self) -> torch.Tensor:
        with self._loaded.step_lock:
            if settle_for_fewer_threads():
                self._loaded.tell(LoadEvent("note", "no more threads can be started: one computes"))
            self._climb_now_and_then()
            self._ran_on = self._loaded.residency.accelerators
            compiled = self._run_compiled()
            if compiled is not None:
                return compiled
            # Without caches (a model that returns none) everything so far runs again.
            held = self.cached
            end = min(len(self._seen), held.held + self._chunk)
            tokens = self._seen[held.held if held.caches else 0 : end]
            self._headroom.look(len(tokens), end - len(tokens))
            inputs = torch.tensor([tokens] * self._batch, device=self._loaded.entry_device)  # (batch, tokens)
            stream = self._loaded.residency.stream
            wanted = stream is not None and stream.is_slower(len(tokens))
            with one_thread(wanted=wanted), self._guests(len(tokens)) as caches:
                output = self._loaded.model(input_ids=inputs, use_cache=True, **caches, **self._last_only)
            row: torch.Tensor = output.logits[:, -1].float()  # (batch, vocab)
            first = not held.held
            held.caches, held.held = caches_of(output), end
            if first:
                held.give_room(self._loaded.residency.layers_on(CPU))
            return row

    def _run_compiled(self) -> torch.Tensor | None:
        """Run one token by the compiled step and return its logits, (batch, vocab); None where there is none for it."""
        compiled, held = self._loaded.compiled, self.cached
        if compiled is None or not held.held or len(self._seen) - held.held != 1:
            return None
        device = compiled.device_for(self)
        if device is None:
            return None
        if not held.is_static and not self._loaded.residency.has_room_for(device, held.room_wanted):
            return None
        static = held.static()
        if static is None:
            compiled.end("its caches are of a kind whose shapes change")
            return None
        inputs = torch.tensor([self._seen[-1:]] * self._batch, device=device)  # (batch, 1)
        logits = compiled.run(self, {"input_ids": inputs, "use_cache": True, **static.caches, **self._last_only})
        if logits is None:
            return None
        static.advance(1)
        held.held += 1
        row: torch.Tensor = logits[:, -1].float()  # (batch, vocab)
        return row

    @contextlib.contextmanager
    def _guests(self, tokens: int) -> Iterator[dict[str, Any]]:
        """Let blocks of main memory run on accelerators, where so many tokens are worth it; yield the pass's caches."""
        guests = self._loaded.residency.guests(tokens * self._batch) if self.cached.movable else ()
        caches = self.cached.to_begin_with(made_ahead=bool(guests))
        if not can_move(caches):
            guests = ()
        try:
            with contextlib.ExitStack() as stack:
                for some in guests:
                    stack.enter_context(some.running(caches))
                yield caches
        finally:
            if not all(some.caches_are_home for some in guests):
                self.cached.drop()

    def _climb_now_and_then(self) -> None:
        back = self._loaded.residency.rest_then_climb()
        if back:
            self._tell_climb(back)

    def _tell_climb(self, back: tuple[str, ...]) -> None:
        self._loaded.tell(LoadEvent("promote", f"memory is free again: {_blocks(back)} came back"))

    def _recover(self, failure: BaseException) -> None:
        """Make the next try ask for less.

        Raises:
            DoesNotFitError: Nothing is left to be done.
        """
        reason = _reason(failure)
        self._failures += 1
        with self._loaded.step_lock:
            residency = self._loaded.residency
            device = failing_device(failure, self._ran_on)
            if self._loaded.compiled is not None and device != CPU:
                self._loaded.compiled.end(f"memory ran out on {device}")
            if not self.cached.cut_back():
                self.cached.drop()
            give_back()
            return_freed_memory()
            if lost_onednn(failure):
                stop_using_onednn()
            if device == CPU or device in residency.accelerators:
                remedy, moved = self._next_remedy(device)
            else:
                # Another answer ran out of memory there too, and was first to make it leave.
                remedy, moved = f"what ran on {device} had left it by then", ()
        if not remedy:
            self._kept = None
            self.close()
            raise self._refusal(device, reason) from failure
        recovery = Recovery(device, len(self._seen), remedy, moved, reason)
        self.recoveries.append(recovery)
        self._loaded.tell(LoadEvent("recover", str(recovery)))

    def _next_remedy(self, device: str) -> tuple[str, tuple[str, ...]]:
        """Take the next remedy; return it in words, with the blocks that it moved, or "" where none is left."""
        if self._failures == 1:
            return "cached memory was given back", ()
        waiting = min(self._chunk, len(self._seen) - self.cached.held)
        if self._divides and waiting > _SHORTEST_CHUNK:
            self._chunk = max(_SHORTEST_CHUNK, waiting // _CHUNK_STEP)
            return f"the prompt goes on in chunks of {self._chunk} tokens", ()
        if device == CPU:
            return self._loaded.residency.less_in_main_memory(), ()
        try:
            return self._less_on(device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Main memory ran out as well.
        return "", ()

    def _less_on(self, device: str) -> tuple[str, tuple[str, ...]]:
        """Move blocks away from `device`, then the caches of the last layers, then those layers.

        Raises:
            RuntimeError: Main memory ran out.
        """
        residency = self._loaded.residency
        least = 2 ** min(self._failures - 2, 16)
        may_move = self._loaded.config.enable_progressive_fallback
        moved: tuple[str, ...] = ()
        if may_move:
            moved = residency.step_down(device, residency.shortfall(device), least, but_one=True)
        if not moved and residency.offload_caches(device):
            return f"keys and values of the layers on {device} moved to main memory", ()
        if not moved and may_move:
            moved = residency.step_down(device, residency.shortfall(device), least)
        return (f"{_blocks(moved)} moved from {device} to the CPU" if moved else ""), moved

    def _refusal(self, device: str, reason: str) -> DoesNotFitError:
        return DoesNotFitError(
            f"memory ran out on {device} after {len(self._seen)} tokens of prompt and answer: {reason}",
            needed=self._loaded.plan.footprint.kv_cache,
            available=0,
            device=device,
            hint="close what else uses the memory, shorten the context (--context, 'context_length'), or place fewer "
            "layers there ('max_memory')",
        )


def _reason(failure: BaseException) -> str:
    return (str(failure) or type(failure).__name__).splitlines()[0]


def _blocks(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMES])
    return shown if len(names) <= _MOST_NAMES else f"{shown} and {len(names) - _MOST_NAMES} more"
