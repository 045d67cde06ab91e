"""Files of packed weights in the cache folder: for each checkpoint and packing a folder, in it a file for each layer.

A file is in the safetensors form, written whole or not at all, so that a process that dies has kept what it had packed
so far. Its last tensor is a checksum of pieces all over it: a file that is cut off, overwritten at length or left empty
by a disk is found out without being read. A single bit that changes elsewhere is not, as in a checkpoint.

A folder's name is a hash of what packed bytes depend on: the checkpoint's weights, the sources of the kernels, and the
version of transformers, which may lay weights out anew. Weights are told apart by the content hash that the Hugging
Face cache names its files by; elsewhere by the sizes, the times of the last change and pieces of the contents of all
files, and the descriptions of all tensors. A change shows unless a file system keeps no times and no piece is hit.

Needs no torch: plans read what is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from lyra_emergence.cache_files import cache_path
from lyra_emergence.checkpoint.safetensors_header import DTYPE_BITS, PREFIX_BYTES, parse_header, read_header
from lyra_emergence.errors import CheckpointError
from lyra_emergence.whole_files import replace_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lyra_emergence.checkpoint import CheckpointIndex, TensorInfo
    from lyra_emergence.packing import Quantization

__all__ = ["ABOUT", "About", "PackedFiles", "find_packed_files", "packed_folder", "read_about", "read_packed"]

FORMAT = "lyra.packed/1"
ABOUT = "about.json"
"""What a folder was packed from; its time of change is when it was last used."""
_CHECK = "check"
_CHECK_BYTES = 16
_ALIGNED = 64
_PIECES, _PIECE = 8, 4096
_KERNELS = Path(__file__).parent / "runtime" / "cpu" / "kernels.cpp"
_HASHED_NAME = re.compile("[0-9a-f]{64}")
_MOST_ABOUT = 65536


@dataclass(frozen=True, slots=True)
class About:
    """What a folder holds.

    Attributes:
        model: What a person calls the checkpoint.
        directory: Its folder.
        quantization: "8bit" or "4bit".
        weights: The hash that tells its weights apart.
    """

    model: str
    directory: str
    quantization: str
    weights: str


def packed_folder() -> Path:
    """Return the folder that holds all packed weights; there need be none."""
    return cache_path("packed")


def find_packed_files(index: CheckpointIndex, quantization: Quantization) -> PackedFiles | None:
    """Return where the packed weights of a checkpoint belong; None where it cannot be told apart from others."""
    try:
        state = _state(index)
        weights = _identity(index)
    except OSError:
        return None
    about = About(index.name, str(index.directory.absolute()), quantization, weights)
    key = hashlib.sha256(f"{weights} {quantization} {_packing()}".encode()).hexdigest()[:16]
    return PackedFiles(packed_folder() / f"{quantization}-{key}", about, index, state)


@dataclass(frozen=True, slots=True)
class PackedFiles:
    """The packed weights of one checkpoint.

    Attributes:
        folder: Their folder; there need be none.
        about: What they are packed from.
        index: The checkpoint.
        state: Sizes and times of its files, when they were looked at.
    """

    folder: Path
    about: About
    index: CheckpointIndex
    state: tuple[tuple[int, int, int], ...]

    def path(self, block: str) -> Path:
        """Return the file of a block; its name comes from the checkpoint, and may be anything."""
        return self.folder / f"{quote(block, safe='')}.safetensors"

    def is_of_now(self) -> bool:
        """Return whether the checkpoint's files are as they were when they were looked at."""
        with suppress(OSError):
            return _state(self.index) == self.state
        return False

    def mark_used(self) -> None:
        """Note that the weights were used now."""
        now = time.time()
        with suppress(OSError):
            os.utime(self.folder / ABOUT, (now, now))

    def write(self, block: str, tensors: Sequence[tuple[str, str, memoryview]]) -> None:
        """Write a block's file whole.

        Args:
            block: The block's name.
            tensors: Name, dtype as safetensors calls it, and bytes of each tensor; whole multiples of 64 bytes first.

        Raises:
            OSError: It cannot be written.
        """
        about = self.folder / ABOUT
        if not about.exists():
            replace_file(about, json.dumps({"format": FORMAT, **asdict(self.about)}, indent=1).encode())
        replace_file(self.path(block), *_parts(tensors))


