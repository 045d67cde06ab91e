"""Bytes by hand, and against what transformers and bitsandbytes really hold."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.errors import ConfigError
from lyra_emergence.footprint import PREFILL_CHUNK, compute_dtype, estimate_footprint
from lyra_emergence.packing import (
    PackingCosts,
    Projection,
    Quantization,
    is_quantizable,
    packed_bytes,
    packing_costs,
)

from . import paper_checkpoints as paper
from .families import CONTEXT, FAMILIES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lyra_emergence.checkpoint import CheckpointIndex

# paper.llama's default: 4 layers of width 64, MLP 128, 4 heads of 16 with 2 for keys, 512 tokens.
LAYER_WEIGHTS = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64
TABLE = 512 * 64
ALL = 4 * LAYER_WEIGHTS + 2 * TABLE + 64


# --- Weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["F16", "BF16", "F32", "F64"])
@pytest.mark.parametrize(("dtype", "size"), [("float16", 2), ("bfloat16", 2), ("float32", 4)])
def test_weights_in_every_dtype(tmp_path: Path, stored: str, dtype: str, size: int) -> None:
    index = paper.llama(tmp_path, dtype=stored)
    print_ = estimate_footprint(index, dtype=dtype)
    assert (print_.weights, print_.dtype) == (ALL * size, dtype)
    own = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}[stored]
    assert {block.mapped for block in print_.blocks} == {own == dtype}
    assert estimate_footprint(index).weights == index.nbytes
    assert estimate_footprint(index).dtype == own


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float32"}, "float32"),
        ({"dtype": None, "torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "auto"}, "bfloat16"),
        ({"torch_dtype": "int8"}, "bfloat16"),
    ],
)
def test_the_checkpoints_own_dtype(tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    index = paper.llama(tmp_path, config=config)
    assert compute_dtype(index, None) == compute_dtype(index, "auto") == expected
    assert compute_dtype(index, "float32") == "float32"


def test_a_tied_head_weighs_nothing(tmp_path: Path) -> None:
    made = estimate_footprint(paper.llama(tmp_path, tied=True))
    assert made.weights == 2 * (ALL - TABLE)
    assert (made.blocks[-1].weights, made.blocks[-1].tied_to) == (0, "model.embed_tokens")


def test_integers_keep_their_size(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (512, 64), "model.layers.0.codes": (64, 64), "lm_head.weight": (512, 64)}
    config = {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "dtype": "float32",
    }
    index = paper.write_paper(tmp_path, shapes, config, dtype="I8")
    assert estimate_footprint(index, dtype="float32").weights == index.nbytes


# --- KV cache --------------------------------------------------------------------------------------


def cache(tmp_path: Path, *, context: int = 1000, batch: int = 1, longest: int = 32768, **config: Any) -> list[int]:
    index = paper.llama(tmp_path, context=longest, config=config)
    made = estimate_footprint(index, context_length=context, batch=batch)
    assert made.kv_cache == sum(block.kv_cache for block in made.blocks)
    return [block.kv_cache for block in made.blocks if block.kind == "layer"]


def per_token(heads: int, width: int) -> int:
    return 2 * heads * width * 2  # keys and values, two bytes each


@pytest.mark.parametrize(
    ("config", "token"),
    [
        ({}, per_token(2, 16)),
        ({"num_key_value_heads": 4}, per_token(4, 16)),
        ({"num_key_value_heads": None}, per_token(4, 16)),
        ({"num_key_value_heads": 1}, per_token(1, 16)),
        ({"multi_query": True, "num_key_value_heads": 4}, per_token(1, 16)),
        ({"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 2}, per_token(2, 16)),
        ({"head_dim": 32}, per_token(2, 32)),
        ({"head_dim": 32, "dtype": "float32"}, 2 * per_token(2, 32)),
        ({"num_key_value_heads": [1, 2, 2, 1]}, per_token(2, 16)),
        ({"kv_lora_rank": 8, "qk_nope_head_dim": 24, "qk_rope_head_dim": 4, "v_head_dim": 20}, (8 + 4) * 2),
        ({"kv_lora_rank": 8, "qk_rope_head_dim": 4, "index_head_dim": 6}, (8 + 4 + 6) * 2),
        ({"model_type": "longcat_flash", "kv_lora_rank": 8, "qk_rope_head_dim": 4}, 2 * (8 + 4) * 2),
    ],
)
def test_heads(tmp_path: Path, config: dict[str, Any], token: int) -> None:
    assert cache(tmp_path, **config) == [1000 * token] * 4
    assert cache(tmp_path, batch=3, **config) == [3 * 1000 * token] * 4


TOKEN = per_token(2, 16)
SLID = (512 - 1 + PREFILL_CHUNK) * TOKEN
FULL = 8000 * TOKEN


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "mistral", "sliding_window": 512}, [SLID] * 4),
        ({"model_type": "mistral", "sliding_window": None}, [FULL] * 4),
        ({"model_type": "phi3", "sliding_window": 512}, [SLID] * 4),
        ({"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": False}, [FULL] * 4),
        ({"model_type": "qwen2", "sliding_window": 512}, [FULL] * 4),
        ({"model_type": "mixtral", "sliding_window": 512, "use_sliding_window": False}, [FULL] * 4),
        ({"model_type": "gemma2", "sliding_window": 512}, [SLID, FULL, SLID, FULL]),
        ({"model_type": "gemma3_text", "sliding_window": 512}, [SLID] * 4),
        ({"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 3}, [SLID, SLID, FULL, SLID]),
        ({"model_type": "cohere2", "sliding_window": 512}, [SLID, SLID, SLID, FULL]),
        ({"model_type": "unknown", "sliding_window": 512}, [FULL] * 4),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 512}, [FULL, SLID] * 2),
        ({"layer_types": ["chunked_attention", "full_attention"] * 2, "attention_chunk_size": 512}, [SLID, FULL] * 2),
        ({"layer_types": ["sliding_attention"] * 4}, [FULL] * 4),
        ({"layer_types": ["sliding_attention"], "sliding_window": 512}, [SLID, FULL, FULL, FULL]),
        ({"layer_types": [7, None, "full_attention", "x"], "sliding_window": 512}, [FULL] * 4),
    ],
)
def test_windows(tmp_path: Path, config: dict[str, Any], expected: list[int]) -> None:
    assert cache(tmp_path, context=8000, **config) == expected


def test_a_window_longer_than_the_context_is_the_context(tmp_path: Path) -> None:
    config = {"model_type": "mistral", "sliding_window": 4096}
    assert cache(tmp_path, context=4096, **config) == [4096 * TOKEN] * 4


def test_without_heads_no_cache_is_counted_and_said(tmp_path: Path) -> None:
    made = estimate_footprint(paper.llama(tmp_path, config={"num_attention_heads": None}))
    assert made.kv_cache == 0
    assert made.notes == ("config.json names no attention heads: no KV cache is counted",)


def held_bytes(past: Any) -> int:
    """Bytes of storage behind a cache's keys and values; a view holds all of what it looks at."""
    tensors = [tensor for layer in past.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


SOME = ("llama", "phi", "mistral", "qwen3", "gemma2", "gpt2", "gpt-neox", "qwen2-moe", "gemma3")


def model_of(model_type: str, settings: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, vocab_size=64, pad_token_id=0, **settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def index_of(model: Any, directory: Path) -> CheckpointIndex:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    return paper.write_paper(directory, shapes, json.loads(model.config.to_json_string(use_diff=False)), dtype="F32")


@pytest.mark.parametrize("family", SOME)
def test_the_cache_of_a_real_model(family: str, tmp_path: Path) -> None:
    import torch

    model = model_of(*FAMILIES[family])
    made = estimate_footprint(index_of(model, tmp_path))
    assert made.context_length == CONTEXT
    with torch.inference_mode():
        past = model(torch.randint(1, 64, (1, CONTEXT)), use_cache=True).past_key_values
    assert made.kv_cache == held_bytes(past)


LATENT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MULTI_QUERY = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": CONTEXT, "multi_query": True}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("deepseek_v3", LATENT),
        ("deepseek_v2", {**LATENT, "qk_head_dim": 24}),
        ("minicpm3", LATENT),
        ("gpt_bigcode", MULTI_QUERY),
    ],
)
def test_the_cache_of_latent_and_of_multi_query_attention(
    model_type: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    import torch

    model = model_of(model_type, settings)
    made = estimate_footprint(index_of(model, tmp_path))
    with torch.inference_mode():
        past = model(torch.randint(1, 64, (1, CONTEXT)), use_cache=True).past_key_values
    assert made.kv_cache == held_bytes(past)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mixtral"])
def test_the_weights_of_a_real_checkpoint(family: str, checkpoints: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    directory = checkpoints(family)
    model = AutoModelForCausalLM.from_pretrained(directory)
    real = sum(parameter.nbytes for parameter in model.parameters())
    assert estimate_footprint(read_checkpoint(directory)).weights == real


# --- Quantization ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "eight", "four"),
    [
        ((64, 64), 4096 + 256, 2048 + 256 + 64),
        ((2560, 10240), 26214400 + 10240, 13107200 + 1638400 + 64),
        ((3, 5), 15 + 12, 8 + 4 + 64),
        ((1, 65), 65 + 4, 33 + 8 + 64),
    ],
)
def test_packed_by_hand(shape: tuple[int, int], eight: int, four: int) -> None:
    assert (packed_bytes(shape, "8bit"), packed_bytes(shape, "4bit")) == (eight, four)


@pytest.mark.parametrize("shape", [(64, 64), (48, 200), (256, 1024), (1000, 64)])
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_packed_as_bitsandbytes_packs(shape: tuple[int, int], quantization: Quantization) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    import torch

    weight = torch.randn(shape)
    if quantization == "8bit":
        packed = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
        real = packed.data.nbytes + packed.SCB.nbytes
    else:
        packed = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False).to("cpu")
        state = packed.quant_state
        real = packed.data.nbytes + state.absmax.nbytes + state.code.nbytes
    assert packed_bytes(shape, quantization) == real


