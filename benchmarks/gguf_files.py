"""Models in llama.cpp's form: real shapes, random weights, for the benchmark of the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.checkpoints import HEADS, PHI2, SHAPES, rotary_share

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def write_gguf(path: Path, form: str, shape: str) -> None:
    """Write a model of a shape in SHAPES, whole or not at all.

    Args:
        path: The file.
        form: The name of a type of tensors: "BF16", "Q8_0" or "Q4_0". What is no matrix is in float32.
        shape: Its name.
    """
    import gguf
    import numpy as np

    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "phi2" if shape in PHI2 else "llama")
    _describe(writer, shape)
    kind = getattr(gguf.GGMLQuantizationType, form)
    random = np.random.default_rng(0)
    for name, dimensions in _tensors(shape):
        if len(dimensions) == 1:
            fill = np.zeros if name.endswith("bias") else np.ones
            writer.add_tensor(name, fill(dimensions, dtype=np.float32))
            continue
        values = random.standard_normal(dimensions, dtype=np.float32) * 0.02
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)


def _describe(writer: Any, shape: str) -> None:
    sizes, (heads, key_heads) = SHAPES[shape], HEADS[shape]
    writer.add_context_length(2048)
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_rope_freq_base(10000.0)
    if shape in PHI2:
        writer.add_layer_norm_eps(1e-5)
        writer.add_rope_dimension_count(round(rotary_share(shape) * sizes["hidden_size"] / heads))
        writer.add_add_bos_token(False)
    else:
        writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(sizes["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"w{at}".encode() for at in range(sizes["vocab_size"])])
    writer.add_token_scores([0.0] * sizes["vocab_size"])
    writer.add_token_types([1] * sizes["vocab_size"])


def _tensors(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    sizes = SHAPES[shape]
    yield "token_embd.weight", (sizes["vocab_size"], sizes["hidden_size"])
    for layer in range(sizes["num_hidden_layers"]):
        for name, dimensions in _phi2_layer(shape) if shape in PHI2 else _llama_layer(shape):
            yield f"blk.{layer}.{name}", dimensions
    yield "output_norm.weight", (sizes["hidden_size"],)
    yield "output.weight", (sizes["vocab_size"], sizes["hidden_size"])
    if shape in PHI2:
        yield "output_norm.bias", (sizes["hidden_size"],)
        yield "output.bias", (sizes["vocab_size"],)


def _llama_layer(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    sizes, (heads, key_heads) = SHAPES[shape], HEADS[shape]
    hidden, wide = sizes["hidden_size"], sizes["intermediate_size"]
    keys = hidden // heads * key_heads
    yield "attn_norm.weight", (hidden,)
    yield "attn_q.weight", (hidden, hidden)
    yield "attn_k.weight", (keys, hidden)
    yield "attn_v.weight", (keys, hidden)
    yield "attn_output.weight", (hidden, hidden)
    yield "ffn_norm.weight", (hidden,)
    yield "ffn_gate.weight", (wide, hidden)
    yield "ffn_up.weight", (wide, hidden)
    yield "ffn_down.weight", (hidden, wide)


def _phi2_layer(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, wide = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]
    yield "attn_norm.weight", (hidden,)
    yield "attn_norm.bias", (hidden,)
    for name, outputs, inputs in (
        ("attn_qkv", 3 * hidden, hidden),
        ("attn_output", hidden, hidden),
        ("ffn_up", wide, hidden),
        ("ffn_down", hidden, wide),
    ):
        yield f"{name}.weight", (outputs, inputs)
        yield f"{name}.bias", (outputs,)
