"""Projections on the CPU: compiled kernels for steps of few tokens, torch's for prompts.

A projection keeps its weights where they are, in the checkpoint's map; only what multiplies them changes. So a block
that leaves for an accelerator, or comes back, needs nothing done.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from lyra_emergence.runtime.cpu.library import Matrix

if TYPE_CHECKING:
    from collections.abc import Callable

    from lyra_emergence.runtime.cpu.library import Library

__all__ = ["KINDS", "is_quick", "matrix_of", "quicken"]

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What kernels.cpp calls the dtypes."""


def matrix_of(weight: torch.Tensor, bias: torch.Tensor | None) -> Matrix | None:
    """Return how the kernels see a projection, (outputs, inputs); None where they do not take it.

    The tensors must outlive what is returned.
    """
    plain = weight.device.type == "cpu" and weight.dtype in KINDS and weight.is_contiguous()
    if not plain or (bias is not None and (bias.dtype != weight.dtype or not bias.is_contiguous())):
        return None
    rows, columns = weight.shape
    address = bias.data_ptr() if bias is not None else None
    return Matrix(KINDS[weight.dtype], weight.data_ptr(), None, address, rows, columns)


def quicken(linear: nn.Linear, library: Library, few: Callable[[torch.Tensor, int], bool]) -> None:
    """Let `linear` use the kernels for few tokens wherever its weights are on the CPU.

    Args:
        linear: The projection; what it computes stays the same up to the order of sums.
        library: The kernels.
        few: Whether they are the faster choice for a weight and a number of tokens.
    """
    linear.forward = _Forward(linear, library, few)  # type: ignore[method-assign,assignment]


def is_quick(module: nn.Module) -> bool:
    """Return whether `quicken` was called for `module`."""
    return isinstance(module.forward, _Forward)


class _Forward:
    """The forward pass of one projection."""

    def __init__(self, linear: nn.Linear, library: Library, few: Callable[[torch.Tensor, int], bool]) -> None:
        self._parameters: dict[str, Any] = linear._parameters  # noqa: SLF001 - attributes of modules are slow to read
        self._library = library
        self._few = few
        # Copies that a block holds only while it runs are not held longer here.
        self._weight: Callable[[], torch.Tensor | None] = _nothing
        self._matrix: Matrix | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        rows, columns = weight.shape
        tokens = x.numel() // columns
        if not 0 < tokens <= self._library.most_tokens or x.dtype != weight.dtype or x.device.type != "cpu":
            return functional.linear(x, weight, bias)
        if weight is not self._weight():
            self._weight, self._matrix = weakref.ref(weight), matrix_of(weight, bias)
        if (
            self._matrix is None
            or not self._few(weight, tokens)
            or (torch.is_grad_enabled() and _has_gradient(x, weight))
        ):
            return functional.linear(x, weight, bias)
        x = x.contiguous()
        y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
        kind, threads = KINDS[x.dtype], torch.get_num_threads()
        self._library.linear(x.data_ptr(), y.data_ptr(), kind, tokens, ctypes.byref(self._matrix), threads)
        return y


def _nothing() -> None:
    return None


def _has_gradient(*tensors: torch.Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)
