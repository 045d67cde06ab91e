"""Counting the bytes of tensors as operators make them, and what kernels of the CPU take beside them."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lyra_emergence.activations import packed_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = ["FusedAttention", "LiveBytes"]

_FLOAT32 = 4
_PRODUCTS = {torch.ops.aten.bmm.default: (0, 1), torch.ops.aten.baddbmm.default: (1, 2)}
"""Products of many matrices, and which of their arguments these are."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Counts the bytes of every storage that operators make, from its making until nothing holds it.

    Attributes:
        now: Bytes alive.
        peak: The most that `now` was since `forget_peaks`.
        cpu_peak: The most that it was with what kernels take beside tensors on the CPU.
        projecting: The most that it was as a projection returned.
        products: Shapes of the products of several matrices below float32, as attention that is written out makes them.

    Args:
        known: Tensors that were there before, such as weights; they are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.products: set[tuple[torch.Size, ...]] = set()
        self.forget_peaks()
        # Held by their storages' ids; the weak reference says when an id is free again.
        self._seen: dict[int, Any] = {id(storage): storage for storage in (t.untyped_storage() for t in known)}

    def forget_peaks(self) -> None:
        """Begin a new count of the most."""
        self.peak = self.cpu_peak = self.projecting = self.now

    def beside(self, nbytes: int) -> None:
        """Count what a kernel on the CPU takes for a moment."""
        self.cpu_peak = max(self.cpu_peak, self.now + nbytes)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, by its parts where it has parts, and count what it makes."""
        kwargs = kwargs or {}
        with self:
            # Where autograd is off, an operator made of others arrives whole: its own temporaries count too.
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        if func in _PRODUCTS and _is_low(result):
            factors = [args[place] for place in _PRODUCTS[func]]
            self.products.add(tuple(factor.shape for factor in factors))
            self.beside(sum(map(_copied, factors)))
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen[key] = weakref.ref(storage, partial(self._gone, key, size))
        self.now += size
        self.peak = max(self.peak, self.now)
        self.cpu_peak = max(self.cpu_peak, self.now)

    def _gone(self, key: int, size: int, _: object) -> None:
        if self._seen.pop(key, None) is not None:
            self.now -= size


def _copied(matrices: torch.Tensor) -> int:
    """Return the bytes of the copy that oneDNN makes of matrices, (count, rows, columns), with gaps between rows."""
    in_rows = matrices.is_contiguous() or matrices.transpose(1, 2).is_contiguous()
    return 0 if in_rows else matrices.numel() * matrices.itemsize


def _is_low(matrices: torch.Tensor) -> bool:
    return matrices.is_floating_point() and matrices.itemsize < _FLOAT32


class FusedAttention(TorchFunctionMode):
    """Stands in for fused attention, which has no kernel on the meta device; marks the moments of projections.

    Args:
        live: What counts.
    """

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self._live = live

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _attend(self._live, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func in (functional.linear, torch.addmm):
            self._live.projecting = max(self._live.projecting, self._live.now)
        return result


def _attend(
    live: LiveBytes,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *_: object,
    **__: object,
) -> torch.Tensor:
    """Makes what the fused kernels make: the mask in the query's dtype, a row of sums, and the output."""
    rows, heads, tokens, width = query.shape
    mask = attn_mask.to(query.dtype) if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
    output = query.new_empty((rows, tokens, heads, value.shape[-1])).transpose(1, 2)
    sums = query.new_empty((rows, heads, tokens), dtype=torch.float32)
    live.beside(packed_keys(rows * heads, tokens, key.shape[-2], width + value.shape[-1], query.itemsize))
    del mask, sums
    return output