def read_packed(path: Path) -> tuple[TensorInfo, ...] | None:
    """Return the tensors that a block's file holds; None where it is absent or damaged."""
    try:
        *tensors, check = read_header(path.parent, path.name)
        if check.name != _CHECK or check.nbytes != _CHECK_BYTES:
            return None
        with path.open("rb", buffering=0) as file:

            def piece(begin: int, end: int) -> bytes:
                file.seek(begin)
                return file.read(end - begin)

            held = piece(check.begin, check.end)
            return tuple(tensors) if held == _checksum(tensors, check.begin, piece) else None
    except (OSError, ValueError, CheckpointError):
        return None


def read_about(folder: Path) -> About | None:
    """Return what a folder was packed from; None where it does not say so."""
    try:
        with (folder / ABOUT).open("rb") as file:
            held = json.loads(file.read(_MOST_ABOUT))
        if held.pop("format") == FORMAT and all(isinstance(value, str) for value in held.values()):
            return About(**held)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return None


def _parts(tensors: Sequence[tuple[str, str, memoryview]]) -> list[bytes | memoryview]:
    entries: dict[str, object] = {}
    at = 0
    for name, dtype, data in (*tensors, (_CHECK, "U8", memoryview(bytes(_CHECK_BYTES)))):
        shape = [8 * data.nbytes // DTYPE_BITS[dtype]]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + data.nbytes]}
        at += data.nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-(PREFIX_BYTES + len(header)) % _ALIGNED)
    parts: list[bytes | memoryview] = [
        len(header).to_bytes(PREFIX_BYTES, "little"),
        header,
        *(data for _, _, data in tensors),
    ]
    size = PREFIX_BYTES + len(header) + at
    *found, check = parse_header(header, len(header), size, "packed weights", "")
    return [*parts, _checksum(found, check.begin, lambda begin, end: _cut(parts, begin, end))]


def _cut(parts: Sequence[bytes | memoryview], begin: int, end: int) -> bytes:
    """Return bytes of `parts` as if they were joined."""
    found, at = [], 0
    for part in parts:
        found.append(bytes(part[max(0, begin - at) : max(0, end - at)]))
        at += len(part)
    return b"".join(found)


def _checksum(tensors: Sequence[TensorInfo], size: int, piece: Callable[[int, int], bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=_CHECK_BYTES)
    for tensor in tensors:
        digest.update(f"{tensor.name} {tensor.dtype} {tensor.begin} {tensor.end}\n".encode())
    for begin, end in _places(size):
        digest.update(piece(begin, end))
    return digest.digest()


def _places(size: int) -> Iterator[tuple[int, int]]:
    """Yield where to look into `size` bytes: at both ends, and evenly between them."""
    last = max(0, size - _PIECE)
    for number in range(_PIECES):
        begin = last * number // (_PIECES - 1)
        yield begin, min(size, begin + _PIECE)


def _files(index: CheckpointIndex) -> list[str]:
    return sorted({tensor.file for tensor in index.tensors.values()})


def _state(index: CheckpointIndex) -> tuple[tuple[int, int, int], ...]:
    statuses = [(index.directory / file).stat() for file in _files(index)]
    return tuple((status.st_size, status.st_mtime_ns, status.st_ctime_ns) for status in statuses)


def _identity(index: CheckpointIndex) -> str:
    digest = hashlib.sha256(json.dumps(index.config, sort_keys=True, default=str).encode())
    for file in _files(index):
        path = index.directory / file
        digest.update(f"{file}\n".encode())
        real = path.resolve()
        if real.parent.name == "blobs" and _HASHED_NAME.fullmatch(real.name):
            digest.update(real.name.encode())
            continue
        status = path.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
        with path.open("rb", buffering=0) as stream:
            for begin, end in _places(status.st_size):
                stream.seek(begin)
                digest.update(stream.read(end - begin))
    for tensor in index.tensors.values():
        digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape} {tensor.file} {tensor.begin}\n".encode())
    return digest.hexdigest()


@cache
def _packing() -> str:
    """Return the hash of what packs: other sources of the kernels may arrange the same weights in another way."""
    digest = hashlib.sha256(_KERNELS.read_bytes())
    digest.update(f"{FORMAT} {sys.byteorder} transformers {metadata.version('transformers')}".encode())
    return digest.hexdigest()
