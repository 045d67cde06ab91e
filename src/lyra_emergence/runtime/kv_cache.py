"""What Lyra does with transformers' caches beside passing them on: cutting them back, and moving a layer's part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["cut_back", "held_bytes", "move_layer"]


def cut_back(caches: Mapping[str, Any], tokens: int) -> bool:
    """Cut the caches of a step that failed halfway back to the `tokens` that they held before it.

    Returns:
        Whether that could be done; else the caches are of no use. A window that has slid, and a recurrent state, keep
        nothing of what they were.
    """
    return all(_layer_cut_back(layer, tokens) for layer in _all_layers(caches))


def _layer_cut_back(layer: Any, tokens: int) -> bool:
    if layer is None or type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return False
    if not layer.is_initialized:
        return True
    if isinstance(layer, DynamicSlidingWindowLayer):
        # `cumulative_length` counts the tokens of the failed step, whether they came to be kept or not.
        if max(layer.cumulative_length, tokens) > layer.sliding_window - 1:
            return False
        layer.cumulative_length = tokens
    if min(layer.keys.shape[-2], layer.values.shape[-2]) < tokens:
        return False
    layer.keys, layer.values = layer.keys[..., :tokens, :], layer.values[..., :tokens, :]
    return True


def move_layer(caches: Mapping[str, Any], index: int, device: str) -> bool:
    """Move the part of the caches that belongs to layer number `index` to `device`.

    Returns:
        Whether that could be done; else the caches do not tell their layers apart, and are of no use.

    Raises:
        RuntimeError: Memory ran out; the part is where it was.
    """
    return all(_part_moved(cache, index, device) for cache in caches.values())


def _part_moved(cache: Any, index: int, device: str) -> bool:
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list) or index >= len(layers):
        return False
    layer = layers[index]
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return False
    held = {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    moved = {name: tensor.to(device) for name, tensor in held.items()}
    for name, tensor in moved.items():
        setattr(layer, name, tensor)
    if layer.is_initialized:
        layer.device = torch.device(device)
    return True


def held_bytes(caches: Mapping[str, Any], device: str) -> int:
    """Return the bytes of keys and values on `device`, where the caches tell their layers apart."""
    there = torch.device(device)
    tensors = (
        tensor
        for layer in _all_layers(caches)
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(tensor, torch.Tensor)
    )
    return sum(tensor.nbytes for tensor in tensors if tensor.device == there)


def _all_layers(caches: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the layers of all caches; None for a cache without them."""
    for cache in caches.values():
        layers = getattr(cache, "layers", None)
        yield from layers if isinstance(layers, list) else (None,)
