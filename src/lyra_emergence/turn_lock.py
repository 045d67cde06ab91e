"""A lock that goes around: who asked first gets it first.

A `threading.Lock` may go back to the thread that just released it, time after time, while others wait. Generators that
share a model take a turn for every pass; with this lock, nobody who waits sees another one pass twice.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Self

__all__ = ["TurnLock"]


class TurnLock:
    """A lock that its waiters get in the order in which they came; not to be taken twice by one thread."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._gates: deque[threading.Lock] = deque()
        self._held = False

    def acquire(self) -> None:
        """Wait for the lock and take it."""
        with self._mutex:
            if not self._held:
                self._held = True
                return
            gate = threading.Lock()
            gate.acquire()
            self._gates.append(gate)
        try:
            gate.acquire()
        except BaseException:  # a Ctrl-C: the place in the queue is given up, or the lock that was just handed over
            with self._mutex:
                if gate in self._gates:
                    self._gates.remove(gate)
                else:
                    self._pass_on()
            raise

    def release(self) -> None:
        """Hand the lock to whoever waits longest.

        Raises:
            RuntimeError: Nobody holds it.
        """
        with self._mutex:
            if not self._held:
                raise RuntimeError("release of a lock that nobody holds")
            self._pass_on()

    def locked(self) -> bool:
        """Return whether somebody holds it."""
        return self._held

    def _pass_on(self) -> None:
        if self._gates:
            self._gates.popleft().release()
        else:
            self._held = False

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