def test_the_kernels_of_the_cpu_take_less_to_pack_and_to_unpack() -> None:
    wide, odd, turned = Projection(5632, 2048), Projection(100, 2048), Projection(64, 32, copied=64 * 32 * 2)
    theirs = packing_costs([wide, odd], "4bit", 512, 2, kernels=False)
    assert theirs == PackingCosts(14 * 5632 * 2048, 5632 * 2048 * 2, 5632 * 2048 * 2)
    ours = packing_costs([wide], "8bit", 512, 2, kernels=True)
    assert ours == PackingCosts(0, 512 * (8 * 5632 + 3 * 2048), 5632 * 2048 * 2)
    # Rows that make no whole tiles are left to bitsandbytes.
    mixed = packing_costs([wide, odd], "4bit", 512, 2, kernels=True)
    assert (mixed.packing, mixed.cpu_unpacking) == (14 * 100 * 2048, 5632 * 2048 * 2)
    assert packing_costs([turned], "8bit", 1, 4, kernels=True).packing == 64 * 32 * 2
    assert packing_costs([wide], "8bit", 512, 2, kernels=False).cpu_unpacking == 512 * (8 * 5632 + 3 * 2048)
    assert packing_costs([wide], None, 512, 2, kernels=True) == PackingCosts()


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", (8, 8), True),
        ("model.layers.0.mlp.up_proj.bias", (8,), False),
        ("model.layers.0.input_layernorm.weight", (8,), False),
        ("model.layers.0.mlp.experts.3.up_proj.weight", (8, 8), False),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 8, 8), False),
        ("model.layers.0.mlp.gate.weight", (4, 8), False),
        ("model.layers.0.mlp.router.weight", (4, 8), False),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 8), True),
        ("model.layers.0.mlp.gate_proj.weight", (8, 8), True),
    ],
)
def test_what_is_packed(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_quantizable(name, shape) is expected


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_only_layers_are_packed_and_they_leave_the_file(tmp_path: Path, quantization: Quantization) -> None:
    made = estimate_footprint(paper.llama(tmp_path), quantization=quantization)
    matrices = [(64, 64)] * 2 + [(32, 64)] * 2 + [(128, 64)] * 2 + [(64, 128)]
    layer = sum(packed_bytes(shape, quantization) for shape in matrices) + 2 * 64 * 2
    assert [block.weights for block in made.blocks] == [TABLE * 2, *[layer] * 4, 128, TABLE * 2]
    assert [block.mapped for block in made.blocks] == [True, *[False] * 4, True, True]


def test_gpt2s_projections_are_stored_the_other_way_round(tmp_path: Path) -> None:
    shapes = {
        "wte.weight": (64, 16),
        "h.0.attn.c_attn.weight": (16, 48),
        "h.0.ln_1.weight": (16,),
        "ln_f.weight": (16,),
    }
    config = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 32}
    index = paper.write_paper(tmp_path, shapes, config, dtype="F32")
    layer = next(b for b in estimate_footprint(index, quantization="8bit").blocks if b.kind == "layer")
    assert layer.weights == 16 * 48 + 4 * 48 + 16 * 4


