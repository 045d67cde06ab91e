"""Bytes of temporaries while a model runs, for one chunk of a prompt against a full context: from config.json alone.

The formulas follow what transformers 5.23 keeps alive at the fullest moment of a forward pass, operator by operator, of
the model types in `KNOWN_TYPES`: their attention runs fused and keeps no matrix of scores. They bound that moment from
above, and closely: what a trial forward (`trial.py`) counts for these types lies a tenth below as a rule, a third at
most. Other types have other moments, which a trial forward finds.

Alive together are, through a whole pass: the hidden state and the embeddings it began with, rotary tables, masks; and
in one layer whichever of these is most: attention (queries, the keys and values repeated for every head where heads
share them, the mask in the model's dtype, the output), the growing cache (old and new keys of one layer), the MLP, the
experts, a norm in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lyra_emergence.model_shape import ModelShape

__all__ = ["KNOWN_TYPES", "Activations", "estimate_activations", "packed_keys"]

KNOWN_TYPES = frozenset(
    """
    cohere cohere2 deepseek_v3 gemma gemma3_text glm4 gpt2 gpt_neox granite llama minicpm3 mistral mixtral olmo olmo2
    olmo3 olmoe opt phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe smollm3 starcoder2
    """.split()  # noqa: SIM905 - a table of words reads better than quoted strings
)
"""Model types whose temporaries the formulas are known to bound closely."""

_EXPERT_COPIES = 4
"""An expert's gate and up are one tensor of twice its width; with it live the activated gate and the product."""
_NUMBERS = 3
"""Whole numbers for each token: its id, its position, its place in the cache."""
_TABLES = 3
"""Rotary frequencies, which stay: half a width each, as made and as in use, for one or two kinds of layers."""
_PACKED_FROM = 64
"""Rows of queries from which packing keys pays for torch."""
_FLOAT32 = 4
_INT64 = 8
_BOOL = 1


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of temporaries at their most, on a device that runs a part of the model.

    Parts run one after the other: a device that runs several of them has the largest figure, not the sum.

    Attributes:
        embedding: Where the embeddings are looked up.
        layer: Where a layer runs without its experts, once the caches are full.
        head: Where the last norm and the head run.
        earlier: As `layer`, in the last whole chunk of a prompt that leaves a shorter one behind it.
        filled: How full the caches are then, as a share of what they hold at their most.
        experts: Where a layer runs with its experts, once the caches are full.
        earlier_experts: As `experts`, in that earlier chunk.
        experts_alone: Where experts run and no layer does.
        cpu_layer: As `layer` on the CPU, whose kernels of attention take more; less than `layer` where they do not.
        earlier_cpu_layer: As `cpu_layer`, in that earlier chunk.
        projecting: As `layer`, at the fullest moment in which a projection runs; 0 where that may be any.
        earlier_projecting: As `projecting`, in that earlier chunk.
        cpu: The figures for the CPU, where packed projections take other bytes there; None where they are these.
    """

    embedding: int
    layer: int
    head: int
    earlier: int = 0
    filled: float = 1.0
    experts: int = 0
    earlier_experts: int = 0
    experts_alone: int = 0
    cpu_layer: int = 0
    earlier_cpu_layer: int = 0
    projecting: int = 0
    earlier_projecting: int = 0
    cpu: Activations | None = None

    def of(
        self,
        *,
        embedding: bool = False,
        layer: bool = False,
        experts: bool = False,
        head: bool = False,
        kv_cache: int = 0,
        on_cpu: bool = False,
    ) -> int:
        """Return the bytes on a device that runs the parts named and holds `kv_cache` bytes of full caches."""
        if on_cpu and self.cpu is not None:
            parts = {"embedding": embedding, "layer": layer, "experts": experts, "head": head}
            return self.cpu.of(**parts, kv_cache=kv_cache, on_cpu=True)
        unfilled = int((1 - self.filled) * kv_cache)
        in_layer = max(self.layer, self.earlier - unfilled)
        if on_cpu:
            in_layer = max(in_layer, self.cpu_layer, self.earlier_cpu_layer - unfilled)
        in_experts = max(self.experts, self.earlier_experts - unfilled) if layer else self.experts_alone
        return max(self.embedding * embedding, in_layer * layer, in_experts * experts, self.head * head)

    def with_experts_in_layers(self) -> Activations:
        """Return the figures for a model whose layers are not divided: each runs with its experts, if it has any."""
        layer, earlier = max(self.layer, self.experts), max(self.earlier, self.earlier_experts)
        return replace(self, layer=layer, earlier=earlier, experts=0, earlier_experts=0, experts_alone=0)

    def with_unfused_attention(self, shape: ModelShape, context: int, batch: int, chunk: int) -> Activations:
        """Return the figures with what attention takes on the CPU where it is not fused there, on top of the layer."""
        if _is_fused(shape):
            return self
        whole, rest = context // chunk * chunk, context % chunk
        if not whole or not rest:
            return replace(self, cpu_layer=self.layer + _scores(shape, min(chunk, context), context, batch))
        return replace(
            self,
            cpu_layer=self.layer + _scores(shape, rest, context, batch),
            earlier_cpu_layer=self.earlier + _scores(shape, chunk, whole, batch),
        )

    def with_unpacked_projection(self, workspace: int, on_cpu: int) -> Activations:
        """Return the figures for packed layers.

        Args:
            workspace: Bytes more that a projection takes while it runs.
            on_cpu: Bytes more that a pass takes on the CPU.
        """
        return replace(self._with_projection(workspace), cpu=self._with_room(on_cpu))

    def _with_room(self, room: int) -> Activations:
        return replace(
            self,
            layer=self.layer + room,
            earlier=self.earlier + room if self.earlier else 0,
            cpu_layer=self.cpu_layer + room if self.cpu_layer else 0,
            earlier_cpu_layer=self.earlier_cpu_layer + room if self.earlier_cpu_layer else 0,
        )

    def _with_projection(self, workspace: int) -> Activations:
        return replace(
            self,
            layer=max(self.layer, (self.projecting or self.layer) + workspace),
            earlier=max(self.earlier, (self.earlier_projecting or self.earlier) + workspace) if self.earlier else 0,
        )


def estimate_activations(shape: ModelShape, context: int, batch: int, chunk: int) -> Activations:
    """Return an upper estimate for any prompt of each of `batch` sequences that `context` tokens have room for.

    A prompt runs in chunks of `chunk` tokens from its beginning, so that the fullest moment is that of the last whole
    chunk in the context, or of what is left behind it with all of the context in view.
    """
    whole, rest = context // chunk * chunk, context % chunk
    if not whole or not rest:
        return _in_a_pass(shape, min(chunk, context), context, batch)
    earlier, last = _in_a_pass(shape, chunk, whole, batch), _in_a_pass(shape, rest, context, batch)
    return Activations(
        embedding=max(earlier.embedding, last.embedding),
        layer=last.layer,
        head=max(earlier.head, last.head),
        earlier=earlier.layer,
        filled=shape.filled(whole, context, chunk),
        cpu_layer=last.cpu_layer,
        earlier_cpu_layer=earlier.cpu_layer,
        projecting=last.projecting,
        earlier_projecting=earlier.projecting,
        experts=last.experts,
        earlier_experts=earlier.experts,
        experts_alone=max(earlier.experts_alone, last.experts_alone),
    )


def _is_fused(shape: ModelShape) -> bool:
    """Return whether attention runs fused on the CPU, which wants keys as wide as values."""
    return shape.key_width == shape.value_width


def _scores(shape: ModelShape, tokens: int, context: int, batch: int) -> int:
    """What attention makes where it is not fused, beside its inputs.

    Scores of every head and their softmax in float32, and which of them are infinite; the queries scaled; all inputs in
    float32; and where it gets no mask, one of its own in two forms.
    """
    reach = shape.reach(context, tokens)
    matrices = shape.heads * tokens * reach * (2 * _FLOAT32 + _BOOL)
    scaled = tokens * shape.heads * shape.key_width * _FLOAT32
    converted = scaled + reach * shape.heads * (shape.key_width + shape.value_width) * _FLOAT32
    mask = 0 if _is_masked(shape, tokens, reach) else tokens * reach * (shape.itemsize + _BOOL)
    return batch * (matrices + scaled + (converted if shape.itemsize < _FLOAT32 else 0) + mask)


def _in_a_pass(shape: ModelShape, tokens: int, context: int, batch: int) -> Activations:
    """Return an upper estimate for a pass of `tokens` tokens that are the last of `context`."""
    rows = tokens * batch
    beside = _packed(shape, tokens, context, batch) if _is_fused(shape) else _scores(shape, tokens, context, batch)
    narrow, context = shape.narrow(context, tokens), shape.reach(context, tokens)
    hidden = rows * shape.hidden * shape.itemsize
    logits = batch * shape.vocab * (shape.itemsize + _FLOAT32)
    head = 2 * hidden + max(logits, 2 * rows * shape.hidden * _FLOAT32)
    attention = _attention(shape, tokens, context, batch)
    in_layer = max(
        attention,
        _turning(shape, rows),
        _growing_cache(shape, rows, context, batch),
        shape.mlp_copies * rows * shape.intermediate * shape.itemsize + (-hidden if shape.mlp_inline else hidden),
        3 * rows * shape.hidden * _FLOAT32,
    )
    throughout = _throughout(shape, tokens, context, batch) + batch * tokens * narrow * _BOOL
    experts = _experts(shape, rows)
    return Activations(
        embedding=2 * hidden,
        layer=throughout + in_layer,
        head=head,
        cpu_layer=throughout + attention + beside,
        projecting=throughout + _projecting(shape, rows, attention),
        experts=throughout + experts if experts else 0,
        experts_alone=hidden + experts if experts else 0,
    )


def _throughout(shape: ModelShape, tokens: int, context: int, batch: int) -> int:
    """Hidden state, embeddings and normed input, positions and their sum; whole numbers; rotary tables; masks."""
    rows = tokens * batch
    numbers = _NUMBERS * rows * _INT64
    rotary = 2 * rows * shape.rotary_width * _FLOAT32
    masks = shape.masks * batch * tokens * context * _BOOL if _is_masked(shape, tokens, context) else 0
    numbers += _TABLES * shape.rotary_width * _FLOAT32
    return (3 + 2 * shape.learned_positions) * rows * shape.hidden * shape.itemsize + numbers + rotary + masks


def _attention(shape: ModelShape, tokens: int, context: int, batch: int) -> int:
    """Queries, repeated keys and values, the mask in the model's dtype, the output, a fused projection."""
    rows, masked = tokens * batch, _is_masked(shape, tokens, context)
    queries = rows * shape.heads * (shape.key_width + shape.value_width)
    # New keys and values are in the cache by then, unless they share a tensor with the queries or are turned in parts.
    new = rows * shape.key_heads * (shape.key_width + shape.value_width)
    projected = new + rows * shape.heads * shape.key_width if shape.queries_twice or shape.latent else 0
    repeated = 0
    if shape.latent:
        # Expanded from the latent for every head, and the keys once more, joined with their rotary part.
        expanded = shape.key_width - shape.rotary_width + shape.value_width
        repeated = batch * context * shape.heads * (expanded + shape.key_width)
    elif shape.key_heads < shape.heads and masked:
        repeated = batch * context * shape.heads * (shape.key_width + shape.value_width)
    mask = batch * tokens * context if masked else 0
    return (queries + projected + repeated + mask) * shape.itemsize


