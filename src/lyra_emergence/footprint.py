"""Bytes that a checkpoint takes once loaded: weights, KV cache and activations, from headers and config.json alone.

Weights are exact in the stored dtype and after a dtype change, and exact for the tensors that bitsandbytes packs. The
KV cache is exact for multi-head, grouped-query, multi-query, sliding-window and latent attention as transformers
caches them; recurrent states are not counted. Activations are upper estimates for one prefill chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lyra_emergence.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lyra_emergence.checkpoint import Block, CheckpointIndex, TensorInfo

__all__ = ["PREFILL_CHUNK", "BlockFootprint", "Footprint", "Quantization", "default_context", "estimate_footprint"]

_TYPE_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
TORCH_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
"""torch's names of the dtypes a model computes in, and what a safetensors header calls them."""

PREFILL_CHUNK = 1024
"""Tokens that prefill runs at once: it bounds activations whatever the length of the prompt."""
DEFAULT_CONTEXT = 8192
"""Tokens planned for where the user left the context open and the model allows more."""
FALLBACK_CONTEXT = 2048
"""Tokens planned for where config.json does not say how long the context may be."""
_NF4_BLOCK = 64
"""bitsandbytes keeps one float32 scale for every 64 weights in its 4-bit types."""
_QUANT_CODE_BYTES = 16 * 4
_RESIDUAL_COPIES = 6
"""Hidden-sized tensors alive at once in a layer: residual, normed input, query, attention output, two temporaries."""
_MLP_COPIES = 3
"""Intermediate-sized tensors alive at once in a gated MLP: gate, up, their product."""

Quantization = Literal["8bit", "4bit"]


