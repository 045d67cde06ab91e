"""Caches whose shapes never change, over the room that `RoomyLayer` keeps.

A compiled step wants keys and values of one shape, however many tokens they hold, and the number of those as a tensor.
transformers' static cache is both. Here it lies over tensors that are there already: the same memory serves either
form, and nothing is copied between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer, StaticCache, StaticLayer

from lyra_emergence.runtime.kv_cache import RoomyLayer

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CAPACITIES", "StaticCaches", "capacity_for"]

CAPACITIES = (512, 2048, 8192, 32768)
"""Tokens that static caches hold, where the context allows: each one is traced by itself, so there are few."""
_CACHE = "past_key_values"


def capacity_for(tokens: int, context: int) -> int:
    """Return the tokens that static caches get room for, where `tokens` are to come at most."""
    return min(context, next((capacity for capacity in CAPACITIES if capacity >= tokens), context))


class StaticCaches:
    """A static form of the caches of one generator.

    Valid for as long as nobody else cuts, moves or adds to the caches that it lies over.

    Args:
        layers: Every layer's caches, with their room.
        config: transformers' configuration of the model.
        held: Tokens that they hold.

    Attributes:
        caches: As the model takes them.
        held: Tokens that they hold now.
    """

    def __init__(self, layers: list[RoomyLayer], config: Any, held: int) -> None:
        self._layers = layers
        self.held = held
        assert layers[0].room is not None
        cache = StaticCache(config=config, max_cache_len=layers[0].room[0].shape[-2])
        for static, roomy in zip(cache.layers, layers, strict=True):
            _lay_over(static, roomy, held)
        self.caches = {_CACHE: cache}

    @classmethod
    def over(cls, caches: Mapping[str, Any], config: Any, held: int, capacity: int) -> StaticCaches | None:
        """Return the static form of caches that hold `held` tokens, once they have room for `capacity`.

        None where they are of a class that has none, such as a window that slides.

        Raises:
            RuntimeError: Memory ran out; the layers that have room keep it, and the others are as they were.
        """
        cache = caches.get(_CACHE)
        layers = getattr(cache, "layers", None)
        if len(caches) != 1 or not isinstance(layers, list) or not layers:
            return None
        if not all(type(layer) in (DynamicLayer, RoomyLayer) and layer.is_initialized for layer in layers):
            return None
        if any(type(layer) is not StaticLayer for layer in StaticCache(config=config, max_cache_len=capacity).layers):
            return None
        for at, layer in enumerate(layers):
            layers[at] = _with_room(layer, capacity)
        return cls(layers, config, held)

    def advance(self, tokens: int) -> None:
        """Count tokens that a step has added."""
        self.held += tokens

    def settle(self) -> None:
        """Let the caches that it lies over show all that is held."""
        for layer in self._layers:
            layer.show(self.held)


def _with_room(layer: DynamicLayer, capacity: int) -> RoomyLayer:
    """Return a layer's caches with room for `capacity` tokens, all of it numbers: a mask does not hide what is none."""
    held = layer.get_seq_length()
    if isinstance(layer, RoomyLayer) and _room_of(layer) == capacity:
        return layer
    roomy = RoomyLayer(capacity)
    roomy.lazy_initialization(layer.keys, layer.values)
    roomy.device = layer.keys.device
    made = tuple(like.new_zeros((*like.shape[:-2], capacity, like.shape[-1])) for like in (layer.keys, layer.values))
    for new, old in zip(made, (layer.keys, layer.values), strict=True):
        new[..., :held, :] = old
    roomy.room = (made[0], made[1])
    roomy.show(held)
    return roomy


def _room_of(layer: RoomyLayer) -> int:
    return layer.room[0].shape[-2] if layer.room is not None and layer.shows_room() else 0


def _lay_over(static: Any, roomy: RoomyLayer, held: int) -> None:
    """Give a static layer that is empty the tensors of `roomy`, as its own initialization would make them."""
    assert roomy.room is not None
    keys, values = roomy.room  # (batch, heads, capacity, head size) each
    static.dtype, static.device = keys.dtype, keys.device
    static.batch_size, static.num_heads = keys.shape[:2]
    static.k_head_dim, static.v_head_dim = keys.shape[-1], values.shape[-1]
    static.keys, static.values = keys, values
    static.cumulative_length = torch.tensor(held, device=keys.device)
    for tensor in (keys, values, static.cumulative_length):
        torch._dynamo.mark_static_address(tensor)  # noqa: SLF001 - as transformers does: else nothing is recorded
    static.is_initialized = True
