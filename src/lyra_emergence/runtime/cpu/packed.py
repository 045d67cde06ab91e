"""Projections packed to 8 or 4 bits for the CPU, in the kernels' own form.

8 bits: a byte and, for each row, a float32 scale. 4 bits: the 16 levels of NF4 and a float16 scale for every 32 inputs,
so that an outlier spoils half as many neighbours as in bitsandbytes' blocks of 64, at the same bytes. Steps of
few tokens multiply the packed weights, with inputs rounded to 8 bits; prompts unpack them for torch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from lyra_emergence.runtime.cpu.library import Matrix
from lyra_emergence.runtime.cpu.linear import KINDS
from lyra_emergence.runtime.scratch import scratch

if TYPE_CHECKING:
    from typing import Self

    from lyra_emergence.packing import Quantization
    from lyra_emergence.runtime.cpu.library import Library

__all__ = ["PackedProjection", "PackedWeights", "tensors_of"]

_PACKED = {"8bit": 3, "4bit": 4}
_SCALE_DTYPES = {"8bit": torch.float32, "4bit": torch.float16}


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """A packed matrix.

    Attributes:
        codes: Bytes, tile by tile.
        scales: float32 for 8 bits, float16 for 4.
        mapped: Whether they are a map of a file, which costs no memory of its own.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    mapped: bool = False

    def belong_to(self, rows: int, columns: int, quantization: Quantization, library: Library) -> bool:
        """Return whether they have the sizes of a packed matrix of that shape."""
        kind = _PACKED[quantization]
        sizes = (library.packed_codes(kind, rows, columns), library.packed_scales(kind, rows, columns))
        return (self.codes.nbytes, self.scales.nbytes) == sizes and (
            (self.codes.dtype, self.scales.dtype) == (torch.uint8, _SCALE_DTYPES[quantization])
        )


class PackedProjection(nn.Module):
    """A projection in packed form.

    Args:
        weight: (outputs, inputs), float32, bfloat16 or float16; not kept.
        bias: (outputs,) or None, in `dtype`.
        quantization: "8bit" or "4bit".
        library: The kernels.

    Raises:
        RuntimeError: Memory ran out.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, quantization: Quantization, library: Library
    ) -> None:
        super().__init__()
        self._hold(_pack(weight.contiguous(), quantization, library), bias, weight.shape, quantization, library)

    @classmethod
    def of(
        cls,
        weights: PackedWeights,
        bias: torch.Tensor | None,
        shape: tuple[int, ...],
        quantization: Quantization,
        library: Library,
    ) -> Self:
        """Return a projection of weights that are packed already, and belong to its shape."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._hold(weights, bias, shape, quantization, library)  # noqa: SLF001 - its own
        return made

    def _hold(
        self,
        weights: PackedWeights,
        bias: torch.Tensor | None,
        shape: tuple[int, ...],
        quantization: Quantization,
        library: Library,
    ) -> None:
        self._library = library
        self._kind = _PACKED[quantization]
        self.out_features, self.in_features = shape
        # Parameters, so that whoever counts a model's parameters counts these.
        self.codes = nn.Parameter(weights.codes, requires_grad=False)
        self.scales = nn.Parameter(weights.scales, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False) if bias is not None else None
        self.mapped = weights.mapped
        self.matrix = self._described()

    def _described(self) -> Matrix:
        address = self.bias.data_ptr() if self.bias is not None else None
        codes, scales = self.codes.data_ptr(), self.scales.data_ptr()
        return Matrix(self._kind, codes, scales, address, self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the projection of `x`, (..., inputs), as (..., outputs)."""
        tokens = x.numel() // self.in_features
        if not 0 < tokens <= self._library.most_tokens:
            return self._unpacking(x)
        x = x.contiguous()
        y = torch.empty((*x.shape[:-1], self.out_features), dtype=x.dtype)
        threads = torch.get_num_threads()
        self._library.linear(x.data_ptr(), y.data_ptr(), KINDS[x.dtype], tokens, ctypes.byref(self.matrix), threads)
        return y

    def _unpacking(self, x: torch.Tensor) -> torch.Tensor:
        # Whole: in parts of some rows, torch's products take 1.3 to 4 times as long.
        rows = scratch(self.out_features, self.in_features, x.dtype)
        self._unpack_into(rows, 0)
        return functional.linear(x, rows, self.bias)

    def unpacked(self, dtype: torch.dtype, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Return rows of the matrix, (count, inputs); whole tiles of 16."""
        rows = torch.empty((self.out_features - first if count is None else count, self.in_features), dtype=dtype)
        self._unpack_into(rows, first)
        return rows

    def _unpack_into(self, rows: torch.Tensor, first: int) -> None:
        threads, kind = torch.get_num_threads(), KINDS[rows.dtype]
        self._library.unpack(ctypes.byref(self.matrix), first, len(rows), rows.data_ptr(), kind, threads)

    def extra_repr(self) -> str:
        """Return the shape for `repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _pack(weight: torch.Tensor, quantization: Quantization, library: Library) -> PackedWeights:
    kind, (rows, columns) = _PACKED[quantization], weight.shape
    codes = torch.empty(library.packed_codes(kind, rows, columns), dtype=torch.uint8)
    scale_dtype = _SCALE_DTYPES[quantization]
    scales = torch.empty(library.packed_scales(kind, rows, columns) // scale_dtype.itemsize, dtype=scale_dtype)
    addresses = (codes.data_ptr(), scales.data_ptr())
    library.pack(weight.data_ptr(), KINDS[weight.dtype], kind, rows, columns, *addresses, torch.get_num_threads())
    return PackedWeights(codes, scales)


def tensors_of(projection: Any) -> tuple[Any, Any]:
    """Return what a projection multiplies by, and its bias: the objects, to see whether they were exchanged."""
    parameters = projection._parameters  # noqa: SLF001 - attributes of modules are slow to read
    return parameters.get("codes", parameters.get("weight")), parameters.get("bias")
