"""The header of a safetensors file, checked in full before anything relies on it.

A file is eight bytes of header length (little endian), the header (JSON), and the tensors' bytes. Header lengths,
shapes and offsets come from whoever made the file: each is compared with the size of the file before it sizes
anything, so that a lying file costs an error and no memory. A file that passes here passes in the safetensors library
too, which also lets pass what this reader refuses: a tensor named twice, or not at all. Not covered: the tensors'
values, which are never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lyra_emergence.checkpoint.json_files import DAMAGED, open_regular, parse_object, read_fully, shown
from lyra_emergence.errors import CheckpointError
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["DTYPE_BITS", "PREFIX_BYTES", "TensorInfo", "header_length", "parse_header", "read_header"]

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element, for each dtype that safetensors 0.8 knows."""

PREFIX_BYTES = 8
"""Bytes in front of the header, which hold its length."""
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_COUNT = 2**64 - 1
_METADATA = "__metadata__"
_LFS_POINTER = b"version "
_RANGE_ENDS = 2


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: The tensor's name, such as "model.layers.0.mlp.up_proj.weight".
        dtype: As safetensors writes it, such as "BF16"; a key of `DTYPE_BITS`.
        shape: Its dimensions; () for a scalar.
        file: Name of the file within the checkpoint's folder.
        begin: Offset in bytes of its first byte, from the start of the file.
        end: Offset in bytes just behind its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.end - self.begin


def read_header(directory: Path, file: str) -> tuple[TensorInfo, ...]:
    """Return the tensors of `directory`/`file`, in the order of their bytes.

    Raises:
        CheckpointError: The file is missing or unreadable, or its header is not what the format demands; the message
            names the file and, where one is to blame, the tensor.
    """
    path = directory / file
    stream, size = open_regular(path)
    with stream:
        length = header_length(read_fully(stream, PREFIX_BYTES, path), size, str(path))
        raw = read_fully(stream, length, path)
    return parse_header(raw, length, size, str(path), file)


def header_length(prefix: bytes, size: int, where: str) -> int:
    """Return the bytes of the header, from the first `PREFIX_BYTES` of a file of `size` bytes.

    Raises:
        CheckpointError: They are no beginning of a safetensors file of that size; `where` begins the message.
    """
    if size < PREFIX_BYTES or len(prefix) < PREFIX_BYTES:
        raise CheckpointError(f"{where}: {size} bytes are too few for a safetensors file", hint=DAMAGED)
    if prefix == _LFS_POINTER:
        raise CheckpointError(
            f"{where} is a Git LFS pointer, not the weights", hint="run `git lfs pull` in that folder"
        )
    length = int.from_bytes(prefix, "little")
    # Threat: eight bytes may claim an exabyte. Nothing is allocated for more than the file really holds.
    limit = min(size - PREFIX_BYTES, _MAX_HEADER_BYTES)
    if length > limit:
        raise CheckpointError(f"{where}: the header claims {length} bytes; at most {limit} are possible", hint=DAMAGED)
    return length


def parse_header(raw: bytes, length: int, size: int, where: str, file: str) -> tuple[TensorInfo, ...]:
    """Return the tensors that a header describes, in the order of their bytes.

    Args:
        raw: The header as it was read.
        length: The bytes that it should have.
        size: Bytes of the whole file.
        where: What begins the message of each error.
        file: The file's name within the checkpoint.

    Raises:
        CheckpointError: The header is not what the format demands.
    """
    if len(raw) != length:
        raise CheckpointError(f"{where}: it ended while its header was read", hint=DAMAGED)
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{where}: no safetensors file: its header does not begin with '{{'", hint=DAMAGED)
    entries = parse_object(raw, f"{where}: header", strict=True)
    _check_metadata(entries.pop(_METADATA, None), where)
    data_start = PREFIX_BYTES + length
    found = [_tensor(name, entry, where, file, data_start) for name, entry in entries.items()]
    found.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_coverage(found, where, data_start, size)
    return tuple(found)


def _check_metadata(metadata: Any, path: str) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: header: '{_METADATA}' must map text to text", hint=DAMAGED)


def _tensor(name: str, entry: Any, path: str, file: str, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {shown(name)}"
    if not name or not _is_unicode(name):
        raise CheckpointError(f"{where}: the name is {'empty' if not name else 'no valid Unicode'}", hint=DAMAGED)
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where}: needs 'dtype', 'shape' and 'data_offsets'", hint=DAMAGED)
    dtype = entry["dtype"]
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise CheckpointError(
            f"{where}: unknown dtype {shown(dtype)}", hint="a newer safetensors may know it; Lyra knows those of 0.8"
        )
    shape = _counts(entry["shape"], f"{where}: shape")
    offsets = _counts(entry["data_offsets"], f"{where}: data_offsets")
    if len(offsets) != _RANGE_ENDS or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {shown(list(offsets))} are no range", hint=DAMAGED)
    _check_size(where, dtype, bits, shape, offsets[1] - offsets[0])
    return TensorInfo(name, dtype, shape, file, data_start + offsets[0], data_start + offsets[1])


def _is_unicode(name: str) -> bool:
    """Return whether `name` has an encoding; JSON can spell lone surrogates, which no terminal takes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _counts(value: Any, where: str) -> tuple[int, ...]:
    # bool is an int to Python: `type` and not isinstance, or true would pass as 1.
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise CheckpointError(f"{where} {shown(value)} is no list of whole numbers", hint=DAMAGED)
    if not all(0 <= item <= _MAX_COUNT for item in value):
        raise CheckpointError(f"{where} {shown(value)} has a number below 0 or above 2**64 - 1", hint=DAMAGED)
    return tuple(value)


def _check_size(where: str, dtype: str, bits: int, shape: tuple[int, ...], nbytes: int) -> None:
    total = bits
    for length in shape:
        total *= length
        # Also where a later dimension is 0: readers in other languages multiply in 64 bits and would wrap around.
        if total > _MAX_COUNT:
            raise CheckpointError(f"{where}: shape {shown(list(shape))} is larger than any file", hint=DAMAGED)
    if total != 8 * nbytes:
        needed = f"{total // 8} bytes" if total % 8 == 0 else f"{total} bits"
        raise CheckpointError(
            f"{where}: {dtype} of shape {shown(list(shape))} is {needed}, but its offsets span {nbytes} bytes",
            hint=DAMAGED,
        )


def _check_coverage(tensors: Iterable[TensorInfo], path: str, begin: int, end: int) -> None:
    """Check that the tensors cover the bytes from `begin` to `end` without gap or overlap, as the format demands."""
    position = begin
    for tensor in tensors:
        where = f"{path}: tensor {shown(tensor.name)}"
        if tensor.end > end:
            raise CheckpointError(
                f"{where}: ends {format_bytes(tensor.end - end)} beyond the end of the file", hint=DAMAGED
            )
        if tensor.begin < position:
            raise CheckpointError(f"{where}: overlaps the tensor before it", hint=DAMAGED)
        if tensor.begin > position:
            raise CheckpointError(f"{where}: a gap of {tensor.begin - position} bytes before it", hint=DAMAGED)
        position = tensor.end
    if position != end:
        raise CheckpointError(f"{path}: {end - position} bytes follow the last tensor", hint=DAMAGED)
