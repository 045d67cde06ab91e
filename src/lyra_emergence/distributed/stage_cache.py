"""Keys and values of a rank that has some of a model's layers only.

transformers asks the first layer's part of a cache how many tokens it holds, which decides about positions and masks. A
rank behind the first has nothing there: its answer is that of a layer of the same kind that it does have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicCache

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["StageCache"]


class StageCache(DynamicCache):  # type: ignore[misc]  # transformers' types are not followed
    """A cache of all layers, of which those in `own` are filled.

    Args:
        config: transformers' configuration of the model.
        own: The numbers of the layers that this rank runs.
    """

    def __init__(self, config: Any, own: Collection[int]) -> None:
        super().__init__(config=config)
        self._own = sorted(own)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens that a layer's part holds, or would hold."""
        return int(super().get_seq_length(self._like(layer_idx)))

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Return how many keys there are for a pass of `query_length` tokens, and the position of the first."""
        length, offset = super().get_mask_sizes(query_length, self._like(layer_idx))
        return length, offset

    def _like(self, index: int) -> int:
        if index in self._own or index >= len(self.layers):
            return index
        slides = self.layers[index].is_sliding
        return next((own for own in self._own if self.layers[own].is_sliding == slides), self._own[0])