# --- Activations, and bad input ----------------------------------------------------------------------


def test_activations_grow_with_context_and_batch(tmp_path: Path) -> None:
    index = paper.llama(tmp_path, context=32768)
    contexts = [1, 128, 1024, 2048, 32768]
    for batch in (1, 2, 7):
        made = [estimate_footprint(index, context_length=n, batch=batch) for n in contexts]
        layers = [one.activations.layer for one in made]
        assert layers[0] > 0
        assert layers == sorted(set(layers))
    one, two = (estimate_footprint(index, context_length=64, batch=n).activations for n in (1, 2))
    tables = 3 * 16 * 4
    assert (two.layer - tables, two.head, two.embedding) == (2 * (one.layer - tables), 2 * one.head, 2 * one.embedding)


def test_activations_and_windows_grow_with_the_chunk(tmp_path: Path) -> None:
    index = paper.llama(tmp_path, context=32768, config={"model_type": "mistral", "sliding_window": 512})
    small, usual, large = (estimate_footprint(index, chunk=chunk) for chunk in (256, PREFILL_CHUNK, 4096))
    assert (small.chunk, usual.chunk, large.chunk) == (256, 1024, 4096)
    assert estimate_footprint(index) == usual
    layers = [made.activations.layer for made in (small, usual, large)]
    assert layers[0] < layers[1] < layers[2]
    grown = large.blocks[1].kv_cache - usual.blocks[1].kv_cache
    assert grown == (4096 - 1024) * usual.blocks[1].kv_cache // (512 - 1 + 1024)


