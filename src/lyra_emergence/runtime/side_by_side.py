"""Doing a few things at once, with as many threads as can be had.

A pool of Python's own waits for each thread to report that it runs. One whose first piece of memory is refused never
does, and the pool waits for good; where no thread can be had at all, it raises. Here the calling thread works too, and
waits only for what another one has begun.
"""

from __future__ import annotations

import _thread
from contextlib import suppress
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["side_by_side"]

S = TypeVar("S")
T = TypeVar("T")


class _Task(Generic[S, T]):
    """One call; `over` is locked until it has ended. Made ahead: a thread that takes it needs no memory to tell."""

    __slots__ = ("argument", "error", "over", "result")

    def __init__(self, argument: S) -> None:
        self.argument = argument
        self.result: T | None = None
        self.error: BaseException | None = None
        self.over = _thread.allocate_lock()
        self.over.acquire()

    def run(self, function: Callable[[S], T], failed: list[_Task[S, T]]) -> None:
        try:
            if not failed:
                self.result = function(self.argument)
        except BaseException as error:  # noqa: BLE001 - it is raised in the calling thread
            self.error = error
            failed.append(self)
        finally:
            self.over.release()


def side_by_side(function: Callable[[S], T], arguments: Sequence[S], threads: int) -> list[T]:
    """Return what `function` returns for each of `arguments`, in their order.

    Args:
        function: Called from several threads at once.
        arguments: What it is called with.
        threads: Threads that work at most, this one among them.

    Raises:
        BaseException: The first error in the order of the arguments, once no call is running; calls that had not begun
            by then were not made.
    """
    tasks: list[_Task[S, T]] = [_Task(argument) for argument in arguments]
    left = tasks[::-1]
    failed: list[_Task[S, T]] = []

    def work() -> None:
        with suppress(IndexError):
            while True:
                left.pop().run(function, failed)

    for _ in range(min(threads, len(tasks)) - 1):
        try:
            _thread.start_new_thread(work, ())
        except (RuntimeError, MemoryError):
            break  # no more threads can be had: this one does their part
    work()
    for task in tasks:
        task.over.acquire()
    for task in tasks:
        if task.error is not None:
            raise task.error
    return [task.result for task in tasks]  # type: ignore[misc]  # each has ended without an error
