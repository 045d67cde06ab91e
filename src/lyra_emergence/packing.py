"""Packed projections: their bytes, and those that packing and unpacking them takes for a moment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "PackingCosts",
    "Projection",
    "Quantization",
    "is_quantizable",
    "kernels_pack",
    "packed_bytes",
    "packing_costs",
]

Quantization = Literal["8bit", "4bit"]

KERNEL_TILE, KERNEL_GROUP = 16, 32
"""Lyra's kernels pack tiles of 16 rows, and groups of 32 inputs (`runtime/cpu/kernels.cpp`)."""
_NF4_BLOCK = 64
"""bitsandbytes keeps one float32 scale for every 64 weights in its 4-bit types."""
_QUANT_CODE_BYTES = 16 * 4
_PACKING_BYTES = 14
"""For each element of a matrix while bitsandbytes packs it on the CPU: in float32, scaled, clamped, and as numbers."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A matrix that quantization packs.

    Attributes:
        outputs: Its rows.
        inputs: Its columns.
        copied: Bytes of a copy that is made before it is packed: of one that is stored as (inputs, outputs).
    """

    outputs: int
    inputs: int
    copied: int = 0

    @property
    def elements(self) -> int:
        """How many weights it has."""
        return self.outputs * self.inputs


@dataclass(frozen=True, slots=True)
class PackingCosts:
    """Bytes that come on top of packed weights for a moment.

    Attributes:
        packing: In main memory, while a projection is packed on the CPU.
        unpacking: On an accelerator, while the largest projection runs, beside its input and output.
        cpu_unpacking: As `unpacking`, on the CPU: Lyra's kernels unpack into room for the largest projection.
    """

    packing: int = 0
    unpacking: int = 0
    cpu_unpacking: int = 0


def packing_costs(
    projections: Sequence[Projection], quantization: Quantization | None, tokens: int, itemsize: int, *, kernels: bool
) -> PackingCosts:
    """Return what packing and unpacking take.

    Args:
        projections: All that are packed.
        quantization: Their form.
        tokens: Tokens that run at once.
        itemsize: Bytes of an element of what the model computes in.
        kernels: Whether Lyra's kernels pack what they can on the CPU; else bitsandbytes packs all.
    """
    if quantization is None:
        return PackingCosts()
    ours = [matrix for matrix in projections if kernels and kernels_pack(matrix.outputs, matrix.inputs)]
    theirs = [matrix for matrix in projections if not (kernels and kernels_pack(matrix.outputs, matrix.inputs))]
    return PackingCosts(
        packing=max(
            _PACKING_BYTES * max((matrix.elements for matrix in theirs), default=0),
            max((matrix.copied for matrix in ours), default=0),
        ),
        unpacking=_unpacking(projections, quantization, tokens, itemsize),
        cpu_unpacking=max(
            _unpacking(theirs, quantization, tokens, itemsize),
            max((matrix.elements for matrix in ours), default=0) * itemsize,
        ),
    )


def _unpacking(projections: Sequence[Projection], quantization: Quantization, tokens: int, itemsize: int) -> int:
    """Return the bytes that bitsandbytes needs beside input and output.

    4-bit prefill unpacks the whole matrix. 8-bit packs its input (a byte per element, and the outliers in full) and
    adds up in int32, which is then scaled in float32.
    """
    if quantization == "4bit":
        return max((matrix.elements for matrix in projections), default=0) * itemsize
    return max((tokens * (8 * m.outputs + (1 + itemsize) * m.inputs) for m in projections), default=0)


def kernels_pack(rows: int, columns: int) -> bool:
    """Return whether the kernels pack a matrix of that shape: whole tiles of rows, whole groups of inputs."""
    return rows % KERNEL_TILE == 0 and columns % KERNEL_GROUP == 0


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether bitsandbytes packs this tensor of a layer: the matrix of a projection.

    Left out are experts, which transformers fuses into one three-dimensional tensor, and the routers that choose
    among them: in transformers 5 neither is a projection.
    """
    is_matrix = name.endswith(".weight") and len(shape) == 2  # noqa: PLR2004
    return is_matrix and ".experts." not in name and not name.endswith((".gate.weight", ".router.weight"))


def packed_bytes(shape: tuple[int, ...], quantization: Quantization) -> int:
    """Return the bytes of a packed matrix of `shape` (rows, columns) with its scales.

    8-bit: a byte per weight and a float32 scale per row. 4-bit (nf4): half a byte per weight, a float32 scale per 64
    weights and the table of 16 codes. As bitsandbytes 0.50 stores them.
    """
    weights = math.prod(shape)
    if quantization == "8bit":
        return weights + 4 * shape[0]
    return (weights + 1) // 2 + 4 * math.ceil(weights / _NF4_BLOCK) + _QUANT_CODE_BYTES
