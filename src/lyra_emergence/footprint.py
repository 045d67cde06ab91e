"""Bytes that a checkpoint takes once loaded: weights, KV cache and activations, from headers and config.json alone.

Weights are exact in the stored dtype and after a dtype change, and exact for the tensors that bitsandbytes packs. The
KV cache is exact for multi-head, grouped-query, multi-query, sliding-window and latent attention as transformers
caches them. Activations are close upper estimates for the model types in `activations.KNOWN_TYPES`. For other types,
whose caches may be recurrent states, a trial forward (`trial.py`) gives both; without one, activations are a guess and
recurrent states are not counted, and a note says so.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lyra_emergence.activations import KNOWN_TYPES, Activations, estimate_activations
from lyra_emergence.errors import ConfigError
from lyra_emergence.framework import KERNELS_KEPT
from lyra_emergence.model_shape import ModelShape
from lyra_emergence.packing import Projection, Quantization, is_quantizable, packed_bytes, packing_costs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lyra_emergence.checkpoint import Block, CheckpointIndex, TensorInfo
    from lyra_emergence.trial import Trial

__all__ = [
    "PREFILL_CHUNK",
    "BlockFootprint",
    "Footprint",
    "default_context",
    "estimate_footprint",
    "is_known",
    "loaded_bytes",
    "packed_layer_bytes",
]

_TYPE_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
TORCH_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
"""torch's names of the dtypes a model computes in, and what a safetensors header calls them."""

PREFILL_CHUNK = 1024
"""Tokens that prefill runs at once by default: it bounds activations whatever the length of the prompt."""
DEFAULT_CONTEXT = 8192
"""Tokens planned for where the user left the context open and the model allows more."""
FALLBACK_CONTEXT = 2048
"""Tokens planned for where config.json does not say how long the context may be."""
_TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Model types whose projections are stored as (inputs, outputs)."""

_ONE_OF_MANY_EXPERTS = re.compile(r"\.experts\.\d+\.")
"""transformers 5 keeps all experts of a layer in one tensor, and makes it where the file has one for each."""


@dataclass(frozen=True, slots=True)
class BlockFootprint:
    """What one block takes on the device that runs it.

    Attributes:
        name: The block's module path.
        kind: "embedding", "layer", "experts", "norm", "head" or "other".
        index: The number of a layer, or of the layer that experts belong to; None for all others.
        tied_to: The block whose weight this one shares, or None.
        weights: Bytes of its own weights in the loaded form.
        kv_cache: Bytes of its keys and values at the full context length.
        mapped: Whether the loaded form is the stored one, so that on the CPU the weights can stay in the file.
        home: Bytes of main memory that the block's CPU form takes beside copies elsewhere, where it is no map of the
            file: experts stored one by one, which transformers merges into one tensor as it opens the checkpoint.
        home_is_copy: Whether on the CPU those very bytes are what `weights` counts; else they come on top.
        experts: How many experts there are; 0 in a block of another kind.
        kept: Bytes of packed weights that the cache folder has: on the CPU they are a map of its file.
        packs: Whether packing it for the CPU takes memory for a moment: not where all that is packed is kept.
        active_share: Of the weights, the share that one token reads: a mixture reads the experts it chooses.
    """

    name: str
    kind: str
    tied_to: str | None
    weights: int
    kv_cache: int
    mapped: bool
    home: int = 0
    home_is_copy: bool = True
    active_share: float = 1.0
    experts: int = 0
    index: int | None = None
    kept: int = 0
    packs: bool = True

    @property
    def mapped_on_cpu(self) -> int:
        """Bytes of its weights that are a map of a file where the block is on the CPU."""
        return self.weights if self.mapped else min(self.kept, self.weights)

    @property
    def nbytes(self) -> int:
        """Weights and KV cache together, in bytes."""
        return self.weights + self.kv_cache

    def read_from(self, blocks: Mapping[str, BlockFootprint]) -> int:
        """Return the bytes of weights that running it reads: of a tied block among `blocks`, also those it shares."""
        return self.weights + (blocks[self.tied_to].weights if self.tied_to else 0)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a whole model takes.

    Attributes:
        blocks: In execution order.
        context_length: Tokens that the KV cache has room for.
        batch: Sequences that run together.
        dtype: torch's name of the dtype that the model computes in.
        quantization: "8bit", "4bit" or None.
        activations: Bytes of temporaries on a device, by the parts of the model that run there.
        packing: Bytes that packing a layer takes in main memory for a moment while it loads on the CPU.
        kernels: Kernels that oneDNN compiles for a prompt and single tokens on the CPU below float32, at least: one for
            each shape of a projection and each number of tokens that run at once; as many as it keeps where shapes
            change with every token (attention that is written out, experts).
        heads_per_key: Query heads for each head of keys and values; None where config.json names none.
        notes: What the figures rest on where config.json did not say it all.
        fused: Whether layers on the CPU are of a kind that Lyra's kernels run in one call.
        chunk: Tokens of a prompt that run at once.
    """

    blocks: tuple[BlockFootprint, ...]
    context_length: int
    batch: int
    dtype: str
    quantization: Quantization | None
    activations: Activations
    packing: int = 0
    kernels: int = 0
    heads_per_key: float | None = None
    notes: tuple[str, ...] = ()
    fused: bool = False
    chunk: int = PREFILL_CHUNK

    @property
    def weights(self) -> int:
        """Bytes of all weights in the loaded form, each tied weight once."""
        return sum(block.weights for block in self.blocks)

    @property
    def kv_cache(self) -> int:
        """Bytes of the whole KV cache at the full context length."""
        return sum(block.kv_cache for block in self.blocks)


