"""Answers that run at once on one model, and those that wait.

A few threads, one for each answer that may run. They share the model pass by pass in a fixed order (`TurnLock`), so
that each answer gets its next token after at most one pass of every other one. Who comes first begins first: a long
request is not overtaken by short ones for which there would be room already.

What happens to an answer is told from its thread, through the callback that came with it. Memory that runs out in one
answer is its own matter until the runtime moves blocks; either way every answer keeps its tokens (`runtime/stepper`).

Keys and values of the answer that ended last stay where no other one runs: a request that begins like it, as the next
turn of a conversation does, runs only what is new.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from lyra_emergence.chunks import Chunk, GenerationOptions
from lyra_emergence.errors import AbandonedError, LyraError, RequestError, without_frames
from lyra_emergence.server.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lyra_emergence.chunks import GenerationStats
    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.server.room import Room

__all__ = ["DEFAULT_WAITING", "Asked", "Engine", "EngineFigures", "Outcome", "Ticket"]

DEFAULT_WAITING: Final = 64
"""Requests that wait at most; more are told to come back."""
_LONGEST_PAUSE: Final = 60
"""Seconds after which a client is told to come back, at most."""
_REMEMBERED: Final = 0.8
"""How much of the mean time of an answer stays when the next one is added."""

_log = logging.getLogger(__name__)

Outcome = Chunk | Exception
"""What comes of an answer: chunks, the last of which has a `finish_reason`, or the error that ended it."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for an answer.

    Attributes:
        prompt: Token ids.
        options: How to generate; `max_new_tokens` is within what the context leaves.
    """

    prompt: tuple[int, ...]
    options: GenerationOptions

    @property
    def tokens(self) -> int:
        """Tokens of keys and values that it may come to."""
        return len(self.prompt) + self.options.max_new_tokens


@dataclass(eq=False, slots=True)
class Ticket:
    """A request that waits or runs.

    Attributes:
        asked: The request.
        tell: Called with each outcome, in the engine's thread; must not block and must not raise.
        stopped: Set when nobody waits for it any more.
        came: When it came, by `time.monotonic`.
        began: When it began to run; 0 before.
    """

    asked: Asked
    tell: Callable[[Outcome], None] = field(repr=False)
    stopped: threading.Event = field(default_factory=threading.Event, repr=False)
    came: float = field(default_factory=time.monotonic)
    began: float = 0.0

    @property
    def waited(self) -> float:
        """Seconds that it waited for its turn to begin; 0 before it began."""
        return max(0.0, self.began - self.came)


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """What an engine has done and does.

    Attributes:
        running: Answers that run.
        waiting: Requests that wait.
        reserved: Tokens that running answers may come to.
        room: Tokens that they may come to at most.
        ended: Answers that ended, by how: a finish reason, "stopped", "failed" or "refused" (the queue was full).
        prompt_tokens: Tokens of the prompts of answers that ended whole.
        new_tokens: Tokens that were generated, those of broken-off answers included.
        recoveries: Times that memory ran out and an answer that ended whole went on.
        tokens_per_second: How fast tokens come of late, all answers together; 0 where nothing runs.
    """

    running: int
    waiting: int
    reserved: int
    room: int
    ended: Mapping[str, int]
    prompt_tokens: int
    new_tokens: int
    recoveries: int
    tokens_per_second: float


class Engine:
    """Runs answers of one model.

    Args:
        loaded: The model; the engine does not close it.
        room: What may run at once.
        waiting: Requests that may wait.
    """

    def __init__(self, loaded: LoadedModel, room: Room, waiting: int = DEFAULT_WAITING) -> None:
        from lyra_emergence.runtime.prompt_cache import PromptCache

        self.room = room
        self._loaded = loaded
        self._most_waiting = waiting
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._running: set[Ticket] = set()
        self._closed = False
        self._mean_seconds = 1.0
        self._kept = PromptCache()
        self._ended: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._pace = Pace()
        self._at_close: list[Callable[[], None]] = []
        self._threads = [
            threading.Thread(target=self._work, name=f"answer-{number}", daemon=True) for number in range(room.parallel)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, asked: Asked, tell: Callable[[Outcome], None]) -> Ticket:
        """Let a request wait for its turn.

        Raises:
            RequestError: The queue is full (429), or the engine is closed (503).
        """
        ticket = Ticket(asked, tell)
        with self._changed:
            if self._closed:
                raise RequestError("the server is shutting down", status=503, code="shutting_down", retry_after=5)
            idle = len(self._running) < self.room.parallel and not self._waiting and self._has_room_for(ticket)
            if not idle and len(self._waiting) >= self._most_waiting:
                self._ended["refused"] += 1
                raise RequestError(
                    f"{len(self._waiting)} requests wait already, and that is the limit",
                    status=429,
                    code="queue_full",
                    retry_after=self._pause(),
                    hint="ask again later, or start the server with a longer queue (--queue)",
                )
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def stop(self, ticket: Ticket) -> None:
        """Stop an answer before its next pass, or take it out of the queue; nothing where it has ended."""
        ticket.stopped.set()
        with self._changed:
            if ticket not in self._waiting:
                return
            self._waiting.remove(ticket)
            self._ended["stopped"] += 1
            self._changed.notify_all()
        ticket.tell(AbandonedError("nobody waits for this answer any more"))

    def figures(self) -> EngineFigures:
        """Return what it has done and does."""
        with self._changed:
            return EngineFigures(
                running=len(self._running),
                waiting=len(self._waiting),
                reserved=self._reserved(),
                room=self.room.tokens,
                ended=dict(self._ended),
                prompt_tokens=self._tokens["prompt"],
                new_tokens=self._tokens["new"],
                recoveries=self._tokens["recoveries"],
                tokens_per_second=self._pace.tokens_per_second() if self._running else 0.0,
            )

    def ahead_of(self, ticket: Ticket) -> int | None:
        """Return how many requests wait before this one; None where it waits no more."""
        with self._changed:
            return self._waiting.index(ticket) if ticket in self._waiting else None

    def at_close(self, call: Callable[[], None]) -> None:
        """Have `call` called when the engine is closed, in the thread that closes it; it must not raise."""
        self._at_close.append(call)

    def close(self) -> None:
        """Take no more requests; what waits and runs goes on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            calls, self._at_close = self._at_close, []
        for call in calls:
            call()

    def cut(self) -> None:
        """Take no more requests, and stop what waits and runs."""
        self.close()
        with self._changed:
            tickets = [*self._waiting, *self._running]
        for ticket in tickets:
            self.stop(ticket)

    def join(self, seconds: float) -> bool:
        """Wait, after `close`, until nothing runs any more; return whether that was so in time."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        ended = not any(thread.is_alive() for thread in self._threads)
        if ended:
            self._kept.drop()
        return ended

    def _pause(self) -> int:
        """Return the seconds until a place in the queue is free, as answers have gone so far."""
        return min(_LONGEST_PAUSE, max(1, math.ceil(self._mean_seconds / self.room.parallel)))

    def _reserved(self) -> int:
        return sum(ticket.asked.tokens for ticket in self._running)

    def _has_room_for(self, ticket: Ticket) -> bool:
        return not self._running or self._reserved() + ticket.asked.tokens <= self.room.tokens

    def _work(self) -> None:
        while (ticket := self._next()) is not None:
            self._answer(ticket)

    def _next(self) -> Ticket | None:
        """Wait for the next request that may run; None when the engine is closed and none waits."""
        with self._changed:
            while not (self._waiting and self._has_room_for(self._waiting[0])):
                if self._closed and not self._waiting:
                    return None
                self._changed.wait()
            ticket = self._waiting.popleft()
            ticket.began = time.monotonic()
            self._running.add(ticket)
            return ticket

    def _answer(self, ticket: Ticket) -> None:
        outcome: Outcome
        try:
            outcome = self._generate(ticket)
        except Exception as error:  # noqa: BLE001 - whoever asked is told, and the thread goes on to the next
            outcome = error
        if isinstance(outcome, Exception):
            if not isinstance(outcome, LyraError):
                _log.error("an answer failed", exc_info=outcome)
            # Its frames hold the answer's caches for as long as the client's side keeps the error.
            without_frames(outcome)
        with self._changed:
            self._running.discard(ticket)
            self._count(outcome, time.monotonic() - ticket.began)
            self._changed.notify_all()
        ticket.tell(outcome)

    def _generate(self, ticket: Ticket) -> Chunk:
        """Tell every chunk but the last, and return that one, with the answer's memory given back.

        Raises:
            AbandonedError: Nobody waits for it any more.
            LyraError: It cannot go on.
        """
        from lyra_emergence.generation import stream_generate

        asked = ticket.asked
        kept = self._kept if self._is_alone() else None
        stream = stream_generate(self._loaded, asked.prompt, asked.options, kept=kept, abandoned=ticket.stopped.is_set)
        # Closed in this order: the stream leaves what it has, and that is given up where others want the room.
        with self._keeping_no_more_than_one(), closing(stream) as chunks:  # type: ignore[type-var] # a generator
            for chunk in chunks:
                with self._changed:
                    self._tokens["new"] += len(chunk.token_ids)
                    self._pace.add(len(chunk.token_ids))
                if chunk.finish_reason is not None:
                    return replace(chunk)
                ticket.tell(chunk)
        raise AssertionError("an answer ends with a reason")

    def _is_alone(self) -> bool:
        """Return whether no other answer runs: one of them at a time may go on from what the last one left."""
        with self._changed:
            return len(self._running) == 1

    @contextmanager
    def _keeping_no_more_than_one(self) -> Iterator[None]:
        """Give up what was kept where others run by the end: the plan's room is theirs."""
        try:
            yield
        finally:
            if not self._is_alone():
                with self._loaded.step_lock:
                    self._kept.drop()

    def _count(self, outcome: Outcome, seconds: float) -> None:
        if isinstance(outcome, Exception):
            self._ended["stopped" if isinstance(outcome, AbandonedError) else "failed"] += 1
            return
        self._ended[outcome.finish_reason or "stop"] += 1
        self._mean_seconds = _REMEMBERED * self._mean_seconds + (1 - _REMEMBERED) * seconds
        stats: GenerationStats | None = outcome.stats
        if stats is not None:
            self._tokens["prompt"] += stats.prompt_tokens
            self._tokens["recoveries"] += len(stats.recoveries)
