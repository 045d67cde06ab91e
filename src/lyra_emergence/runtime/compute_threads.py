"""Threads that compute, where they can be had.

OpenMP starts its threads at the first parallel work of each thread that calls it, and ends the process where one cannot
be started: a limit of the address space or of processes is reached. So it is tried before: what was started for the
trial leaves its stack to what is started next.
"""

from __future__ import annotations

import _thread
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["one_thread", "settle_for_fewer_threads"]

_tried = threading.local()
_LONGEST_END = 0.002
"""Seconds in which a thread that has nothing left to do ends."""


def settle_for_fewer_threads() -> bool:
    """Let torch compute with one thread where no more can be started for the calling one; return whether that was so.

    Tried once per calling thread.
    """
    if getattr(_tried, "done", False):
        return False
    _tried.done = True
    wanted = torch.get_num_threads() - 1
    if wanted < 1 or _can_start(wanted):
        return False
    torch.set_num_threads(1)
    return True


def _can_start(count: int) -> bool:
    """Return whether `count` threads can be there at once."""
    # A lock's own method is no Python code, and takes no memory of Python's.
    locks = [_thread.allocate_lock() for _ in range(count)]
    started = 0
    try:
        for lock in locks:
            lock.acquire()
            _thread.start_new_thread(lock.acquire, ())
            started += 1
    except (RuntimeError, MemoryError):
        return False
    finally:
        for lock in locks[:started]:
            lock.release()
        time.sleep(_LONGEST_END)
    return True


@contextmanager
def one_thread(*, wanted: bool) -> Iterator[None]:
    """Let torch and Lyra's kernels compute with one thread of the calling one, if that is `wanted`.

    For work that waits for something else: threads wait for each other by running in circles, and on a busy machine
    that took more time than they saved.
    """
    threads = torch.get_num_threads()
    if not wanted or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
