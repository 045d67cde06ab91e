"""Packed projections that are kept from load to load: read as maps of their files, written while a model loads.

What cannot be written is packed again by the next load, and no error. A block's projections are written once they are
where they belong, from the memory that they are in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lyra_emergence.errors import is_out_of_memory
from lyra_emergence.load_report import LoadEvent
from lyra_emergence.packed_files import find_packed_files, read_packed
from lyra_emergence.packed_room import folder_bytes, make_room
from lyra_emergence.runtime.cpu.packed import PackedProjection, PackedWeights
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

    from torch import nn

    from lyra_emergence.checkpoint import CheckpointIndex, TensorInfo
    from lyra_emergence.packed_files import PackedFiles
    from lyra_emergence.packing import Quantization

__all__ = ["PackedStore"]

_CODES, _SCALES = ".codes", ".scales"
_DTYPES = {"U8": torch.uint8, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class PackedStore:
    """The packed projections of one checkpoint.

    Args:
        files: Their files.
        size: Bytes that are going to be packed.
        most: Bytes that the packed weights of all checkpoints may take on disk.
        tell: Called with what is worth knowing.
    """

    def __init__(self, files: PackedFiles, size: int, most: int, tell: Callable[[LoadEvent], None]) -> None:
        self._files = files
        self._size = size
        self._most = most
        self._tell = tell
        self._granted = 0
        self._keeps = True
        self._read = self._written = 0

    @classmethod
    def open(
        cls,
        index: CheckpointIndex,
        quantization: Quantization,
        size: int,
        most: int,
        tell: Callable[[LoadEvent], None],
    ) -> Self | None:
        """Return the store of a checkpoint that is about to be mapped; None where nothing is kept."""
        files = find_packed_files(index, quantization) if most else None
        return None if files is None else cls(files, size, most, tell)

    def read(self, block: str) -> dict[str, PackedWeights]:
        """Return what is kept of a block's projections, by their paths in it, as maps of its file.

        Raises:
            RuntimeError: There is no room for the map.
        """
        path = self._files.path(block)
        tensors = {tensor.name: tensor for tensor in read_packed(path) or ()}
        if not tensors:
            return {}
        try:
            # A private map, as the checkpoint's own: what is written to it never reaches the file.
            storage: Any = torch.UntypedStorage.from_file(str(path), False, max(t.end for t in tensors.values()))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return {}  # removed or exchanged in between
        names = [name.removesuffix(_CODES) for name in tensors if name.endswith(_CODES)]
        pairs = {name: (tensors[name + _CODES], tensors.get(name + _SCALES)) for name in names}
        found = {
            name: PackedWeights(codes, scales, mapped=True)
            for name, pair in pairs.items()
            if (codes := _view(storage, pair[0])) is not None and (scales := _view(storage, pair[1])) is not None
        }
        self._read += sum(weights.codes.nbytes + weights.scales.nbytes for weights in found.values())
        return found

    def keep(self, block: str, modules: Mapping[str, nn.Module]) -> None:
        """Write a block's projections, by their paths in it, unless they come from its file; until `stop_keeping`."""
        packed = {path: module for path, module in modules.items() if isinstance(module, PackedProjection)}
        if not self._keeps or all(module.mapped for module in packed.values()):
            return
        failure = ""
        try:
            if not self._files.is_of_now():
                failure = "the checkpoint has changed since it was opened"
            else:
                failure = self._write(block, packed)
        except Exception as error:
            if not isinstance(error, OSError) and not is_out_of_memory(error):
                raise
            failure = (getattr(error, "strerror", None) or str(error)).lower()
        if failure:
            self._keeps = False
            self._tell(LoadEvent("note", f"packed weights are not kept for the next load: {failure}"))

    def _write(self, block: str, packed: Mapping[str, PackedProjection]) -> str:
        """Write a file; return why there is no room for it."""
        nbytes = sum(module.codes.nbytes + module.scales.nbytes for module in packed.values())
        if nbytes > self._granted:
            there = folder_bytes(self._files.folder)
            wanted = max(self._size, there + nbytes)
            if failure := make_room(self._files, wanted, self._most):
                return failure
            self._granted = wanted - there
        # The codes first: whole multiples of 64 bytes, so that each matrix begins at one.
        codes = [(path + _CODES, "U8", _bytes(module.codes)) for path, module in packed.items()]
        scales = [
            (path + _SCALES, _NAMES[module.scales.dtype], _bytes(module.scales)) for path, module in packed.items()
        ]
        self._files.write(block, [*codes, *scales])
        self._granted -= nbytes
        self._written += nbytes
        return ""

    def stop_keeping(self) -> None:
        """Write nothing from now on, and tell what came of it: in use, a block moves because memory is short."""
        self._keeps = False
        if self._read or self._written:
            self._files.mark_used()
        if self._read:
            self._tell(LoadEvent("pack", f"{format_bytes(self._read)} of packed weights are mapped from the cache"))
        if self._written:
            self._tell(LoadEvent("pack", f"{format_bytes(self._written)} of packed weights are kept for the next load"))


def _view(storage: Any, tensor: TensorInfo | None) -> torch.Tensor | None:
    """Return a tensor of a file that is mapped; None where it is none that is kept there."""
    dtype = None if tensor is None else _DTYPES.get(tensor.dtype)
    if tensor is None or dtype is None or tensor.begin % dtype.itemsize:
        return None
    view = torch.empty(0, dtype=dtype)
    view.set_(storage, tensor.begin // dtype.itemsize, tensor.shape, (1,))  # where it begins, counted in elements
    return view


def _bytes(tensor: torch.Tensor) -> memoryview:
    plain: Any = tensor.detach().view(torch.uint8).numpy()
    return memoryview(plain)
