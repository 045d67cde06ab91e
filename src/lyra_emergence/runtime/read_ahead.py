"""A ring of buffers that threads of its own fill in the order in which their contents are wanted.

Sources are taken one after the other, again and again: while one is in use, the next is read, and after the last comes
the first. A source that is asked for out of turn is read next, and reading goes on behind it. Each thread that uses
the ring has one source at a time; a buffer is filled anew once nobody uses it. There are as many threads as buffers, so
that the disk has the next read to do when one ends, however late the thread that waits for it gets to run.
"""

from __future__ import annotations

import _thread
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ReadAhead", "Source"]

_LONGEST_END = 10.0
"""Seconds that closing waits for a disk that hangs; the thread ends when the disk answers."""
_LOOKS_AGAIN = 1.0
"""Seconds after which who waits for a source looks by itself: a thread that finds no memory may end without a word."""


class Source(Protocol):
    """What fills a buffer."""

    def read(self, target: memoryview, goes_on: Callable[[], bool]) -> None:
        """Fill `target`; stop between pieces once `goes_on` says no."""


@dataclass(slots=True)
class _Buffer:
    """A buffer of the ring.

    Attributes:
        memory: Its bytes.
        source: The source that it holds or is filled from; None where it holds none.
        filled: Whether it holds all of it.
        spent: Whether what it holds was used, and may make room.
        users: The threads that use it now.
        asked: Whether its source was waited for as the read began.
    """

    memory: memoryview
    source: int | None = None
    filled: bool = False
    spent: bool = True
    users: int = 0
    asked: bool = False


class ReadAhead:
    """The ring as its users see it. Closed when it is collected; `close` does it at once.

    Args:
        sources: What is read, in order.
        memories: The buffers, each of them large enough for any source.
        first: What a thread does before it reads.
    """

    def __init__(
        self, sources: Sequence[Source], memories: Sequence[memoryview], first: Callable[[], None] | None = None
    ) -> None:
        self._ring = _Ring(sources, memories)
        # The threads know the ring alone, so that this object can be collected.
        self._end = weakref.finalize(self, self._ring.stop)
        self._ring.start(first)

    def take(self, source: int) -> int | None:
        """Wait until a source is read, and return the number of the buffer that holds it until `leave`.

        Returns:
            None where the source is left out or the ring closed.

        Raises:
            CheckpointError: It could not be read; asked again, it is tried again.
        """
        return self._ring.take(source)

    def leave(self, source: int) -> bool:
        """Say that the calling thread is done with a source; return whether no other one uses it."""
        return self._ring.leave(source)

    def settle(self) -> None:
        """Let go of what the calling thread still holds: a Ctrl-C in the middle of a pass keeps it from leaving."""
        self._ring.settle()

    def leave_out(self, source: int) -> None:
        """Read a source no more."""
        self._ring.leave_out(source)

    def waited(self) -> float:
        """Return the seconds that sources were waited for since the last call."""
        waited, self._ring.waited = self._ring.waited, 0.0
        return waited

    def close(self) -> None:
        """End the threads, and wait until their present pieces are read."""
        self._end()
        self._ring.wait_for_end()