FUSED_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers `runtime/cpu/decoder.py` runs in one call, where no window slides."""


def default_context(index: CheckpointIndex) -> int:
    """Return the tokens to plan for where the user left the context open."""
    return min(index.context_length or FALLBACK_CONTEXT, DEFAULT_CONTEXT)


def compute_dtype(index: CheckpointIndex, wanted: str | None) -> str:
    """Return torch's name of the dtype the model will compute in: `wanted`, else the checkpoint's own.

    The checkpoint's own is what transformers' `dtype="auto"` takes: config.json's, else the stored one.
    """
    if wanted not in (None, "auto"):
        return str(wanted)
    named = str(
        _first(index.config, ("dtype", "torch_dtype")) or _first(index.text_config, ("dtype", "torch_dtype")) or ""
    )
    if named.removeprefix("torch.") in TORCH_DTYPES:
        return named.removeprefix("torch.")
    by_header = {header: name for name, header in TORCH_DTYPES.items()}
    return by_header.get(index.dtype, "float32")


def estimate_footprint(
    index: CheckpointIndex,
    *,
    context_length: int | None = None,
    batch: int = 1,
    dtype: str | None = None,
    quantization: Quantization | None = None,
    trial: Trial | None = None,
    like: Footprint | None = None,
    cpu_kernels: bool = False,
    chunk: int = PREFILL_CHUNK,
) -> Footprint:
    """Return the bytes that the checkpoint takes once loaded.

    Args:
        index: The checkpoint.
        context_length: Tokens of prompt and answer together; the model's own (at most 8192) by default.
        batch: Sequences that run together.
        dtype: torch's name of the dtype to compute in; the checkpoint's own by default.
        quantization: How the projections of the layers are packed.
        trial: What a trial forward at this context, batch and dtype took, for a model type that is not a known one.
        like: A footprint of the same checkpoint, dtype and quantization, whose weights need not be summed again.
        cpu_kernels: Whether Lyra's kernels pack the projections that are on the CPU.
        chunk: Tokens of a prompt that run at once.

    Raises:
        ConfigError: The context is longer than the model's, or it or the batch is not positive.
    """
    if batch <= 0:
        raise ConfigError(f"in 'batch': {batch} sequences hold nothing; write a positive number")
    context = _checked_context(index, context_length)
    name = compute_dtype(index, dtype)
    shape = ModelShape.read(index, itemsize=_TYPE_BITS[TORCH_DTYPES[name]] // 8)
    caches = trial.kv_cache if trial else ()
    made = like.blocks if like else _weights(index, name, quantization, shape)
    blocks = tuple(
        replace(loaded, kv_cache=_cache_bytes(block, caches, shape, (context, batch, chunk)))
        for block, loaded in zip(index.blocks, made, strict=True)
    )
    estimated = estimate_activations(shape, context, batch, chunk)
    activations = estimated
    if trial:
        activations = trial.activations.with_unfused_attention(shape, context, batch, chunk)
    if not any(block.kind == "experts" for block in blocks):
        activations = activations.with_experts_in_layers()
    tokens = min(context, chunk) * batch
    costs = packing_costs(_projections(index), quantization, tokens, shape.itemsize, kernels=cpu_kernels)
    if quantization is not None:
        activations = activations.with_unpacked_projection(costs.unpacking, costs.cpu_unpacking)
    return Footprint(
        blocks=blocks,
        context_length=context,
        batch=batch,
        dtype=name,
        quantization=quantization,
        activations=activations,
        packing=costs.packing,
        kernels=_kernels(index, one_chunk=context <= chunk, trial=trial),
        heads_per_key=shape.heads / shape.key_heads if shape.key_heads else None,
        notes=_notes(index, shape, trial),
        fused=index.text_config.get("model_type") in FUSED_TYPES and shape.masks == 1 and batch == 1,
        chunk=chunk,
    )


def _weights(
    index: CheckpointIndex, dtype: str, quantization: Quantization | None, shape: ModelShape
) -> tuple[BlockFootprint, ...]:
    """Return every block with its weights, and no cache."""
    experts = shape.experts
    active = min(1.0, shape.experts_per_token / experts) if experts else 1.0
    transposed = index.model_type in _TRANSPOSED
    as_stored = TORCH_DTYPES[dtype] == index.dtype
    return tuple(
        BlockFootprint(
            name=block.name,
            kind=block.kind,
            tied_to=block.tied_to,
            weights=sum(
                loaded_bytes(index.tensors[t], block, dtype, quantization, transposed=transposed) for t in block.tensors
            ),
            kv_cache=0,
            mapped=_stays_mapped(index, block, dtype, quantization),
            home=sum(index.tensors[t].nbytes for t in block.tensors if _is_merged(t)),
            home_is_copy=as_stored,
            active_share=active if block.kind == "experts" else 1.0,
            experts=experts if block.kind == "experts" else 0,
            index=block.index,
        )
        for block in index.blocks
    )


def is_known(index: CheckpointIndex) -> bool:
    """Return whether the formulas cover the checkpoint's model type, so that no trial forward is needed."""
    return str(index.text_config.get("model_type")) in KNOWN_TYPES


