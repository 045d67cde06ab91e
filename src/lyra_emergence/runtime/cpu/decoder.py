"""Decoder layers of Llama's kind on the CPU: one token through a whole layer in one call of the compiled kernels.

What it saves is not arithmetic but everything around it: some twenty operators a layer, each with its own checks, and
the threads that wait for each other at each. The rounding between operators is that of transformers' own layer. What
the kernels do not cover (several tokens, a mask, a sliding window, another device) goes through that layer.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from lyra_emergence.runtime.cpu.library import Layer, Library, Matrix
from lyra_emergence.runtime.cpu.linear import KINDS, matrix_of
from lyra_emergence.runtime.cpu.packed import PackedProjection, tensors_of
from lyra_emergence.runtime.kv_cache import RoomyLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["agrees", "fuse", "is_known", "passes"]

_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Classes of transformers whose layers compute what `lyra_layer` computes; `agrees` checks each model all the same."""
_ACTIVATIONS = {"SiLUActivation": 0, "SiLU": 0, "GELUTanh": 1, "PytorchGELUTanh": 1}
_TRIED = 5
"""Tokens that are cached before the one that is tried."""
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of the change that a layer makes: some roundings of the dtype."""
_PROJECTIONS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_PACKED_KINDS = (3, 4)
_NORMS = {
    "norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
}


def is_known(layer: nn.Module) -> bool:
    """Return whether `layer` is of a kind that the kernels know."""
    return _shape_of(layer) is not None


def fuse(layer: nn.Module, library: Library) -> bool:
    """Let `layer` run single tokens through the kernels wherever its weights are on the CPU.

    Returns:
        Whether the layer is of a kind that they know.
    """
    shape = _shape_of(layer)
    if shape is None:
        return False
    layer.forward = _Forward(layer, library, shape)
    return True


def _slides(attention: Any) -> bool:
    """Return whether attention sees a window of the latest tokens alone."""
    kinds = getattr(attention.config, "layer_types", None)
    if kinds:
        return bool(kinds[attention.layer_idx] != "full_attention")
    return bool(getattr(attention.config, "sliding_window", None))


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a layer's modules say of it."""

    heads: int
    key_heads: int
    head_size: int
    scaling: float
    epsilon: float
    activation: int
    index: int


def _shape_of(layer: nn.Module) -> _Shape | None:
    attention: Any = getattr(layer, "self_attn", None)
    if type(layer).__name__ not in _LAYERS or attention is None or _slides(attention):
        return None
    activation = _ACTIVATIONS.get(type(getattr(layer.mlp, "act_fn", None)).__name__)
    head_size = getattr(attention, "head_dim", 0)
    epsilon: Any = getattr(layer.input_layernorm, "variance_epsilon", None)
    if activation is None or not head_size or head_size % 2 or epsilon is None:
        return None
    return _Shape(
        heads=attention.q_proj.out_features // head_size,
        key_heads=attention.k_proj.out_features // head_size,
        head_size=head_size,
        scaling=float(attention.scaling),
        epsilon=float(epsilon),
        activation=activation,
        index=int(attention.layer_idx),
    )


class _Forward:
    """The forward pass of one layer."""

    def __init__(self, layer: nn.Module, library: Library, shape: _Shape) -> None:
        # Not the layer itself: it holds this, and neither would go without a collection of garbage.
        self._layer = weakref.ref(layer)
        self._whole: Any = type(layer).forward
        self._library = library
        self._shape = shape
        self._norms = [name for name, path in _NORMS.items() if _has(layer, path)]
        norms = (_NORMS[name] for name in self._norms)
        self._places = tuple(_places(layer, (*_PROJECTIONS.values(), *norms)))
        self._held: list[weakref.ref[torch.Tensor] | None] = []
        self._struct: Layer | None = None
        self._kind = -1

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        angles = kwargs.get("position_embeddings")
        if hidden_states.shape[:-1] == (1, 1) and not args and angles is not None and cache is not None:
            kept = cache.layers[self._shape.index] if self._shape.index < len(cache.layers) else None
            if isinstance(kept, RoomyLayer) and self._takes(hidden_states, kept, kwargs):
                return self._run(hidden_states, kept, *angles)
        return self._whole(self._layer(), hidden_states, *args, **kwargs)

    def _takes(self, hidden_states: torch.Tensor, kept: RoomyLayer, kwargs: dict[str, Any]) -> bool:
        if kwargs.get("attention_mask") is not None or not kept.get_seq_length() or torch.is_grad_enabled():
            return False
        if kwargs.get("output_attentions") or hidden_states.device.type != "cpu":
            return False
        struct = self._described()
        return (
            struct is not None
            and KINDS.get(hidden_states.dtype) == self._kind
            and kept.keys.dtype == hidden_states.dtype
        )

    def _described(self) -> Layer | None:
        """Return the layer's weights as the kernels see them; described anew where they have moved."""
        modules = [parent[leaf] for parent, leaf in self._places]
        now = [tensor for module in modules for tensor in tensors_of(module)]
        held = [reference and reference() for reference in self._held]
        if len(now) != len(held) or any(new is not old for new, old in zip(now, held, strict=True)):
            # Copies that a block holds only while it runs are not held longer here.
            self._held = [None if tensor is None else weakref.ref(tensor) for tensor in now]
            self._struct = self._describe(
                modules[: len(_PROJECTIONS)], [m.weight for m in modules[len(_PROJECTIONS) :]]
            )
        return self._struct

    def _describe(self, projections: list[Any], norms: list[Any]) -> Layer | None:
        shape = self._shape
        matrices = [_matrix(projection) for projection in projections]
        kinds = {KINDS.get(norm.dtype, -1) for norm in norms}
        kinds |= {matrix.kind for matrix in matrices if matrix is not None} - set(_PACKED_KINDS)
        if None in matrices or len(kinds) != 1 or not all(norm.is_cpu for norm in norms):
            return None
        self._kind = kinds.pop()
        named: dict[str, Matrix] = dict(zip(_PROJECTIONS, matrices, strict=True))  # type: ignore[arg-type]
        addresses: dict[str, int | None] = dict.fromkeys(_NORMS)
        addresses |= {name: norm.data_ptr() for name, norm in zip(self._norms, norms, strict=True)}
        return Layer(
            kind=self._kind,
            activation=shape.activation,
            hidden=named["query"].columns,
            heads=shape.heads,
            key_heads=shape.key_heads,
            head_size=shape.head_size,
            epsilon=shape.epsilon,
            scaling=shape.scaling,
            **addresses,
            **named,
        )

    def _run(
        self, hidden_states: torch.Tensor, kept: RoomyLayer, cosine: torch.Tensor, sine: torch.Tensor
    ) -> torch.Tensor:
        held = kept.get_seq_length()
        keys, values = kept.make_room(held + 1, kept.keys, kept.values)
        out = hidden_states.clone(memory_format=torch.contiguous_format)
        cosine, sine = cosine.contiguous(), sine.contiguous()
        self._library.layer(
            ctypes.byref(self._struct),  # type: ignore[arg-type]
            out.data_ptr(),
            cosine.data_ptr(),
            sine.data_ptr(),
            KINDS[cosine.dtype],
            keys.data_ptr(),
            values.data_ptr(),
            keys.shape[-2],
            held,
            torch.get_num_threads(),
        )
        kept.show(held + 1)
        return out


