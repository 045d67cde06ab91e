"""Checkpoints of real shapes that weigh nothing: a config.json, and safetensors files that are headers and a hole.

The data of each file is a hole made by `truncate()`, so that a model of many gigabytes takes kilobytes of disk. Shapes
are those of the published models, written down as numbers.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from lyra_emergence.checkpoint import CheckpointIndex, read_checkpoint
from lyra_emergence.checkpoint.architecture import whole_number
from lyra_emergence.checkpoint.safetensors_header import DTYPE_BITS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Shapes = dict[str, tuple[int, ...]]


def write_paper(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], *, dtype: str = "F16"
) -> CheckpointIndex:
    """Writes a checkpoint of tensors without data to `directory` and reads it."""
    directory.mkdir(parents=True, exist_ok=True)
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + position)
    (directory / "config.json").write_text(json.dumps(config))
    return read_checkpoint(directory)


def phi2(directory: Path) -> CheckpointIndex:
    """microsoft/phi-2: 32 layers of width 2560, float16, biases everywhere, a head of its own."""
    hidden, inner, vocab, layers = 2560, 10240, 51200, 32
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "dense"):
            shapes[f"{layer}.self_attn.{projection}.weight"] = (hidden, hidden)
            shapes[f"{layer}.self_attn.{projection}.bias"] = (hidden,)
        shapes[f"{layer}.mlp.fc1.weight"], shapes[f"{layer}.mlp.fc1.bias"] = (inner, hidden), (inner,)
        shapes[f"{layer}.mlp.fc2.weight"], shapes[f"{layer}.mlp.fc2.bias"] = (hidden, inner), (hidden,)
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.input_layernorm.bias"] = (hidden,)
    shapes["model.final_layernorm.weight"] = shapes["model.final_layernorm.bias"] = (hidden,)
    shapes["lm_head.weight"], shapes["lm_head.bias"] = (vocab, hidden), (vocab,)
    config = {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": layers,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": vocab,
    }
    return write_paper(directory, shapes, config)


def llama(
    directory: Path,
    *,
    layers: int = 4,
    hidden: int = 64,
    inner: int = 128,
    heads: int = 4,
    key_heads: int = 2,
    vocab: int = 512,
    context: int | None = 1024,
    tied: bool = False,
    dtype: str = "BF16",
    config: Mapping[str, Any] | None = None,
) -> CheckpointIndex:
    """A Llama of any size; `config` adds to config.json or overrides it. Llama 2 7B: 32, 4096, 11008, 32, 32, 32000."""
    settings: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": key_heads,
        "tie_word_embeddings": tied,
        "vocab_size": vocab,
    }
    if context is not None:
        settings["max_position_embeddings"] = context
    settings |= config or {}
    width = whole_number(settings, "head_dim") or hidden // heads
    keys = (whole_number(settings, "num_key_value_heads") or heads) * width
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.self_attn.q_proj.weight"] = (heads * width, hidden)
        shapes[f"{layer}.self_attn.k_proj.weight"] = shapes[f"{layer}.self_attn.v_proj.weight"] = (keys, hidden)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, heads * width)
        shapes[f"{layer}.mlp.gate_proj.weight"] = shapes[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    return write_paper(directory, shapes, settings, dtype=dtype)


def experts(directory: Path, *, layers: int = 24, each: int = 26) -> CheckpointIndex:
    """A mixture of experts with `layers` * (`each` * 3 + 7) + 3 tensors: 2,043 by default."""
    hidden, inner, vocab = 256, 512, 1024
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{layer}.self_attn.{projection}.weight"] = (hidden, hidden)
        shapes[f"{layer}.mlp.gate.weight"] = (each, hidden)
        for e in range(each):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                shape = (hidden, inner) if projection == "down_proj" else (inner, hidden)
                shapes[f"{layer}.mlp.experts.{e}.{projection}.weight"] = shape
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"], shapes["lm_head.weight"] = (hidden,), (vocab, hidden)
    config = {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "max_position_embeddings": 4096,
        "num_attention_heads": 8,
        "num_experts": each,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
        "vocab_size": vocab,
    }
    return write_paper(directory, shapes, config, dtype="BF16")
