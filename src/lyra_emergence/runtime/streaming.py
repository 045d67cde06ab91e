"""Blocks that main memory cannot hold: read from their file in order, ahead of the blocks that run.

The plan says which blocks those are (`Placement.streamed`). Each of them points at the checkpoint's map, as all blocks
on the CPU do; while its module runs, it points into a buffer of the ring instead (`read_ahead.py`). The buffers are
filled past the kernel's cache (`weights_file.py`). So nothing but the resident blocks' maps goes through that cache,
and these stay in it.
"""

from __future__ import annotations

import mmap
import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from lyra_emergence.errors import is_out_of_memory
from lyra_emergence.load_report import LoadEvent
from lyra_emergence.main_memory import require
from lyra_emergence.placement import CPU, STREAM_BUFFERS
from lyra_emergence.runtime.read_ahead import ReadAhead
from lyra_emergence.runtime.weights_file import Extent, FileMaps, WeightsFile
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lyra_emergence.checkpoint import CheckpointIndex, TensorInfo
    from lyra_emergence.placement import Placement
    from lyra_emergence.runtime.blocks import PlacedBlock

__all__ = ["Stream", "start_streaming"]

_READ_WHOLE = ("layer", "norm", "head")
"""Kinds of blocks of which a token reads all; of a table it reads a row, of experts a few."""
_TRIED_AGAIN = 64
"""Passes after which one thread is tried again, where the disk was hardly waited for."""
_LEAST_WAITED = 0.1
"""Of a pass of one thread, the share that it waits for the disk where more threads would not make it shorter."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Neighbouring bytes of a file, and where the pages around them go in a buffer."""

    file: WeightsFile
    extent: Extent
    place: int

    @property
    def end(self) -> int:
        """Where the pages end in the buffer."""
        return self.place + self.extent.aligned().nbytes


