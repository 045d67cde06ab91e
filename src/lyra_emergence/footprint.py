"""Bytes that a checkpoint takes once loaded: weights, KV cache and activations, from headers and config.json alone.

Weights are exact in the stored dtype and after a dtype change, and exact for the tensors that bitsandbytes packs. The
KV cache is exact for multi-head, grouped-query, multi-query, sliding-window and latent attention as transformers
caches them; recurrent states are not counted. Activations are upper estimates for one prefill chunk.
"""

from __future__ import annotations

import math
import sys
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
_ALL_LAYERS_SLIDE = frozenset({"mistral", "mixtral", "phi3", "phimoe", "starcoder2"})
_FULL_ATTENTION_PERIODS = {"cohere2": 4, "gemma2": 2, "gemma3": 6, "gemma3_text": 6}
"""Where transformers 5.23 takes the alternation from if config.json has no `layer_types`, as older files do."""
_TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Model types whose projections are stored as (inputs, outputs)."""
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
        ConfigError: The context is longer than the model's, or it or the batch is not positive.
    """
    if batch <= 0:
        raise ConfigError(f"in 'batch': {batch} sequences hold nothing; write a positive number")
    context = _checked_context(index, context_length)
    name = compute_dtype(index, dtype)
    shape = _Shape.read(index, itemsize=_TYPE_BITS[TORCH_DTYPES[name]] // 8)
    transposed = index.model_type in _TRANSPOSED
    blocks = tuple(
        BlockFootprint(
            name=block.name,
            kind=block.kind,
            tied_to=block.tied_to,
            weights=sum(
                _loaded_bytes(index.tensors[t], block, name, quantization, transposed=transposed) for t in block.tensors
            ),
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

    Left out are experts, which transformers fuses into one three-dimensional tensor, and the routers that choose
    among them: in transformers 5 neither is a projection.
    """
    is_matrix = name.endswith(".weight") and len(shape) == 2  # noqa: PLR2004
    return is_matrix and ".experts." not in name and not name.endswith((".gate.weight", ".router.weight"))


def _loaded_bytes(
    tensor: TensorInfo, block: Block, dtype: str, quantization: Quantization | None, *, transposed: bool
) -> int:
    if quantization is not None and block.kind == "layer" and is_quantizable(tensor.name, tensor.shape):
        return packed_bytes(tensor.shape[::-1] if transposed else tensor.shape, quantization)
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
    latent: int | None
    caches: int
    vocab: int
    windows: tuple[int | None, ...]
    experts_per_token: int
    itemsize: int
    notes: tuple[str, ...]

    @classmethod
    def read(cls, index: CheckpointIndex, *, itemsize: int) -> _Shape:
        config = index.text_config
        hidden = _size(config, "hidden_size", "n_embd", "d_model", "dim") or 0
        heads = _size(config, "num_attention_heads", "n_head", "num_heads", "n_heads") or 0
        head_width = _size(config, "head_dim") or (hidden // heads if heads else 0)
        notes = () if heads else ("config.json names no attention heads: no KV cache is counted",)
        key_width = value_width = head_width
        key_heads = _key_heads(config, heads)
        latent = _size(config, "kv_lora_rank")
        if latent:
            # Multi-head latent attention: transformers caches the latent, and expands it for every head as it runs.
            rotary = _size(config, "qk_rope_head_dim") or 0
            key_width = (_size(config, "qk_nope_head_dim") or 0) + rotary
            value_width, key_heads = _size(config, "v_head_dim") or head_width, heads
            latent += rotary + (_size(config, "index_head_dim") or 0)
        inner = _size(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden
        per_token = _size(config, "num_experts_per_tok", "moe_topk", "num_selected_experts") or 1
        return cls(
            hidden=hidden,
            intermediate=inner,
            heads=heads,
            key_heads=key_heads,
            key_width=key_width,
            value_width=value_width,
            latent=latent,
            caches=2 if config.get("model_type") == "longcat_flash" else 1,
            vocab=_size(config, "vocab_size") or 0,
            windows=_windows(config, len(index.layers)),
            experts_per_token=per_token,
            itemsize=itemsize,
            notes=notes,
        )

    def kv_bytes(self, layer: int, context: int, batch: int) -> int:
        """Bytes of one layer's keys and values at their most, (batch, key heads, tokens, width) each.

        A sliding window keeps its last tokens as a view of what the last step made, so a chunk of prefill counts whole.
        """
        window = self.windows[layer] if layer < len(self.windows) else None
        tokens = context if window is None else min(context, window - 1 + PREFILL_CHUNK)
        width = self.latent or self.key_heads * (self.key_width + self.value_width)
        return self.caches * batch * tokens * width * self.itemsize

    def layer_activations(self, tokens: int, context: int, batch: int) -> int:
        """Bytes of temporaries while one layer runs `tokens` tokens against `context` cached ones.

        The cache grows by concatenation, so the old and the new keys of one layer are alive together; a latent one
        is expanded, keys and values. The mask and
        the attention's own workspace are counted for the memory-efficient kernels, which keep no score matrix.
        """
        projections = self.heads * self.key_width + self.key_heads * (self.key_width + self.value_width)
        width = _RESIDUAL_COPIES * self.hidden + _MLP_COPIES * self.intermediate * self.experts_per_token + projections
        wide = self.key_width + self.value_width if self.latent else max(self.key_width, self.value_width)
        grown_cache = batch * context * (self.key_heads * wide + (self.latent or 0)) * self.itemsize
        return tokens * (width + context) * self.itemsize + grown_cache


def _size(config: Mapping[str, Any], *keys: str) -> int | None:
    """Return the first of `keys` that holds a whole number above 0; of a list with one per layer, the largest."""
    for key in keys:
        value = config.get(key)
        numbers = [n for n in (value if isinstance(value, list) else [value]) if type(n) is int and n > 0]
        if numbers:
            return max(numbers)
    return None


def _key_heads(config: Mapping[str, Any], heads: int) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    return _size(config, "num_key_value_heads", "num_kv_heads") or heads


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Return the tokens that each layer's attention looks back over, None where it is all of them.

    Where neither config.json nor the model type tells which layers slide, none does: too much rather than too little.
    """
    sliding, chunk = _size(config, "sliding_window"), _size(config, "attention_chunk_size")
    by_type = {"sliding_attention": sliding, "chunked_attention": chunk}
    types = config.get("layer_types")
    if isinstance(types, list):
        return tuple(by_type.get(kind) if isinstance(kind, str) else None for kind in types)
    period = _full_attention_period(config)
    return tuple(sliding if period is not None and (i + 1) % period else None for i in range(layers))


def _full_attention_period(config: Mapping[str, Any]) -> int | None:
    """Return n where every n-th layer looks back over everything and the others slide, None where none slides."""
    model_type = config.get("model_type")
    if config.get("use_sliding_window") is False or not isinstance(model_type, str):
        return None
    if model_type in _ALL_LAYERS_SLIDE:
        return sys.maxsize
    return _size(config, "sliding_window_pattern") or _FULL_ATTENTION_PERIODS.get(model_type)