@dataclass(frozen=True, slots=True)
class BlockFootprint:
    """What one block takes on the device that runs it.

    Attributes:
        name: The block's module path.
        kind: "embedding", "layer", "norm", "head" or "other".
        tied_to: The block whose weight this one shares, or None.
        weights: Bytes of its own weights in the loaded form.
        kv_cache: Bytes of its keys and values at the full context length.
        mapped: Whether the loaded form is the stored one, so that on the CPU the weights can stay in the file.
    """

    name: str
    kind: str
    tied_to: str | None
    weights: int
    kv_cache: int
    mapped: bool

    @property
    def nbytes(self) -> int:
        """Weights and KV cache together, in bytes."""
        return self.weights + self.kv_cache


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a whole model takes.

    Attributes:
        blocks: In execution order.
        context_length: Tokens that the KV cache has room for.
        batch: Sequences that run together.
        dtype: torch's name of the dtype that the model computes in.
        quantization: "8bit", "4bit" or None.
        layer_activations: Bytes of temporaries on each device that runs a layer.
        head_activations: Bytes of logits on the device that runs the head.
        notes: What the figures rest on where config.json did not say it all.
    """

    blocks: tuple[BlockFootprint, ...]
    context_length: int
    batch: int
    dtype: str
    quantization: Quantization | None
    layer_activations: int
    head_activations: int
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Bytes of all weights in the loaded form, each tied weight once."""
        return sum(block.weights for block in self.blocks)

    @property
    def kv_cache(self) -> int:
        """Bytes of the whole KV cache at the full context length."""
        return sum(block.kv_cache for block in self.blocks)


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
) -> Footprint:
    """Return the bytes that the checkpoint takes once loaded.

    Args:
        index: The checkpoint.
        context_length: Tokens of prompt and answer together; the model's own (at most 8192) by default.
        batch: Sequences that run together.
        dtype: torch's name of the dtype to compute in; the checkpoint's own by default.
        quantization: How the projections of the layers are packed.

    Raises:
        ConfigError: The context is longer than the model's, or not positive.
    """
    context = _checked_context(index, context_length)
    name = compute_dtype(index, dtype)
    shape = _Shape.read(index, itemsize=_TYPE_BITS[TORCH_DTYPES[name]] // 8)
    blocks = tuple(
        BlockFootprint(
            name=block.name,
            kind=block.kind,
            tied_to=block.tied_to,
            weights=sum(_loaded_bytes(index.tensors[t], block, name, quantization) for t in block.tensors),
            kv_cache=shape.kv_bytes(block.index, context, batch)
            if block.kind == "layer" and block.index is not None
            else 0,
            mapped=_stays_mapped(index, block, name, quantization),
        )
        for block in index.blocks
    )
    tokens = min(context, PREFILL_CHUNK) * batch
    return Footprint(
        blocks=blocks,
        context_length=context,
        batch=batch,
        dtype=name,
        quantization=quantization,
        layer_activations=shape.layer_activations(tokens, context, batch),
        head_activations=shape.vocab * batch * (shape.itemsize + 4),
        notes=shape.notes,
    )


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


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether bitsandbytes packs this tensor of a layer: the matrix of a projection.

    Experts are left out: transformers fuses them into one three-dimensional tensor, which is no projection.
    """
    return name.endswith(".weight") and len(shape) == 2 and ".experts." not in name  # noqa: PLR2004


def _loaded_bytes(tensor: TensorInfo, block: Block, dtype: str, quantization: Quantization | None) -> int:
    if quantization is not None and block.kind == "layer" and is_quantizable(tensor.name, tensor.shape):
        return packed_bytes(tensor.shape, quantization)
    if is_floating(tensor.dtype):
        return math.prod(tensor.shape) * _TYPE_BITS[TORCH_DTYPES[dtype]] // 8
    return int(tensor.nbytes)


def packed_bytes(shape: tuple[int, ...], quantization: Quantization) -> int:
    """Return the bytes of a packed matrix of `shape` (rows, columns) with its scales.

    8-bit: a byte per weight and a float32 scale per row. 4-bit (nf4): half a byte per weight, a float32 scale per 64
    weights and the table of 16 codes. As bitsandbytes 0.50 stores them.
    """
    weights = math.prod(shape)
    if quantization == "8bit":
        return weights + 4 * shape[0]
    return (weights + 1) // 2 + 4 * math.ceil(weights / _NF4_BLOCK) + _QUANT_CODE_BYTES


def _stays_mapped(index: CheckpointIndex, block: Block, dtype: str, quantization: Quantization | None) -> bool:
    if quantization is not None and block.kind == "layer":
        return False
    wanted = TORCH_DTYPES[dtype]
    return all(not is_floating(t.dtype) or t.dtype == wanted for t in (index.tensors[name] for name in block.tensors))


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)


@dataclass(frozen=True, slots=True)
class _Shape:
    """The sizes in config.json that decide about caches and activations."""

    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    key_width: int
    value_width: int
    vocab: int
    window: int | None
    layer_types: tuple[str, ...]
    experts_per_token: int
    itemsize: int
    notes: tuple[str, ...]

    @classmethod
    def read(cls, index: CheckpointIndex, *, itemsize: int) -> _Shape:
        config = index.text_config
        hidden = int(_first(config, ("hidden_size", "n_embd", "d_model", "dim")) or 0)
        heads = int(_first(config, ("num_attention_heads", "n_head", "num_heads", "n_heads")) or 0)
        head_width = int(_first(config, ("head_dim",)) or (hidden // heads if heads else 0))
        notes = () if heads else ("config.json names no attention heads: no KV cache is counted",)
        key_width, value_width, key_heads = head_width, head_width, _key_heads(config, heads)
        if _first(config, ("kv_lora_rank",)):
            # Multi-head latent attention: transformers caches the expanded keys and values of every head.
            key_width = int(config.get("qk_nope_head_dim") or 0) + int(config.get("qk_rope_head_dim") or 0)
            value_width, key_heads = int(config.get("v_head_dim") or head_width), heads
        inner = int(_first(config, ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")) or 4 * hidden)
        per_token = int(_first(config, ("num_experts_per_tok", "moe_topk", "num_selected_experts")) or 1)
        return cls(
            hidden=hidden,
            intermediate=inner,
            heads=heads,
            key_heads=key_heads,
            key_width=key_width,
            value_width=value_width,
            vocab=int(_first(config, ("vocab_size",)) or 0),
            window=_sliding_window(config),
            layer_types=tuple(config.get("layer_types") or ()),
            experts_per_token=per_token,
            itemsize=itemsize,
            notes=notes,
        )

    def kv_bytes(self, layer: int, context: int, batch: int) -> int:
        """Bytes of one layer's keys and values, (batch, key heads, tokens, width) each."""
        kind = self.layer_types[layer] if layer < len(self.layer_types) else None
        tokens = context
        if self.window is not None and kind in (None, "sliding_attention", "chunked_attention"):
            tokens = min(context, self.window)
        return batch * self.key_heads * tokens * (self.key_width + self.value_width) * self.itemsize

    def layer_activations(self, tokens: int, context: int, batch: int) -> int:
        """Bytes of temporaries while one layer runs `tokens` tokens against `context` cached ones.

        The cache grows by concatenation, so the old and the new keys of one layer are alive together. The mask and
        the attention's own workspace are counted for the memory-efficient kernels, which keep no score matrix.
        """
        projections = self.heads * self.key_width + self.key_heads * (self.key_width + self.value_width)
        width = _RESIDUAL_COPIES * self.hidden + _MLP_COPIES * self.intermediate * self.experts_per_token + projections
        grown_cache = batch * self.key_heads * context * max(self.key_width, self.value_width) * self.itemsize
        return tokens * (width + context) * self.itemsize + grown_cache


def _key_heads(config: Mapping[str, Any], heads: int) -> int:
    named = _first(config, ("num_key_value_heads", "num_kv_heads"))
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    return int(named) if named is not None else heads


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    window = config.get("sliding_window")
    # Where "use_sliding_window" is absent, transformers takes the window whenever one is given.
    return int(window) if window and config.get("use_sliding_window", True) else None