def _notes(index: CheckpointIndex, shape: ModelShape, trial: Trial | None) -> tuple[str, ...]:
    if trial is not None:
        return (f"caches and activations of '{index.model_type}' are from a trial forward without weights",)
    if is_known(index) or not index.model_type:
        return shape.notes
    return (*shape.notes, f"activations of '{index.model_type}' are estimated as for Llama")


def _cache_bytes(block: Block, caches: tuple[int, ...], shape: ModelShape, sizes: tuple[int, int, int]) -> int:
    if block.kind != "layer" or block.index is None:
        return 0
    if block.index < len(caches):
        return caches[block.index]
    return shape.kv_bytes(block.index, *sizes)


def _projections(index: CheckpointIndex) -> tuple[Projection, ...]:
    """Return the matrices of layers that quantization packs."""
    tensors = (index.tensors[name] for layer in index.layers for name in layer.tensors)
    matrices = [tensor for tensor in tensors if is_quantizable(tensor.name, tensor.shape)]
    if index.model_type not in _TRANSPOSED:
        return tuple(Projection(outputs, inputs) for outputs, inputs in (matrix.shape for matrix in matrices))
    # What is stored as (inputs, outputs) is turned before it is packed.
    return tuple(Projection(matrix.shape[1], matrix.shape[0], matrix.nbytes) for matrix in matrices)


def _kernels(index: CheckpointIndex, *, one_chunk: bool, trial: Trial | None) -> int:
    """Return the kernels that oneDNN compiles, at least; where shapes change with every token, all that it keeps."""
    if (trial and trial.growing) or any(block.kind == "experts" for block in index.blocks):
        return KERNELS_KEPT
    matrices = (index.tensors[name].shape for layer in index.layers for name in layer.tensors)
    shapes = {shape for shape in matrices if len(shape) == 2}  # noqa: PLR2004
    chunks = 1 if (trial and trial.whole) or one_chunk else 2
    # The head sees single tokens alone.
    return len(shapes) * (chunks + 1) + 1 + (trial.products if trial else 0)


def _checked_context(index: CheckpointIndex, wanted: int | None) -> int:
    if wanted is None:
        return default_context(index)
    if wanted <= 0:
        raise ConfigError(f"in 'context_length': {wanted} tokens hold nothing; write a positive number")
    if index.context_length is not None and wanted > index.context_length:
        raise ConfigError(
            f"in 'context_length': {wanted} tokens is beyond the model's context of {index.context_length}",
            hint=f"write at most {index.context_length}",
        )
    return wanted


def is_floating(dtype: str) -> bool:
    """Return whether a safetensors dtype is a floating-point one that a dtype change converts."""
    return dtype in ("F64", "F32", "F16", "BF16")


def loaded_bytes(
    tensor: TensorInfo, block: Block, dtype: str, quantization: Quantization | None, *, transposed: bool = False
) -> int:
    """Return the bytes of one tensor of `block` in the loaded form; `transposed` as GPT-2 stores its projections."""
    if quantization is not None and block.kind == "layer" and is_quantizable(tensor.name, tensor.shape):
        return packed_bytes(tensor.shape[::-1] if transposed else tensor.shape, quantization)
    if is_floating(tensor.dtype):
        return math.prod(tensor.shape) * _TYPE_BITS[TORCH_DTYPES[dtype]] // 8
    return int(tensor.nbytes)


def packed_layer_bytes(index: CheckpointIndex, layer: Block, quantization: Quantization) -> int:
    """Return the bytes that the packed matrices of a layer take."""
    turned = index.model_type in _TRANSPOSED
    shapes = (t.shape for t in map(index.tensors.__getitem__, layer.tensors) if is_quantizable(t.name, t.shape))
    return sum(packed_bytes(shape[::-1] if turned else shape, quantization) for shape in shapes)


def _is_merged(tensor: str) -> bool:
    return _ONE_OF_MANY_EXPERTS.search(tensor) is not None


def _stays_mapped(index: CheckpointIndex, block: Block, dtype: str, quantization: Quantization | None) -> bool:
    if any(map(_is_merged, block.tensors)):
        return False
    if quantization is not None and block.kind == "layer":
        return False
    wanted = TORCH_DTYPES[dtype]
    return all(not is_floating(t.dtype) or t.dtype == wanted for t in (index.tensors[name] for name in block.tensors))


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)
