"""What one GPU of a tensor-parallel group holds of a model, from the same footprint as a plan for one machine.

The cuts are vLLM's, which follow Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053): query heads, MLPs, experts and
the vocabulary are divided; norms, biases, routers and what projects to a latent are on every GPU. Where a group has
more GPUs than there are heads of keys and values, each GPU has one such head, so that heads are there several times
(`get_num_kv_heads` in vllm/config/model.py); a latent's cache is whole on every GPU. The vocabulary is first filled up
to a multiple of 64 (vllm/model_executor/layers/vocab_parallel_embedding.py).

Weights are exact but for biases, of which vLLM divides some. Activations are those of a model with a GPU's share of
heads and widths; for packed weights and for model types whose activations no formula covers they are counted whole,
and so are the latter's caches: too much rather than too little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from lyra_emergence.activations import estimate_activations
from lyra_emergence.footprint import is_known, loaded_bytes
from lyra_emergence.model_shape import ModelShape

if TYPE_CHECKING:
    from lyra_emergence.activations import Activations
    from lyra_emergence.checkpoint import Block, CheckpointIndex, TensorInfo
    from lyra_emergence.footprint import BlockFootprint, Footprint

__all__ = ["FleetModel", "LayerShard", "Shards", "obstacle", "padded_vocab", "shard"]

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_VOCAB_MULTIPLE = 64
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack")
"""Projections for queries, keys and values in one matrix."""
_WHOLE = ("q_a_proj", "kv_a_proj", ".indexer.", ".gate.weight", ".router.weight", "shared_expert_gate")
"""Matrices that every GPU of a group has: what projects to a latent, and what chooses experts."""


@dataclass(frozen=True, slots=True)
class FleetModel:
    """A checkpoint and its footprint.

    Attributes:
        index: The checkpoint.
        footprint: Its bytes, at the context and batch to plan for.
    """

    index: CheckpointIndex
    footprint: Footprint

    @property
    def itemsize(self) -> int:
        """Bytes of an element of what the model computes in."""
        return ITEM_BYTES[self.footprint.dtype]

    @property
    def shape(self) -> ModelShape:
        """The sizes that config.json tells."""
        return ModelShape.read(self.index, itemsize=self.itemsize)


@dataclass(frozen=True, slots=True)
class LayerShard:
    """A GPU's share of one layer and its experts, in bytes.

    Attributes:
        weights: Of its weights.
        kv_cache: Of the keys and values of all sequences at the full context.
        read: Of the weights, what a token reads: of a mixture's experts the active ones.
    """

    weights: int
    kv_cache: int
    read: int


@dataclass(frozen=True, slots=True)
class Shards:
    """A GPU's share of a model in a group of `size`, in bytes.

    Attributes:
        size: GPUs of a group.
        layers: Its share of each layer.
        first: Weights that the first stage has besides: embeddings, and modules that are not run for text.
        last: Weights that the last stage has besides: norm and head.
        tied: Weights of the first stage that the last one needs too, where it is another one.
        head_read: What a token reads beside the layers: norm and head, wherever the head's weights are counted.
        activations: Temporaries at their most, by the parts that a stage runs.
    """

    size: int
    layers: tuple[LayerShard, ...]
    first: int
    last: int
    tied: int
    head_read: int
    activations: Activations

    def beside(self, *, first: bool, last: bool) -> int:
        """Return the bytes of weights that a stage has beside its layers."""
        return self.first * first + self.last * last + self.tied * (last and not first)

    def temporaries(self, *, first: bool, last: bool) -> int:
        """Return the bytes of activations of a stage."""
        return self.activations.of(embedding=first, layer=True, experts=True, head=last)


def padded_vocab(shape: ModelShape) -> int:
    """Return the rows of the embeddings as vLLM makes them."""
    return math.ceil(shape.vocab / _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


def obstacle(model: FleetModel, size: int) -> str:
    """Return why a group of `size` GPUs cannot share each layer; "" where it can."""
    shape = model.shape
    if size == 1:
        return ""
    if not shape.heads or shape.heads % size:
        return f"{shape.heads or 'no known'} attention heads are not divided by {size}"
    keys = 0 if shape.latent else shape.key_heads
    if keys and keys % size and size % keys:
        return f"{keys} heads of keys and values are neither divided by {size} nor divide it"
    widths = {
        "an MLP": shape.intermediate,
        "an expert": shape.expert_width if shape.experts else 0,
        "the shared experts": shape.shared_width if shape.experts else 0,
        "the vocabulary": padded_vocab(shape),
    }
    odd = next((name for name, width in widths.items() if width % size), None)
    return "" if odd is None else f"the width of {odd}, {widths[odd]}, is not divided by {size}"


def shard(model: FleetModel, size: int) -> Shards:
    """Return what a GPU has of `model` in a group of `size`, one that `obstacle` does not speak against."""
    index, shape = model.index, model.shape
    weights = {block.name: _weights(model, shape, block, size) for block in index.blocks}
    blocks = {block.name: block for block in model.footprint.blocks}
    cache = _cache_share(model, shape, size)
    layers = tuple(_layer(layer.index, blocks, weights, cache) for layer in index.layers)
    tied = sum(weights[b.tied_to] for b in index.blocks if b.kind == "head" and b.tied_to)
    last = sum(weights[b.name] for b in index.blocks if b.kind in ("norm", "head"))
    return Shards(
        size=size,
        layers=layers,
        first=sum(weights[b.name] for b in index.blocks if b.kind in ("embedding", "other")),
        last=last,
        tied=tied,
        head_read=last + tied,
        activations=_activations(model, shape, size),
    )


def _layer(
    number: int | None, blocks: dict[str, BlockFootprint], weights: dict[str, int], cache: Fraction
) -> LayerShard:
    mine = [block for block in blocks.values() if block.index == number and block.kind in ("layer", "experts")]
    return LayerShard(
        weights=sum(weights[block.name] for block in mine),
        kv_cache=math.ceil(sum(block.kv_cache for block in mine) * cache),
        read=sum(math.ceil(weights[block.name] * block.active_share) for block in mine),
    )


def _weights(model: FleetModel, shape: ModelShape, block: Block, size: int) -> int:
    footprint, tensors = model.footprint, model.index.tensors
    held = 0
    for name in block.tensors:
        whole = loaded_bytes(tensors[name], block, footprint.dtype, footprint.quantization)
        held += math.ceil(whole * _share(tensors[name], block, shape, size))
    return held


def _share(tensor: TensorInfo, block: Block, shape: ModelShape, size: int) -> Fraction:
    """Return the part of a tensor that a GPU of the group has."""
    if size == 1 or len(tensor.shape) < 2 or block.kind in ("norm", "other"):  # noqa: PLR2004 - vectors are whole
        return Fraction(1)
    if block.kind in ("embedding", "head"):
        in_rows = tensor.shape[0] == shape.vocab
        return Fraction(padded_vocab(shape), size * shape.vocab) if in_rows else Fraction(1)
    name = tensor.name
    if any(part in name for part in _WHOLE):
        return Fraction(1)
    if any(part in name for part in _FUSED):
        return _fused_share(shape, size)
    if "k_proj." in name or "v_proj." in name:
        return Fraction(1, min(size, shape.key_heads or size))
    return Fraction(1, size)


def _fused_share(shape: ModelShape, size: int) -> Fraction:
    keys = shape.key_width + shape.value_width
    whole = shape.heads * shape.key_width + shape.key_heads * keys
    return Fraction(shape.heads // size * shape.key_width + max(1, shape.key_heads // size) * keys, whole)


def _cache_share(model: FleetModel, shape: ModelShape, size: int) -> Fraction:
    if shape.latent or not is_known(model.index):
        return Fraction(1)
    return Fraction(1, min(size, shape.key_heads or 1))


def _activations(model: FleetModel, shape: ModelShape, size: int) -> Activations:
    footprint = model.footprint
    if size == 1 or footprint.quantization is not None or not is_known(model.index):
        return footprint.activations
    mine = replace(
        shape,
        heads=shape.heads // size,
        key_heads=max(1, shape.key_heads // size),
        intermediate=shape.intermediate // size,
        expert_width=shape.expert_width // size,
        shared_width=shape.shared_width // size,
    )
    found = estimate_activations(mine, footprint.context_length, footprint.batch, footprint.chunk)
    return found if any(b.kind == "experts" for b in footprint.blocks) else found.with_experts_in_layers()