def _packed(shape: ModelShape, tokens: int, context: int, batch: int) -> int:
    """Return what `packed_keys` says for this shape."""
    widths = shape.key_width + shape.value_width
    return packed_keys(batch * shape.heads, tokens, shape.reach(context, tokens), widths, shape.itemsize)


def _projecting(shape: ModelShape, rows: int, attention: int) -> int:
    """What a layer has made as a projection returns: queries, keys and values, or the MLP without its product.

    Of the MLP's tensors, the one that is made of the others is there before the last projection or after the first.
    """
    hidden = rows * shape.hidden * shape.itemsize
    heads = shape.heads * shape.key_width + shape.key_heads * (shape.key_width + shape.value_width)
    mlp = (shape.mlp_copies - 1) * rows * max(shape.intermediate, shape.shared_width) * shape.itemsize
    # What is expanded from a latent is a projection's result; in parallel, attention's is there while the MLP runs.
    return (2 + shape.parallel) * hidden + max(attention if shape.latent else rows * heads * shape.itemsize, mlp)


def packed_keys(heads: int, tokens: int, context: int, widths: int, itemsize: int) -> int:
    """Return the bytes that torch's fused attention on the CPU takes to lay out keys and values anew.

    It does so below float32 and for prompts, where the products take them in pairs of rows (FlashAttentionKernel.cpp of
    torch 2.15). Measured as predicted, and 0.8 MiB of buffers of the threads beside it.

    Args:
        heads: Query heads of all sequences together.
        tokens: Rows of the queries.
        context: Rows of the keys.
        widths: Width of one head's keys and values together.
        itemsize: Bytes of an element.
    """
    return heads * context * widths * itemsize if itemsize < _FLOAT32 and tokens >= _PACKED_FROM else 0