class _Ring:
    """What the threads and the users share."""

    def __init__(self, sources: Sequence[Source], memories: Sequence[memoryview]) -> None:
        self._sources = sources
        self._buffers = [_Buffer(memory) for memory in memories]
        # Reentrant: a ring that is collected is stopped in whatever thread just made an object, also in this lock.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._next = 0
        self._wanted: int | None = None
        self._held: dict[int, int] = {}
        self._left_out: set[int] = set()
        self._failures: dict[int, BaseException] = {}
        self._unread: set[int] = set()
        self._threads = 0
        self._stopped = False
        self.waited = 0.0

    def start(self, first: Callable[[], None] | None) -> None:
        """Read ahead from now on; until a thread runs, and where none can be had, whoever wants a source reads it."""
        for number in range(len(self._buffers)):
            with suppress(RuntimeError, MemoryError):
                _thread.start_new_thread(self._run, (None if number else first,))

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            self._changed.notify_all()

    def wait_for_end(self) -> None:
        with self._lock:
            self._changed.wait_for(lambda: not self._threads, _LONGEST_END)

    def _goes_on(self) -> bool:
        return not self._stopped

    def _run(self, first: Callable[[], None] | None) -> None:
        # Counted by itself: one that finds no memory for its first step never gets here, and nobody waits for it.
        with self._lock:
            if self._stopped:
                return
            self._threads += 1
        try:
            if first is not None:
                first()
            while (job := self._next_job()) is not None:
                self._fill(*job)
        finally:
            with self._lock:
                self._threads -= 1
                self._changed.notify_all()

    def _next_job(self) -> tuple[int, int] | None:
        """Wait for something to read; return the numbers of buffer and source, or None once the ring is closed."""
        with self._lock:
            while not self._stopped:
                job = self._choose()
                if job is not None:
                    return job
                self._changed.wait()
            return None

    def _choose(self) -> tuple[int, int] | None:
        """Choose what to read, and mark it as begun; the lock is held."""
        source, urgent = self._wanted, True
        if source is None or source in self._failures or self._buffer_of(source) is not None:
            source, urgent = self._after_those_held(), False
        buffer = None if source is None else self._free_buffer(urgent=urgent)
        if source is None or buffer is None:
            return None
        job = buffer, source
        self._next = (source + 1) % len(self._sources)
        held = self._buffers[buffer]
        held.source, held.filled, held.spent, held.asked = source, False, False, urgent
        return job

    def _after_those_held(self) -> int | None:
        """Return the next source that is to be read, or None where it is held already, or there is none."""
        count = len(self._sources)
        in_turn = ((self._next + step) % count for step in range(count))
        source = next((at for at in in_turn if at not in self._left_out and at not in self._unread), None)
        return None if source is None or self._buffer_of(source) is not None else source

    def _free_buffer(self, *, urgent: bool) -> int | None:
        free = [at for at, held in enumerate(self._buffers) if not held.users and (held.spent or held.source is None)]
        if not free and urgent:
            # Read for nothing: a pass went another way.
            free = [at for at, held in enumerate(self._buffers) if not held.users and held.filled]
        return free[0] if free else None

    def _buffer_of(self, source: int) -> int | None:
        return next((at for at, held in enumerate(self._buffers) if held.source == source), None)

    def _fill(self, buffer: int, source: int) -> None:
        held = self._buffers[buffer]
        failure: BaseException | None = None
        try:
            self._sources[source].read(held.memory, self._goes_on)
        except BaseException as error:  # noqa: BLE001 - it is raised where the source is wanted
            failure = error.with_traceback(None)
        with self._lock:
            held.filled = failure is None
            if failure is not None:
                held.source, held.spent = None, True
                # What nobody waited for as the read began is tried again when it is wanted: the disk may be well then.
                self._unread.add(source)
                if held.asked and source == self._wanted:
                    self._failures[source] = failure
            self._changed.notify_all()

    def take(self, source: int) -> int | None:
        self.settle()
        asked = time.perf_counter()
        while True:
            with self._lock:
                if self._stopped or source in self._left_out:
                    return None
                buffer = self._taken(source)
                if buffer is not None:
                    self.waited += time.perf_counter() - asked
                    return buffer
                job = None if self._threads else self._choose()
                if job is None:
                    self._changed.notify_all()
                    self._changed.wait(_LOOKS_AGAIN)
                    continue
            try:
                self._fill(*job)
            except MemoryError:
                # It could not even begin. Nothing is called here: that would want memory too.
                with self._lock:
                    held = self._buffers[job[0]]
                    if not held.filled:
                        held.source, held.spent = None, True
                raise

    def _taken(self, source: int) -> int | None:
        """Take a source that is there; else say that it is wanted. The lock is held."""
        failure = self._failures.pop(source, None)
        if failure is not None:
            self._wanted = None
            raise failure
        buffer = self._buffer_of(source)
        held = None if buffer is None else self._buffers[buffer]
        if held is None or not held.filled:
            self._wanted = source
            self._unread.discard(source)
            return None
        if self._wanted == source:
            self._wanted = None
        held.users += 1
        self._held[_thread.get_ident()] = source
        return buffer

    def leave(self, source: int) -> bool:
        with self._lock:
            if self._held.get(_thread.get_ident()) != source:
                return True
            del self._held[_thread.get_ident()]
            buffer = self._buffer_of(source)
            assert buffer is not None  # held until now
            held = self._buffers[buffer]
            held.users -= 1
            held.spent = True
            if not held.users:
                self._changed.notify_all()
            return not held.users

    def settle(self) -> None:
        source = self._held.get(_thread.get_ident())
        if source is not None:
            self.leave(source)

    def leave_out(self, source: int) -> None:
        with self._lock:
            self._left_out.add(source)
            buffer = self._buffer_of(source)
            if buffer is not None and not self._buffers[buffer].users and self._buffers[buffer].filled:
                self._buffers[buffer] = _Buffer(self._buffers[buffer].memory)
            self._changed.notify_all()
