"""The sizes in config.json that decide about caches and activations, under the names that architectures give them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lyra_emergence.checkpoint import CheckpointIndex

__all__ = ["ModelShape"]

_SECOND_MASK = frozenset({"qwen2_moe"})
"""Types of transformers 5.23 that combine two masks into a third though none of their layers slides."""
_MLP_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
_ROTARY_SHARES = ("partial_rotary_factor", "rotary_pct")
_WRITTEN_OUT = frozenset({"gelu_new", "gelu_fast", "quick_gelu", "gelu_python"})
"""Activations that transformers computes from several operators, each with a result of its own."""

_ALL_LAYERS_SLIDE = frozenset({"mistral", "mixtral", "phi3", "phimoe", "starcoder2"})
_FULL_ATTENTION_PERIODS = {"cohere2": 4, "gemma2": 2, "gemma3": 6, "gemma3_text": 6}
"""Where transformers 5.23 takes the alternation from if config.json has no `layer_types`, as older files do."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder; widths in elements.

    Attributes:
        hidden: Width of the hidden state.
        intermediate: Width of a dense layer's MLP; 0 where every layer has experts instead.
        heads: Query heads.
        key_heads: Heads of keys and values: fewer than `heads` where these share them.
        key_width: Width of one head's queries and keys.
        value_width: Width of one head's values.
        rotary_width: The part of a key's width that turns with its position.
        latent: Width of what multi-head latent attention caches for a token, or None.
        caches: Caches of each layer.
        vocab: Tokens of the vocabulary.
        windows: Tokens that each layer looks back over, None where it is all of them.
        experts: Experts of a mixture; 0 without.
        experts_per_token: Experts that each token goes through.
        expert_width: Width of one expert's MLP.
        shared_width: Width of the MLP that every token goes through beside its experts.
        mlp_copies: Tensors of the MLP's width alive at once.
        mlp_inline: Whether the MLP is written out in the layer (OPT), so that its input is gone once it has run.
        parallel: Whether attention and MLP have the same input (GPT-NeoX).
        masks: Attention masks of the widest layers alive at once: a window's is made from two others.
        turned_share: The share of a key's width that turns with its position; the rest is joined to it anew.
        queries_twice: Whether a second tensor of the queries' size lives beside them: the output of one projection for
            queries, keys and values, or the part of them that is turned by position.
        learned_positions: Whether positions are looked up in a table of their own.
        itemsize: Bytes of an element.
        notes: What config.json left open, and what was taken.
    """

    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    key_width: int
    value_width: int
    rotary_width: int
    latent: int | None
    caches: int
    vocab: int
    windows: tuple[int | None, ...]
    experts: int
    experts_per_token: int
    expert_width: int
    shared_width: int
    mlp_copies: int
    mlp_inline: bool
    parallel: bool
    masks: int
    turned_share: float
    queries_twice: bool
    learned_positions: bool
    itemsize: int
    notes: tuple[str, ...]

    def reach(self, context: int, chunk: int) -> int:
        """Return the tokens that the widest layer's attention has behind and before it, of `context` at most."""
        return max((_kept(window, context, chunk) for window in self.windows), default=context)

    def filled(self, whole: int, context: int, chunk: int) -> float:
        """Return how full the fullest layer's cache is after `whole` tokens, as a share of its most in `context`."""
        windows = self.windows or (None,)
        return max(_longest(window, whole, chunk) / _longest(window, context, chunk) for window in windows)

    def narrow(self, context: int, chunk: int) -> int:
        """Return what `reach` returns for the narrowest layers, where not all layers are alike; else 0."""
        reaches = {_kept(window, context, chunk) for window in self.windows}
        return min(reaches) if len(set(self.windows)) > 1 else 0

    @classmethod
    def read(cls, index: CheckpointIndex, *, itemsize: int) -> ModelShape:
        """Return the sizes that a checkpoint's config.json tells."""
        config = index.text_config
        hidden = _size(config, "hidden_size", "n_embd", "d_model", "dim") or 0
        heads = _size(config, "num_attention_heads", "n_head", "num_heads", "n_heads") or 0
        head_width = _size(config, "head_dim") or (hidden // heads if heads else 0)
        notes = () if heads else ("config.json names no attention heads: no KV cache is counted",)
        key_width = value_width = head_width
        key_heads = _key_heads(config, heads)
        latent, rotary = _size(config, "kv_lora_rank"), head_width
        if latent:
            # Multi-head latent attention: transformers caches the latent, and expands it for every head as it runs.
            rotary = _size(config, "qk_rope_head_dim") or 0
            key_width = (_size(config, "qk_nope_head_dim") or 0) + rotary
            value_width, key_heads = _size(config, "v_head_dim") or head_width, heads
            latent += rotary + (_size(config, "index_head_dim") or 0)
        # A config.json may carry several of these, of which its model reads one: the largest bounds them all.
        inner = max((_size(config, key) or 0 for key in _MLP_WIDTHS), default=0) or 4 * hidden
        experts = _size(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts") or 0
        expert_width = _size(config, "moe_intermediate_size", "expert_ffn_hidden_size") or inner
        shared = _size(config, "shared_expert_intermediate_size") or (
            (_size(config, "n_shared_experts") or 0) * expert_width
        )
        windows = _windows(config, len(index.layers))
        return cls(
            hidden=hidden,
            intermediate=inner if _has_dense_layer(index) else 0,
            heads=heads,
            key_heads=key_heads,
            key_width=key_width,
            value_width=value_width,
            rotary_width=rotary,
            latent=latent,
            caches=2 if config.get("model_type") == "longcat_flash" else 1,
            vocab=_size(config, "vocab_size") or 0,
            windows=windows,
            experts=experts,
            experts_per_token=_size(config, "num_experts_per_tok", "moe_topk", "num_selected_experts") or 1,
            expert_width=expert_width,
            shared_width=shared,
            mlp_copies=_mlp_copies(config, index),
            mlp_inline=config.get("model_type") == "opt",
            parallel=bool(config.get("use_parallel_residual", config.get("model_type") == "gpt_neox")),
            masks=2 if any(windows) or str(config.get("model_type")) in _SECOND_MASK else 1,
            turned_share=_turned_share(config),
            queries_twice=_turned_share(config) < 1 or not any(".q_proj." in name for name in _first_layer(index)),
            learned_positions=sum(block.kind == "embedding" for block in index.blocks) > 1,
            itemsize=itemsize,
            notes=notes,
        )

    def kv_bytes(self, layer: int, context: int, batch: int, chunk: int) -> int:
        """Return the bytes of one layer's keys and values at their most, (batch, key heads, tokens, width) each.

        A sliding window keeps its last tokens as a view of what the last step made, so a chunk of prefill counts whole.
        """
        window = self.windows[layer] if layer < len(self.windows) else None
        tokens = _longest(window, context, chunk)
        width = self.latent or self.key_heads * (self.key_width + self.value_width)
        return self.caches * batch * tokens * width * self.itemsize


def _kept(window: int | None, context: int, tokens: int) -> int:
    """Return the tokens in a layer's cache once the last `tokens` of `context` have run."""
    return context if window is None else min(context, window - 1 + tokens)


def _longest(window: int | None, context: int, chunk: int) -> int:
    """Return the most tokens that a layer's cache holds while a prompt of any length up to `context` runs in chunks."""
    if window is None:
        return context
    whole, rest = divmod(context, chunk)
    passes = [(min(chunk, context), min(chunk, context)), *([(context, rest)] if rest else [])]
    if whole > 1:
        passes.append((whole * chunk, chunk))
    # Single tokens come after the prompt: the window itself is full then.
    return max(min(context, window), *(_kept(window, behind, tokens) for behind, tokens in passes))


def _size(config: Mapping[str, Any], *keys: str) -> int | None:
    """Return the first of `keys` that holds a whole number above 0; of a list with one per layer, the largest."""
    for key in keys:
        value = config.get(key)
        numbers = [n for n in (value if isinstance(value, list) else [value]) if type(n) is int and n > 0]
        if numbers:
            return max(numbers)
    return None


def _mlp_copies(config: Mapping[str, Any], index: CheckpointIndex) -> int:
    """Return 4 for gate and up as one tensor, 3 as two: with them live the activated gate and the product."""
    names = _first_layer(index)
    if any("gate_up_proj" in name for name in names):
        return 4
    if any("gate_proj" in name or name.endswith((".w1.weight", ".gate.weight")) for name in names):
        return 3
    activation = _named(config, "hidden_act", "activation_function", "hidden_activation", "activation")
    # GPT-2 and its kin say nothing where it is the written-out one, their default.
    return 4 if activation in _WRITTEN_OUT or activation is None else 2


def _first_layer(index: CheckpointIndex) -> tuple[str, ...]:
    """Return the names of the first layer's tensors, its experts' among them."""
    return tuple(name for block in index.blocks if block.index == 0 for name in block.tensors)


def _has_dense_layer(index: CheckpointIndex) -> bool:
    """Return whether a layer has an MLP of its own; one with experts has none, unless its tensors say so."""
    experts = {block.index for block in index.blocks if block.kind == "experts"}
    return any(
        layer.index not in experts or any(".mlp." in name and "_proj." in name for name in layer.tensors)
        for layer in index.layers
    )


def _turned_share(config: Mapping[str, Any]) -> float:
    """Return the share of a key's width that turns with its position."""
    rope = config.get("rope_parameters")
    shares = [part.get(key) for part in (config, rope) if isinstance(part, dict) for key in _ROTARY_SHARES]
    return min((share for share in shares if isinstance(share, float) and 0 < share < 1), default=1.0)


def _named(config: Mapping[str, Any], *keys: str) -> str | None:
    return next((config[key] for key in keys if isinstance(config.get(key), str)), None)


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
