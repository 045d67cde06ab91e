"""Measuring how fast a file is read, past the pages that the kernel holds of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lyra_emergence.speed.cache import rates_path
from lyra_emergence.speed.machine_rates import Band

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["measure_file"]

_PIECE = 4 * 2**20
_FILE_BYTES = 48 * 2**20
_FEWEST_PIECES = 3
_FILE_BUDGET = 0.03
"""Seconds for writing a file, and for reading one, where the disk is slow."""


def measure_file(path: Path | None) -> Band | None:
    """Return bytes/s of reading a file, or None where none can be read."""
    try:
        with _opened(path) as stream:
            seconds = list(_read_pieces(stream))
    except OSError:
        return None
    if len(seconds) < _FEWEST_PIECES:
        return None
    # What the kernel reads ahead makes single pieces slow or instant: thirds of the file tell more.
    cuts = [len(seconds) * third // 3 for third in range(4)]
    thirds = [(end - start) * _PIECE / sum(seconds[start:end]) for start, end in pairwise(cuts)]
    return Band(min(thirds), len(seconds) * _PIECE / sum(seconds), max(thirds))


@contextlib.contextmanager
def _opened(path: Path | None) -> Iterator[Any]:
    """Yield a file of which the kernel holds no page, if it could be told so."""
    folder = rates_path().parent
    if path is None:
        folder.mkdir(parents=True, exist_ok=True)
    with path.open("rb", buffering=0) if path else tempfile.TemporaryFile(dir=folder, buffering=0) as stream:
        if path is None:
            _fill(stream)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, _FILE_BYTES, os.POSIX_FADV_DONTNEED)
        stream.seek(0)
        yield stream


def _pieces() -> Iterator[None]:
    """Yield as often as a piece may be written or read in the time for it, which a slow disk gets little of."""
    end = time.perf_counter() + _FILE_BUDGET
    for at in range(_FILE_BYTES // _PIECE):
        if at >= _FEWEST_PIECES and time.perf_counter() > end:
            return
        yield


def _fill(stream: Any) -> None:
    """Write the file, on to the disk: pages that wait to be written cannot be dropped."""
    piece = os.urandom(_PIECE)  # a file system that compresses finds nothing to gain
    for _ in _pieces():
        stream.write(piece)
        os.fsync(stream.fileno())


def _read_pieces(stream: Any) -> Iterator[float]:
    piece = bytearray(_PIECE)
    for _ in _pieces():
        start = time.perf_counter()
        if stream.readinto(piece) < _PIECE:
            return
        yield time.perf_counter() - start
