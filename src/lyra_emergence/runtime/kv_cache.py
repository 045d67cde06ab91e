"""What Lyra does with transformers' caches beside passing them on.

Cutting them back, moving a layer's part, and keeping keys and values in main memory for layers of an accelerator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lyra_emergence.errors import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

__all__ = [
    "OffloadedLayer",
    "RoomyLayer",
    "can_move",
    "cut_back",
    "give_room",
    "has_room",
    "held_bytes",
    "move_layer",
    "offload",
    "offloading_caches",
    "onload",
]

_CPU = torch.device("cpu")


class OffloadedLayer(DynamicLayer):  # type: ignore[misc]  # transformers' types are not followed
    """The keys and values of a layer, in main memory while the layer computes on an accelerator.

    A pass adds its tokens to them, and attention gets a copy on the device that lives no longer than it does: the
    caches of one layer are there at a time. Only the new tokens cross to main memory.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in keys and values, (batch, heads, tokens, head size) each; return all so far, on the same device."""
        there = key_states.device
        keys, values = super().update(key_states.to(_CPU), value_states.to(_CPU), *args, **kwargs)
        self.device = there
        return keys.to(there), values.to(there)


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers' types are not followed
    """The keys and values of a layer, with room for the tokens to come: a step adds to them and copies nothing.

    Pages that hold no token yet take no memory. `keys` and `values` are views of what is filled,
    (batch, heads, tokens, head size).

    Args:
        capacity: Tokens that there is room for; more take a larger room, made anew.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.room: tuple[torch.Tensor, torch.Tensor] | None = None
        super().__init__()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in keys and values, (batch, heads, tokens, head size) each; return all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        keys, values = self.make_room(held + key_states.shape[-2], key_states, value_states)
        keys[..., held : held + key_states.shape[-2], :] = key_states
        values[..., held : held + key_states.shape[-2], :] = value_states
        self.show(held + key_states.shape[-2])
        return self.keys, self.values

    def make_room(self, tokens: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tensors like `keys` and `values` with room for `tokens` tokens, which hold what is held."""
        held = self.get_seq_length()
        if self.room is None or self.room[0].shape[-2] < tokens or not self.shows_room():
            capacity = max(self.capacity, tokens)
            made = tuple(like.new_empty((*like.shape[:-2], capacity, like.shape[-1])) for like in (keys, values))
            for new, old in zip(made, (self.keys, self.values), strict=True):
                if held:
                    new[..., :held, :] = old
            self.room = (made[0], made[1])
        return self.room

    def shows_room(self) -> bool:
        """Return whether what is held lies in the room: who cut it or moved it may have put other tensors there."""
        assert self.room is not None
        return not self.get_seq_length() or self.keys.data_ptr() == self.room[0].data_ptr()

    def show(self, tokens: int) -> None:
        """Let the first `tokens` tokens of the room be what is held."""
        assert self.room is not None
        self.keys, self.values = (tensor[..., :tokens, :] for tensor in self.room)


_KNOWN = (DynamicLayer, DynamicSlidingWindowLayer, OffloadedLayer, RoomyLayer)
"""The classes that are known through and through: a class derived from them may keep more than they do."""


def cut_back(caches: Mapping[str, Any], tokens: int) -> bool:
    """Cut the caches of a step that failed halfway back to the `tokens` that they held before it.

    Returns:
        Whether that could be done; else the caches are of no use. A window that has slid, and a recurrent state, keep
        nothing of what they were; and the views take memory, if little, which may be refused.
    """
    try:
        return all(_layer_cut_back(layer, tokens) for layer in _all_layers(caches))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False


def _layer_cut_back(layer: Any, tokens: int) -> bool:
    if type(layer) not in _KNOWN:
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


def can_move(caches: Mapping[str, Any]) -> bool:
    """Return whether `move_layer` can move every layer's part of the caches."""
    return bool(caches) and all(type(layer) in _KNOWN for layer in _all_layers(caches))


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
    if type(layer) not in _KNOWN:
        return False
    if isinstance(layer, OffloadedLayer):
        layer.device = torch.device(device)
        return True
    if isinstance(layer, RoomyLayer):
        layer.room = None
    held = {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    moved = {name: tensor.to(device) for name, tensor in held.items()}
    for name, tensor in moved.items():
        setattr(layer, name, tensor)
    if layer.is_initialized:
        layer.device = torch.device(device)
    return True


def offload(caches: Mapping[str, Any], indices: Collection[int]) -> bool:
    """Move keys and values of the layers numbered `indices` to main memory, whatever computes them.

    A window that slides stays where it is: it is small, and does not grow.

    Returns:
        Whether a layer was moved.

    Raises:
        RuntimeError: Main memory ran out; the layers moved so far stay there, and the others where they were.
    """
    moved = False
    for cache, index in _chosen(caches, indices):
        layer = cache.layers[index]
        if type(layer) in (DynamicLayer, RoomyLayer):
            cache.layers[index] = _in_main_memory(layer)
            moved = True
    return moved


def _in_main_memory(layer: DynamicLayer) -> OffloadedLayer:
    offloaded = OffloadedLayer()
    if layer.is_initialized:
        offloaded.lazy_initialization(layer.keys, layer.values)
        offloaded.keys, offloaded.values = layer.keys.to(_CPU), layer.values.to(_CPU)
    return offloaded


def onload(caches: Mapping[str, Any], indices: Collection[int]) -> None:
    """Move what `offload` took to main memory back to the devices that compute it.

    Raises:
        RuntimeError: Memory ran out; the layers moved so far stay there, and the others in main memory.
    """
    for cache, index in _chosen(caches, indices):
        layer = cache.layers[index]
        if type(layer) is not OffloadedLayer:
            continue
        back = DynamicLayer()
        if layer.is_initialized:
            back.lazy_initialization(layer.keys, layer.values)
            back.device = layer.device
            back.keys, back.values = layer.keys.to(layer.device), layer.values.to(layer.device)
        cache.layers[index] = back


def _chosen(caches: Mapping[str, Any], indices: Collection[int]) -> Iterator[tuple[Any, int]]:
    for cache in caches.values():
        layers = getattr(cache, "layers", None)
        if isinstance(layers, list):
            yield from ((cache, index) for index in indices if index < len(layers))


def offloading_caches(config: Any, indices: Collection[int]) -> dict[str, Any]:
    """Return empty caches for a model, of which the layers numbered `indices` lie in main memory.

    Args:
        config: transformers' configuration of a model whose caches are of the classes known here.
        indices: Numbers of layers.
    """
    caches = {"past_key_values": DynamicCache(config=config)}
    offload(caches, indices)
    return caches


def give_room(caches: Mapping[str, Any], indices: Collection[int], capacity: int) -> None:
    """Make room for `capacity` tokens in the caches of the layers numbered `indices`, unless their window slides.

    Raises:
        RuntimeError: Memory ran out; the layers that have room keep it, and the others are as they were.
    """
    for cache, index in _chosen(caches, indices):
        layer = cache.layers[index]
        if type(layer) is DynamicLayer and layer.is_initialized and layer.get_seq_length():
            roomy = RoomyLayer(capacity)
            roomy.lazy_initialization(layer.keys, layer.values)
            roomy.keys, roomy.values = layer.keys, layer.values
            roomy.make_room(layer.get_seq_length(), layer.keys, layer.values)
            roomy.show(layer.get_seq_length())
            cache.layers[index] = roomy


def held_bytes(caches: Mapping[str, Any], device: str) -> int:
    """Return the bytes of keys and values on `device`, where the caches tell their layers apart.

    Room for tokens to come is counted on an accelerator; in main memory it takes none until it is written to.
    """
    there = torch.device(device)
    tensors = (
        tensor for layer in _all_layers(caches) for tensor in _kept_by(layer) if isinstance(tensor, torch.Tensor)
    )
    return sum(tensor.nbytes for tensor in tensors if tensor.device == there)


def has_room(caches: Mapping[str, Any], device: str) -> bool:
    """Return whether all caches on `device` have room for the tokens to come already."""
    there = torch.device(device)
    here = [layer for layer in _all_layers(caches) if getattr(layer, "device", None) == there]
    return bool(here) and all(type(layer) is RoomyLayer and layer.room is not None for layer in here)


def _kept_by(layer: Any) -> tuple[Any, Any]:
    if type(layer) is RoomyLayer and layer.room is not None and layer.room[0].device != _CPU and layer.shows_room():
        return layer.room
    return getattr(layer, "keys", None), getattr(layer, "values", None)


def _all_layers(caches: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the layers of all caches; None for a cache without them."""
    for cache in caches.values():
        layers = getattr(cache, "layers", None)
        yield from layers if isinstance(layers, list) else (None,)