def test_activations_grow_with_the_dtype_and_the_experts_at_work(tmp_path: Path) -> None:
    index = paper.llama(tmp_path / "dense")
    more = paper.llama(tmp_path / "experts", config={"num_experts": 8, "num_experts_per_tok": 4})
    half, full = (estimate_footprint(index, dtype=name).activations for name in ("bfloat16", "float32"))
    # Token numbers and rotary tables have the same size in both.
    same = 1024 * (3 * 8 + 2 * 16 * 4) + 3 * 16 * 4
    assert full.layer - same == 2 * (half.layer - same)
    assert estimate_footprint(more).activations.layer > half.layer


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "in 'context_length': 0 tokens hold nothing; write a positive number"),
        (-1, "in 'context_length': -1 tokens hold nothing; write a positive number"),
        (1025, "in 'context_length': 1025 tokens is beyond the model's context of 1024"),
    ],
)
def test_bad_contexts(tmp_path: Path, length: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        estimate_footprint(paper.llama(tmp_path), context_length=length)
    assert str(caught.value) == message


@pytest.mark.parametrize("junk", ["many", 1.5, True, [], {}, -3, 0, math.pi])
def test_junk_in_config_json_is_as_good_as_absent(tmp_path: Path, junk: Any) -> None:
    keys = ("num_key_value_heads", "head_dim", "sliding_window", "num_experts_per_tok", "kv_lora_rank", "layer_types")
    made = estimate_footprint(paper.llama(tmp_path / "junk", config=dict.fromkeys(keys, junk)))
    absent = estimate_footprint(paper.llama(tmp_path / "absent", config=dict.fromkeys(keys)))
    if isinstance(junk, list):
        assert made.kv_cache == absent.kv_cache
    else:
        assert made == absent
