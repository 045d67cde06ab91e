"""Room that a prompt's projections unpack into, made once for all: fresh pages would cost more than unpacking."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["keeping_scratch", "scratch"]


class _Held(threading.local):
    depth = 0
    room: torch.Tensor | None = None


_held = _Held()


@contextmanager
def keeping_scratch() -> Iterator[None]:
    """Keep what `scratch` returns in this thread for the next call, until the block ends."""
    _held.depth += 1
    try:
        yield
    finally:
        _held.depth -= 1
        if not _held.depth:
            _held.room = None


def scratch(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return room for (rows, columns) whose content is anything; the next call in this thread may return the same.

    Raises:
        RuntimeError: Memory ran out.
    """
    wanted = rows * columns * dtype.itemsize
    room = _held.room
    if room is None or room.nbytes < wanted:
        _held.room = None  # before its successor is there: both at once were not planned for
        room = torch.empty(wanted, dtype=torch.uint8)
        if _held.depth:
            _held.room = room
    return room[:wanted].view(dtype).view(rows, columns)