def _turning(shape: ModelShape, rows: int) -> int:
    """Queries, keys and values as projected, and what turns the first two by position, one after the other."""
    if shape.latent or shape.learned_positions:
        return 0
    queries, keys = shape.heads * shape.key_width, shape.key_heads * shape.key_width
    projected = queries + keys + shape.key_heads * shape.value_width
    # Times cosine, halves exchanged, these times sine; a part that turns is then joined with the part that does not.
    turned: float = max(3 * queries, queries + 3 * keys)
    if shape.turned_share < 1:
        turned = max(shape.turned_share * turned, (1 + shape.turned_share) * (queries + keys))
    return int(rows * (projected + turned) * shape.itemsize)


def _is_masked(shape: ModelShape, tokens: int, context: int) -> bool:
    """Return whether attention gets a mask: without a cache behind it, the kernels know the causal one by themselves.

    With a mask, heads that share keys and values get copies of them.
    """
    return tokens < context or shape.masks > 1


def _growing_cache(shape: ModelShape, rows: int, context: int, batch: int) -> int:
    """The old keys (or values) of a layer beside the new, which concatenation makes, and what is being added."""
    wide = shape.latent or shape.key_heads * max(shape.key_width, shape.value_width)
    projected = rows * (2 * shape.heads * shape.key_width + shape.key_heads * (shape.key_width + shape.value_width))
    return (batch * context * wide + projected) * shape.itemsize


def _experts(shape: ModelShape, rows: int) -> int:
    """The chosen experts' inputs, their MLP, or their outputs weighted in float32; the router's scores."""
    if not shape.experts:
        return 0
    chosen = rows * shape.experts_per_token
    routed = 2 * rows * shape.experts * _FLOAT32 + 4 * chosen * _INT64
    inner = chosen * (shape.hidden + _EXPERT_COPIES * shape.expert_width) * shape.itemsize
    outputs = chosen * shape.hidden * (2 * shape.itemsize + 2 * _FLOAT32)
    shared = rows * (shape.hidden + shape.mlp_copies * shape.shared_width) * shape.itemsize
    return max(inner, outputs, shared) + routed + rows * shape.hidden * shape.itemsize