@dataclass(frozen=True, slots=True)
class _Weights:
    """What a block is read from, and where its tensors then lie in a buffer.

    Attributes:
        parts: What is read.
        places: (home tensor, offset in the buffer) of each tensor.
        nbytes: Bytes of the buffer that are filled.
    """

    parts: tuple[_Part, ...]
    places: tuple[tuple[torch.Tensor, int], ...]
    nbytes: int

    def read(self, target: memoryview, goes_on: Callable[[], bool]) -> None:
        """Fill `target`, as `ReadAhead` asks."""
        for part in self.parts:
            part.file.read(part.extent, target[part.place : part.end], goes_on)

    def within(self, buffer: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return, by the id of each home tensor, the tensor that takes its place while `buffer` is filled."""
        return {id(home): _view(buffer, place, home) for home, place in self.places}


def _view(buffer: torch.Tensor, place: int, home: torch.Tensor) -> torch.Tensor:
    tensor = buffer[place : place + home.nbytes].view(home.dtype).view(home.shape)
    return nn.Parameter(tensor, requires_grad=False) if isinstance(home, nn.Parameter) else tensor


class Stream:
    """The streamed blocks of one model, and their ring.

    Args:
        blocks: The blocks, in the order in which they run, and what each is read from.
        stays: What the kernel is to read into its cache, since other blocks run from it.

    Raises:
        RuntimeError: Main memory has no room for the buffers.
    """

    def __init__(
        self, blocks: Sequence[tuple[PlacedBlock, _Weights]], stays: Sequence[tuple[WeightsFile, Extent]]
    ) -> None:
        self.nbytes = max(weights.nbytes for _, weights in blocks)
        require(STREAM_BUFFERS * self.nbytes, "buffers of streamed weights")
        memories = [_buffer(self.nbytes) for _ in range(STREAM_BUFFERS)]
        buffers = [torch.frombuffer(memory, dtype=torch.uint8) for memory in memories]
        self._passes_with_all, self._asked = 1, 0.0
        self._blocks = [block for block, _ in blocks]
        sources = [weights for _, weights in blocks]
        self._ring: ReadAhead | None = ReadAhead(sources, memories, partial(_expect, stays))
        for at, (block, weights) in enumerate(blocks):
            views = [weights.within(buffer) for buffer in buffers]
            ring = self._ring
            block.stream(partial(_taken, ring, at, views), partial(ring.leave, at), partial(ring.leave_out, at))

    def is_slower(self, tokens: int) -> bool:
        """Return whether reading takes longer than a pass of one thread, by the last such pass: asked before each pass.

        Args:
            tokens: What the next pass runs; only single ones leave time to wait for.
        """
        waited = self._ring.waited() if self._ring is not None else 0.0
        before, self._asked = self._asked, time.perf_counter()
        if tokens > 1:
            self._passes_with_all = 1
            return False
        if self._passes_with_all:
            self._passes_with_all -= 1
            return not self._passes_with_all
        if waited < _LEAST_WAITED * (self._asked - before):
            self._passes_with_all = _TRIED_AGAIN
        return not self._passes_with_all

    def settle(self) -> None:
        """Let go of what a pass that was broken off still holds."""
        if self._ring is not None:
            self._ring.settle()

    def close(self) -> bool:
        """Let the blocks run from the map, end the thread and free the buffers; return whether that was still to do."""
        if self._ring is None:
            return False
        for block in self._blocks:
            block.end_streaming()
        self._ring.close()
        self._ring = None
        return True


def _expect(stays: Sequence[tuple[WeightsFile, Extent]]) -> None:
    for file, extent in stays:
        file.expect(extent)


def _taken(ring: ReadAhead, at: int, views: Sequence[Mapping[int, torch.Tensor]]) -> Mapping[int, torch.Tensor] | None:
    buffer = ring.take(at)
    return None if buffer is None else views[buffer]


def _buffer(nbytes: int) -> memoryview:
    """Return memory that begins at a page, as direct reads want it; in huge pages where they are to be had.

    Those make direct reads a tenth faster: fewer pieces for the disk to write to.
    """
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for a buffer of {format_bytes(nbytes)}") from error
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def start_streaming(
    blocks: Sequence[PlacedBlock],
    placements: Sequence[Placement],
    index: CheckpointIndex,
    tell: Callable[[LoadEvent], None],
) -> Stream | None:
    """Begin to read ahead what a plan streams, and let the kernel read what is to stay in main memory.

    Args:
        blocks: The model's blocks, in the order in which they run.
        placements: Where they are.
        index: The checkpoint.
        tell: Called where there is no memory for the buffers: the blocks then run from the map.

    Returns:
        None where nothing is streamed, or where a map's place in its file cannot be told.

    Raises:
        CheckpointError: A file cannot be opened.
    """
    placed = {placement.block: placement for placement in placements}
    here = [block for block in blocks if block.name in placed and block.device == "cpu" and block.mapped]
    streamed = [block for block in here if placed[block.name].streamed]
    if len(streamed) <= STREAM_BUFFERS:
        return None
    files = _Files(index)
    found = [(block, weights) for block in streamed if (weights := files.weights(block.homes)) is not None]
    if len(found) <= STREAM_BUFFERS:
        return None
    stays = [block for block in here if placed[block.name].device == CPU and placed[block.name].kind in _READ_WHOLE]
    try:
        stream = Stream(found, files.extents(stays))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        tell(LoadEvent("note", "main memory has no room for buffers: weights are read from the file page by page"))
        return None
    told = f"{len(found)} blocks are read from the file as they run, ahead of it, by {STREAM_BUFFERS} buffers"
    tell(LoadEvent("stream", f"{told} of {format_bytes(stream.nbytes)}"))
    return stream


class _Files:
    """A checkpoint's files, opened as they are needed, and where tensors are maps of them."""

    def __init__(self, index: CheckpointIndex) -> None:
        self._tensors: dict[str, list[TensorInfo]] = {}
        for tensor in sorted(index.tensors.values(), key=lambda tensor: tensor.begin):
            self._tensors.setdefault(os.path.realpath(index.directory / tensor.file), []).append(tensor)
        self._maps = FileMaps(self._tensors)
        self._open: dict[str, WeightsFile] = {}

    def _file(self, path: str) -> WeightsFile:
        if path not in self._open:
            self._open[path] = WeightsFile(path, self._tensors[path])
        return self._open[path]

    def _extents(self, homes: Iterable[torch.Tensor]) -> dict[int, tuple[torch.Tensor, Extent]]:
        """Return tensors with their bytes in a file by their ids, in the order of the bytes."""
        found = {id(home): (home, extent) for home in homes if (extent := self._maps.extent(home)) is not None}
        return dict(sorted(found.items(), key=lambda item: (item[1][1].path, item[1][1].begin)))

    def weights(self, homes: Iterable[torch.Tensor]) -> _Weights | None:
        """Return how a block is read, or None where none of its tensors is a map of a file."""
        parts: list[_Part] = []
        places: list[tuple[torch.Tensor, int]] = []
        for home, extent in self._extents(homes).values():
            if extent.begin % home.itemsize:
                continue  # no tensor can be made of it where it would lie
            last = parts[-1] if parts else None
            if last and extent.path == last.extent.path and extent.aligned().begin <= last.extent.aligned().end:
                parts[-1] = replace(last, extent=replace(last.extent, end=max(last.extent.end, extent.end)))
            else:
                parts.append(_Part(self._file(extent.path), extent, last.end if last else 0))
            places.append((home, parts[-1].place + extent.begin - parts[-1].extent.aligned().begin))
        if not parts:
            return None
        return _Weights(tuple(parts), tuple(places), parts[-1].end)

    def extents(self, blocks: Iterable[PlacedBlock]) -> list[tuple[WeightsFile, Extent]]:
        """Return the bytes that blocks take in the files."""
        found = [self.weights(block.homes) for block in blocks]
        return [(part.file, part.extent) for weights in found if weights for part in weights.parts]
