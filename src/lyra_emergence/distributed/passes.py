"""Passes of a divided model: rank 0 begins each, and all ranks run it with the same tokens.

`RankedModel` stands where rank 0 has a model: called as one, it first tells the other ranks what it was called with.
They keep a cache for each of rank 0's, under its number, cut back to what rank 0's holds where that was cut back. So
whatever rank 0 does between passes (choosing tokens, stopping an answer, keeping a conversation's cache, several
answers in turn) needs nothing of the others.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lyra_emergence.distributed.channel import MEASURE, PASS, Channel, Message
from lyra_emergence.distributed.stage_cache import StageCache
from lyra_emergence.runtime.kv_cache import cut_back, held_bytes
from lyra_emergence.runtime.stepping import caches_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from lyra_emergence.distributed.rank_report import RankReport

__all__ = ["Follower", "RankedModel", "Runner"]


class Runner:
    """Runs passes of this rank's share.

    Args:
        model: transformers' model, of which this rank has its share.
        device: Where that is.
        stage: The numbers of the layers that this rank has; None where it has some of each.
        takes_keep: Whether the model can make logits for the last tokens alone.
    """

    def __init__(self, model: Any, device: str, stage: Collection[int] | None, *, takes_keep: bool) -> None:
        self.model = model
        self.device = device
        self._stage = stage
        self._takes_keep = takes_keep

    def run(self, message: Message, caches: Mapping[str, Any]) -> Any:
        """Return the output of a pass that goes on from `caches`, {} for none."""
        if not caches and self._stage is not None:
            caches = {"past_key_values": StageCache(self.model.config, self._stage)}
        keep = {"logits_to_keep": message.keep} if self._takes_keep else {}
        with torch.inference_mode():
            return self.model(input_ids=message.ids(self.device), use_cache=True, **caches, **keep)


class RankedModel:
    """Rank 0's share of a model, called as the whole model is.

    All else that a model has is the share's.

    Args:
        runner: Runs this rank's share.
        channel: Tells the other ranks.
        own: Returns what this rank tells of itself, called with the bytes of keys and values that it holds.
        fatal: Called with what a pass raised: the ranks do not stand at the same place any more, so it must not return.
    """

    def __init__(
        self,
        runner: Runner,
        channel: Channel,
        own: Callable[[int], RankReport],
        fatal: Callable[[BaseException], None],
    ) -> None:
        self._runner = runner
        self._channel = channel
        self._own = own
        self._fatal = fatal
        self._numbers: dict[int, int] = {}  # by the id of a cache that lives
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self._next = 1
        self._dropped: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner.model, name)

    def __call__(
        self, *, input_ids: torch.Tensor, use_cache: bool = True, logits_to_keep: int = 0, **caches: Any
    ) -> Any:
        """Run a pass on all ranks and return its output: logits (batch, tokens, vocab) and this rank's caches.

        Args:
            input_ids: The tokens, (batch, tokens).
            use_cache: True: passes without caches are not told apart.
            logits_to_keep: For how many last tokens logits are made; 0 for all.
            caches: What the pass before returned, cut back or not.
        """
        assert use_cache  # the stepper always wants them
        number, held = self._place(caches)
        dropped, self._dropped = self._dropped, []
        batch = input_ids.shape[0]
        message = Message(PASS, number, held, logits_to_keep, batch, input_ids.flatten().tolist(), dropped)
        try:
            self._channel.send(message)
            output = self._runner.run(message, caches)
        except BaseException as error:
            self._fatal(error)
            raise
        self._remember(caches_of(output), number)
        return output

    def measure(self) -> list[RankReport]:
        """Return what every rank holds, in their order."""
        held = sum(held_bytes({"": cache}, self._runner.device) for cache in self._alive)
        try:
            self._channel.send(Message(MEASURE))
            return self._channel.gather(self._own(held))
        except BaseException as error:
            self._fatal(error)
            raise

    def _place(self, caches: Mapping[str, Any]) -> tuple[int, int]:
        """Return the number of `caches`, a new one where there are none, and the tokens that they hold."""
        cache = next(iter(caches.values()), None)
        if cache is None or id(cache) not in self._numbers:
            self._next += 1
            return self._next, 0
        return self._numbers[id(cache)], int(cache.get_seq_length())

    def _remember(self, caches: Mapping[str, Any], number: int) -> None:
        cache = next(iter(caches.values()), None)
        if cache is None or id(cache) in self._numbers:
            return
        self._numbers[id(cache)] = number
        self._alive.add(cache)
        weakref.finalize(cache, partial(self._forget, id(cache)))

    def _forget(self, key: int) -> None:
        self._dropped.append(self._numbers.pop(key))


class Follower:
    """What ranks other than 0 do: whatever rank 0 tells them.

    Args:
        runner: Runs this rank's share.
        channel: Where rank 0 tells what to do.
        own: Returns what this rank tells of itself, called with the bytes of keys and values that it holds.
    """

    def __init__(self, runner: Runner, channel: Channel, own: Callable[[int], RankReport]) -> None:
        self._runner = runner
        self._channel = channel
        self._own = own
        self._caches: dict[int, dict[str, Any]] = {}

    def follow(self) -> None:
        """Do what rank 0 tells, until it ends.

        Raises:
            RuntimeError: Rank 0 has ended, another rank has, or this one fails.
        """
        while True:
            message = self._channel.receive()
            if message.kind == PASS:
                self._pass(message)
            elif message.kind == MEASURE:
                self._channel.gather(self._own(self.held_bytes))

    @property
    def held_bytes(self) -> int:
        """Bytes of keys and values that it holds."""
        return sum(held_bytes(caches, self._runner.device) for caches in self._caches.values())

    def _pass(self, message: Message) -> None:
        for number in message.dropped:
            self._caches.pop(number, None)
        caches = self._caches.get(message.cache, {}) if message.held else {}
        cache = next(iter(caches.values()), None)
        has = int(cache.get_seq_length()) if cache is not None else 0
        if has != message.held and not (has > message.held and cut_back(caches, message.held)):
            raise RuntimeError(f"rank 0 goes on from {message.held} tokens, of which this rank has {has}")
        self._caches[message.cache] = caches_of(self._runner.run(message, caches))
