"""Reading weights from their file past the kernel's cache of pages, in order and into memory that is used again.

What is read once for each token must not push out what stays: so reads are direct (O_DIRECT) where the file system
takes that, and where not, the pages that were read are given up at once. Linux only, as is finding where a tensor's map
lies.
"""

from __future__ import annotations

import bisect
import errno
import os
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lyra_emergence.checkpoint.json_files import DAMAGED, shown
from lyra_emergence.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from lyra_emergence.checkpoint import TensorInfo

__all__ = ["PAGE", "Extent", "FileMaps", "WeightsFile"]

PAGE = 4096
"""Offsets and addresses of direct reads are multiples of it."""
_PIECE = 32 * 2**20
"""Bytes read at once: a busy machine lets a thread wait after each piece; and soon over where reading has to end."""
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a file.

    Attributes:
        path: The file.
        begin: Offset of the first byte.
        end: Offset just behind the last one.
    """

    path: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Their number."""
        return self.end - self.begin

    def aligned(self) -> Extent:
        """Return the whole pages around it."""
        return Extent(self.path, self.begin // PAGE * PAGE, -(-self.end // PAGE) * PAGE)


@dataclass(frozen=True, slots=True)
class _Map:
    """Where a file, or a part of it, is mapped: addresses, and the offset in the file of the first."""

    start: int
    end: int
    offset: int
    path: str


class FileMaps:
    """The maps of files in this process, as they are now.

    Args:
        paths: The files that count, links resolved. One that was replaced or deleted since it was mapped does not: the
            kernel calls it by another name then.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        wanted = set(paths)
        self._maps = sorted(
            (found for found in map(_parsed, _lines()) if found.path in wanted), key=lambda found: found.start
        )
        self._starts = [found.start for found in self._maps]

    def extent(self, tensor: torch.Tensor) -> Extent | None:
        """Return the bytes of a file that `tensor` is a map of; None where it is none, or not whole and in order."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.nbytes:
            return None
        address = tensor.data_ptr()
        at = bisect.bisect_right(self._starts, address) - 1
        if at < 0 or address + tensor.nbytes > self._maps[at].end:
            return None
        found = self._maps[at]
        begin = found.offset + address - found.start
        return Extent(found.path, begin, begin + tensor.nbytes)


def _lines() -> list[str]:
    try:
        return Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _parsed(line: str) -> _Map:
    """Parse "7f00-7f10 r--p 00001000 fe:00 123    /a/path"."""
    addresses, _, offset, _, _, *path = line.split(None, 5)
    start, end = (int(part, 16) for part in addresses.split("-"))
    return _Map(start, end, int(offset, 16), path[0] if path else "")


class WeightsFile:
    """An open file of weights, until nobody holds it.

    Args:
        path: The file.
        tensors: Its tensors in the order of their bytes, by which an error says what could not be read.

    Raises:
        CheckpointError: It cannot be opened.
    """

    def __init__(self, path: str, tensors: Sequence[TensorInfo]) -> None:
        self.path = path
        self.direct = hasattr(os, "O_DIRECT")
        self._tensors = tensors
        try:
            self._fd, self._closes = self._open()
        except OSError as error:
            if not self.direct or error.errno not in _NOT_DIRECT:
                raise self._unreadable(0, error.strerror) from error
            self._read_through_the_cache()

    def _open(self) -> tuple[int, Callable[[], object]]:
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0))
        # A thread may be reading when the model is closed: the file is, when nobody knows it any more.
        closes = weakref.finalize(self, os.close, fd)
        closes.atexit = False
        return fd, closes

    def _read_through_the_cache(self) -> None:
        self.direct = False
        try:
            self._fd, self._closes = self._open()
        except OSError as error:
            raise self._unreadable(0, error.strerror) from error

    def read(self, extent: Extent, target: memoryview, goes_on: Callable[[], bool]) -> None:
        """Read the pages around `extent`.

        Args:
            extent: The bytes that must be there: the last page of a file may not be whole.
            target: Where the pages go; of their size.
            goes_on: Asked between pieces; where it says no, the rest is left unread.

        Raises:
            CheckpointError: The disk failed, or the file ends too early.
        """
        begin = at = extent.aligned().begin
        while at < extent.end and goes_on():
            try:
                got = self._read_piece(at, target[at - begin : at - begin + _PIECE])
            except OSError as error:
                raise self._unreadable(max(at, extent.begin), error.strerror) from error
            if not got:
                raise self._unreadable(max(at, extent.begin), f"the file ends at {at} bytes")
            at += got

    def _read_piece(self, offset: int, piece: memoryview) -> int:
        try:
            got = os.preadv(self._fd, [piece], offset)
        except OSError as error:
            if len(piece) > PAGE and error.errno == errno.EIO:
                return self._read_piece(offset, piece[: len(piece) // 2 // PAGE * PAGE])  # up to where can it be read?
            if not self.direct or error.errno not in _NOT_DIRECT:
                raise
            self._closes()
            self._read_through_the_cache()
            return self._read_piece(offset, piece)
        if not self.direct:
            os.posix_fadvise(self._fd, offset, got, os.POSIX_FADV_DONTNEED)
        return got

    def expect(self, extent: Extent) -> None:
        """Let the kernel read `extent` into its cache, from which maps are served."""
        with suppress(OSError):
            os.posix_fadvise(self._fd, extent.begin, extent.end - extent.begin, os.POSIX_FADV_WILLNEED)

    def _unreadable(self, offset: int, reason: str | None) -> CheckpointError:
        name = next((tensor.name for tensor in self._tensors if tensor.end > offset), "")
        where = f": tensor {shown(name)}" if name else ""
        return CheckpointError(f"{self.path}{where}: its weights cannot be read: {reason}", hint=DAMAGED)