def _places(layer: nn.Module, paths: Iterable[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield where each module is held, and under what name: who packs a projection puts another in its place."""
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        yield (layer.get_submodule(parent) if parent else layer)._modules, leaf  # noqa: SLF001


def _matrix(projection: Any) -> Matrix | None:
    if isinstance(projection, PackedProjection):
        return projection.matrix
    return matrix_of(*tensors_of(projection)) if type(projection) is nn.Linear else None


def _has(layer: nn.Module, path: str) -> bool:
    parent, _, leaf = path.rpartition(".")
    return isinstance(getattr(layer.get_submodule(parent) if parent else layer, leaf, None), nn.Module)


class _Trial:
    """Made-up hidden states, and what a layer makes of the last one.

    Args:
        model: The model, which knows the angles of positions.
        layer: One of its layers, of a kind that the kernels know.
    """

    def __init__(self, model: Any, layer: nn.Module) -> None:
        norm: Any = layer.input_layernorm
        made = torch.Generator().manual_seed(0)
        self._config = model.config
        self._states = torch.randn((1, _TRIED + 1, norm.weight.shape[0]), generator=made).to(norm.weight.dtype)
        self._positions = torch.arange(_TRIED + 1)[None]
        self._cosine, self._sine = model.model.rotary_emb(self._states, self._positions)

    @property
    def last(self) -> torch.Tensor:
        """The state of the token that is tried, (1, 1, hidden)."""
        return self._states[:, _TRIED:]

    def prepare(self, layer: nn.Module, shape: _Shape) -> DynamicCache:
        """Return caches that hold the tokens before the last one."""
        cache = DynamicCache(config=self._config)
        cache.layers[shape.index] = RoomyLayer(_TRIED + 1)
        self._run(layer.forward, cache, slice(0, _TRIED))
        return cache

    def run(self, forward: Any, cache: DynamicCache) -> torch.Tensor:
        """Return what `forward` makes of the last token, (1, 1, hidden)."""
        return self._run(forward, cache, slice(_TRIED, _TRIED + 1))

    def _run(self, forward: Any, cache: DynamicCache, part: slice) -> torch.Tensor:
        angles = (self._cosine[:, part], self._sine[:, part])
        output = forward(
            self._states[:, part],
            position_ids=self._positions[:, part],
            past_key_values=cache,
            position_embeddings=angles,
        )
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return hidden


def _can_try(model: Any) -> bool:
    return getattr(getattr(model, "model", None), "rotary_emb", None) is not None


@torch.inference_mode()
def agrees(model: Any, layer: nn.Module, library: Library) -> bool:
    """Return whether the kernels compute for `layer` what its own forward pass does, tried on made-up hidden states.

    A class may be known and its configuration ask for something else.
    """
    shape = _shape_of(layer)
    if shape is None or not _can_try(model):
        return False
    trial = _Trial(model, layer)
    own, fused = (
        trial.run(forward, trial.prepare(layer, shape)).float()
        for forward in (layer.forward, _Forward(layer, library, shape))
    )
    # The change that the layer makes, not what it passes on, is to be the same.
    change = (own - trial.last.float()).norm()
    return bool((own - fused).norm() <= _TOLERANCE[trial.last.dtype] * change)


def passes(model: Any, layers: Sequence[nn.Module], library: Library) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a pass of one token through each of `layers` in one call of the kernels, and one through their modules."""
    trial = _Trial(model, layers[0])
    shapes = [shape for layer in layers if (shape := _shape_of(layer)) is not None]
    with torch.inference_mode():
        caches = [trial.prepare(layer, shape) for layer, shape in zip(layers, shapes, strict=True)]
    fused = [_Forward(layer, library, shape) for layer, shape in zip(layers, shapes, strict=True)]

    def run(forwards: Sequence[Any]) -> None:
        with torch.inference_mode():
            for forward, cache, shape in zip(forwards, caches, shapes, strict=True):
                trial.run(forward, cache)
                cache.layers[shape.index].crop(-1)

    return partial(run, fused), partial(run, [layer.forward for layer in layers])
