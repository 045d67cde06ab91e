from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tracemalloc
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lyra_emergence.checkpoint import CheckpointIndex, read_checkpoint
from lyra_emergence.checkpoint.architecture import TIED_BY_DEFAULT
from lyra_emergence.checkpoint.json_files import DAMAGED
from lyra_emergence.checkpoint.safetensors_header import DTYPE_BITS, TensorInfo, read_header
from lyra_emergence.errors import CheckpointError
from lyra_emergence.hub.files import select_files

if TYPE_CHECKING:
    from pathlib import Path

Shapes = dict[str, tuple[int, ...]]
VOCABULARY = 48
HIDDEN = 16


# --- Making checkpoints by hand --------------------------------------------------------------------


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def pack(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def weights(shapes: Shapes, dtype: str = "F16") -> bytes:
    header, position = {}, 0
    for name, shape in shapes.items():
        size = DTYPE_BITS[dtype] // 8
        for length in shape:
            size *= length
        header[name] = entry(dtype, list(shape), position, position + size)
        position += size
    return pack(header, bytes(position))


def layer_shapes(prefix: str, layers: int, *, size: int = 4) -> Shapes:
    return {f"{prefix}.{i}.w.weight": (size, size) for i in range(layers)}


def llama_shapes(layers: int = 2) -> Shapes:
    return {
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        **layer_shapes("model.layers", layers),
        "model.norm.weight": (HIDDEN,),
    }


def write(folder: Path, shapes: Shapes, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    said = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, **config}
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "model.safetensors").write_bytes(weights(shapes))
    return folder


def kinds(index: CheckpointIndex) -> list[tuple[str, str]]:
    return [(block.kind, block.name) for block in index.blocks]


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    return caught.value


# --- Real checkpoints, saved by transformers -------------------------------------------------------


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Return folder and model by family."""
    import torch
    import transformers

    small = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    grouped = {**small, "num_key_value_heads": 1}
    gpt2 = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 3, "n_head": 2, "n_positions": 48}
    families = {
        "llama": transformers.LlamaConfig(**grouped),
        "phi": transformers.PhiConfig(**small),
        "gpt2": transformers.GPT2Config(**gpt2, bos_token_id=0, eos_token_id=1),
        "gpt_neox": transformers.GPTNeoXConfig(**small),
        "mixtral": transformers.MixtralConfig(**grouped, num_local_experts=3),
        "gemma": transformers.GemmaConfig(**grouped, head_dim=8),
        "qwen2": transformers.Qwen2Config(**grouped),
        "bloom": transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=3, n_head=2),
        "opt": transformers.OPTConfig(**small, ffn_dim=24, word_embed_proj_dim=8),
        "mamba": transformers.MambaConfig(**without_attention(small), state_size=4),
        "biogpt": transformers.BioGptConfig(**small),
        "modernbert-decoder": transformers.ModernBertDecoderConfig(**small),
    }
    transformers.utils.logging.disable_progress_bar()
    result = {}
    for family, config in families.items():
        folder = tmp_path_factory.mktemp(family)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder, max_shard_size="4KB" if family == "qwen2" else "1GB")
        result[family] = (folder, model)
    transformers.utils.logging.enable_progress_bar()
    return result


def without_attention(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}


TEXT = ("llama", "phi", "gpt2", "gemma", "qwen2", "bloom", "opt", "mamba")
FAMILIES = (*TEXT, "gpt_neox", "mixtral", "biogpt")


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_that_safetensors_reads(saved: dict[str, tuple[Path, Any]], family: str) -> None:
    from safetensors import safe_open

    folder, _ = saved[family]
    index = read_checkpoint(folder)
    seen = {}
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safe_open is no mapping
                seen[name] = file.get_slice(name)
                info = index.tensors[name]
                assert (info.file, info.dtype) == (path.name, seen[name].get_dtype())
                assert info.shape == tuple(seen[name].get_shape())
                assert raw[info.begin : info.end] == _bytes(file.get_tensor(name))
    assert seen.keys() == index.tensors.keys()


def _bytes(tensor: Any) -> bytes:
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_the_models_modules(saved: dict[str, tuple[Path, Any]], family: str) -> None:
    folder, model = saved[family]
    index = read_checkpoint(folder)
    modules = dict(model.named_modules())
    # GPT-NeoX is the one that renames: it stores `embed_out` for the module `lm_head`.
    names = {block.name: "lm_head" if block.name == "embed_out" else block.name for block in index.blocks}
    for block in index.blocks:
        # transformers calls the experts' module otherwise; they lie in their layer's.
        where = {"mlp.experts": "block_sparse_moe.experts"}
        module = modules[names[block.name].replace(where["mlp.experts"], "mlp.experts")]
        held = sum(tensor.nbytes for tensor in module.state_dict().values())
        held -= sum(b.nbytes for b in index.blocks if b.kind == "experts" and b.name.startswith(f"{block.name}."))
        assert block.nbytes == (0 if block.tied_to else held), block
    assert [b.index for b in index.layers] == [0, 1, 2]
    assert index.nbytes == sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())
    assert modules[names[index.blocks[0].name]] is model.get_input_embeddings()
    assert modules[names[index.blocks[-1].name]] is model.get_output_embeddings()
    stored = {name for block in index.blocks for name in block.tensors}
    assert stored == index.tensors.keys()


@pytest.mark.parametrize("family", TEXT)
def test_tensor_names_are_the_state_dicts(saved: dict[str, tuple[Path, Any]], family: str) -> None:
    folder, model = saved[family]
    index = read_checkpoint(folder)
    own = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    if index.blocks[-1].tied_to:
        del own["lm_head.weight"]
    assert {name: info.nbytes for name, info in index.tensors.items()} == own


def test_phi_in_execution_order(saved: dict[str, tuple[Path, Any]]) -> None:
    index = read_checkpoint(saved["phi"][0])
    assert kinds(index) == [
        ("embedding", "model.embed_tokens"),
        ("layer", "model.layers.0"),
        ("layer", "model.layers.1"),
        ("layer", "model.layers.2"),
        ("norm", "model.final_layernorm"),
        ("head", "lm_head"),
    ]
    assert index.blocks[-1].tensors == ("lm_head.bias", "lm_head.weight")
    assert index.blocks[-1].nbytes == 2 * (VOCABULARY * HIDDEN + VOCABULARY)
    assert (index.model_type, index.architecture, index.dtype) == ("phi", "PhiForCausalLM", "BF16")
    assert (index.context_length, index.weight_format) == (64, "safetensors")


def test_gpt2_has_two_embeddings_and_a_tied_head(saved: dict[str, tuple[Path, Any]]) -> None:
    index = read_checkpoint(saved["gpt2"][0])
    assert [(b.kind, b.name, b.nbytes, b.tied_to) for b in index.blocks if b.kind != "layer"] == [
        ("embedding", "transformer.wte", 2 * VOCABULARY * HIDDEN, None),
        ("embedding", "transformer.wpe", 2 * 48 * HIDDEN, None),
        ("norm", "transformer.ln_f", 2 * 2 * HIDDEN, None),
        ("head", "lm_head", 0, "transformer.wte"),
    ]
    assert index.blocks[-1].tensors == ()
    assert index.context_length == 48


def test_the_shards_of_qwen2_are_several(saved: dict[str, tuple[Path, Any]]) -> None:
    index = read_checkpoint(saved["qwen2"][0])
    assert len({info.file for info in index.tensors.values()}) > 3
    files = {path.name for path in saved["qwen2"][0].iterdir()}
    assert set(select_files(files)) == files


def test_official_gpt2_names_have_no_outer_module(saved: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, _ = saved["gpt2"]
    state = load_file(folder / "model.safetensors")
    save_file({n.removeprefix("transformer."): t for n, t in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    index = read_checkpoint(tmp_path)
    assert kinds(index) == [
        ("embedding", "wte"),
        ("embedding", "wpe"),
        ("layer", "h.0"),
        ("layer", "h.1"),
        ("layer", "h.2"),
        ("norm", "ln_f"),
        ("head", "lm_head"),
    ]
    assert index.blocks[-1].tied_to == "wte"


def test_a_tied_head_of_which_only_the_bias_is_stored_has_its_own_name(saved: dict[str, tuple[Path, Any]]) -> None:
    folder, model = saved["modernbert-decoder"]
    head = read_checkpoint(folder).blocks[-1]
    assert (head.kind, head.name, head.tensors) == ("head", "decoder", ("decoder.bias",))
    assert head.tied_to == "model.embeddings.tok_embeddings"
    assert model.get_submodule("decoder") is model.get_output_embeddings()


def test_the_table_of_tied_types_is_that_of_transformers() -> None:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    types = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert {t for t in types if getattr(CONFIG_MAPPING[t], "tie_word_embeddings", False)} == TIED_BY_DEFAULT


# --- Blocks from names -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stack", "embedding", "norm", "head"),
    [
        ("model.layers", "model.embed_tokens", "model.norm", "lm_head"),
        ("transformer.h", "transformer.wte", "transformer.ln_f", "lm_head"),
        ("gpt_neox.layers", "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
        ("model.decoder.layers", "model.decoder.embed_tokens", "model.decoder.final_layer_norm", "lm_head"),
        ("backbone.layers", "backbone.embeddings", "backbone.norm_f", "lm_head"),
        ("transformer.blocks", "transformer.wte", "transformer.norm_f", "lm_head"),
        ("rwkv.blocks", "rwkv.embeddings", "rwkv.ln_out", "head"),
        (
            "transformer.encoder.layers",
            "transformer.embedding.word_embeddings",
            "transformer.encoder.final_layernorm",
            "transformer.output_layer",
        ),
        ("layers", "tok_embeddings", "norm", "output"),
        ("model.language_model.layers", "model.language_model.embed_tokens", "model.language_model.norm", "lm_head"),
        (
            "language_model.model.layers",
            "language_model.model.embed_tokens",
            "language_model.model.norm",
            "language_model.lm_head",
        ),
        ("stapel.schicht", "stapel.eingang", "stapel.ende", "ausgang"),
        ("lagen", "b", "z", "a.c"),
    ],
)
def test_any_architecture(tmp_path: Path, stack: str, embedding: str, norm: str, head: str) -> None:
    shapes = {
        f"{head}.weight": (VOCABULARY, HIDDEN),
        f"{norm}.weight": (HIDDEN,),
        f"{embedding}.weight": (VOCABULARY, HIDDEN),
        **layer_shapes(stack, 11),
    }
    if embedding == "b":  # names that say nothing: of two tables equally far out, the later in the file is the head
        shapes = {"b.weight": (VOCABULARY, HIDDEN), **shapes}
        del shapes["a.c.weight"]
        shapes["c.weight"] = (VOCABULARY, HIDDEN)
        head = "c"
    index = read_checkpoint(write(tmp_path, shapes, num_hidden_layers=11))
    assert kinds(index) == [
        ("embedding", embedding),
        *(("layer", f"{stack}.{i}") for i in range(11)),
        ("norm", norm),
        ("head", head),
    ]
    assert all(block.tied_to is None for block in index.blocks)


def test_experts_are_a_block_beside_the_rest_of_their_layer(tmp_path: Path) -> None:
    shapes = llama_shapes()
    shapes |= {f"model.layers.{i}.block_sparse_moe.experts.{m}.w1.weight": (3, 5) for i in (0, 1) for m in range(12)}
    shapes |= {"model.layers.1.mlp.shared_experts.up.weight": (3, 5)}
    index = read_checkpoint(write(tmp_path, shapes))
    found = [(b.name, b.kind, b.index, b.nbytes, len(b.tensors)) for b in index.blocks if b.index is not None]
    assert found == [
        ("model.layers.0", "layer", 0, 2 * 16, 1),
        ("model.layers.0.block_sparse_moe.experts", "experts", 0, 2 * 12 * 15, 12),
        ("model.layers.1", "layer", 1, 2 * (16 + 15), 2),
        ("model.layers.1.block_sparse_moe.experts", "experts", 1, 2 * 12 * 15, 12),
    ]
    assert [b.name for b in index.layers] == ["model.layers.0", "model.layers.1"]


def test_a_mixture_within_attention_stays_in_its_layer(tmp_path: Path) -> None:
    shapes = llama_shapes() | {f"model.layers.{i}.self_attention.experts.input.weight": (3, 5) for i in (0, 1)}
    index = read_checkpoint(write(tmp_path, shapes))
    assert {b.kind for b in index.blocks} == {"embedding", "layer", "norm", "head"}
    assert [b.nbytes for b in index.layers] == [2 * (16 + 15)] * 2


def test_a_vision_tower_is_other_even_where_it_is_larger(tmp_path: Path) -> None:
    shapes = {
        "language_model.lm_head.weight": (VOCABULARY, HIDDEN),
        "language_model.model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        **layer_shapes("language_model.model.layers", 3),
        "language_model.model.norm.weight": (HIDDEN,),
        "multi_modal_projector.linear_1.weight": (9, 9),
        "vision_tower.embeddings.patch_embedding.weight": (7, 7),
        "vision_tower.class_embedding": (HIDDEN,),
        "vision_tower.post_norm.weight": (HIDDEN,),
        **layer_shapes("vision_tower.encoder.layers", 2, size=50),
    }
    text = {"num_hidden_layers": 3, "max_position_embeddings": 77, "vocab_size": VOCABULARY, "hidden_size": HIDDEN}
    index = read_checkpoint(write(tmp_path, shapes, model_type="llava", vocab_size=5, text_config=text))
    assert kinds(index) == [
        ("embedding", "language_model.model.embed_tokens"),
        ("other", "vision_tower.encoder.layers.0"),
        ("other", "vision_tower.encoder.layers.1"),
        ("other", "multi_modal_projector.linear_1"),
        ("other", "vision_tower.embeddings.patch_embedding"),
        ("other", "vision_tower.class_embedding"),
        ("other", "vision_tower.post_norm"),
        ("layer", "language_model.model.layers.0"),
        ("layer", "language_model.model.layers.1"),
        ("layer", "language_model.model.layers.2"),
        ("norm", "language_model.model.norm"),
        ("head", "language_model.lm_head"),
    ]
    assert index.context_length == 77
    assert index.text_config["num_hidden_layers"] == 3
    assert index.text_config["model_type"] == "llava"


def test_where_the_config_is_silent_the_largest_stack_is_the_layers(tmp_path: Path) -> None:
    shapes = {**llama_shapes(2), **layer_shapes("visual.blocks", 5, size=2)}
    index = read_checkpoint(write(tmp_path, shapes))
    assert [b.name for b in index.layers] == ["model.layers.0", "model.layers.1"]


def test_buffers_are_other_modules_before_the_layers(tmp_path: Path) -> None:
    shapes = {**llama_shapes(1), "model.rotary_emb.inv_freq": (8,), "model.scale": (1,), "counter": ()}
    index = read_checkpoint(write(tmp_path, shapes))
    # `model` holds every other block too, so in a device map its scale can only go by its own name.
    assert kinds(index)[1:5] == [
        ("other", "model.rotary_emb"),
        ("other", "model.scale"),
        ("other", "counter"),
        ("layer", "model.layers.0"),
    ]


def test_a_norm_of_the_embeddings_is_not_the_final_norm(tmp_path: Path) -> None:
    shapes = {**llama_shapes(1), "model.embed_layernorm.weight": (HIDDEN,)}
    assert ("other", "model.embed_layernorm") in kinds(read_checkpoint(write(tmp_path / "bloom", shapes)))
    del shapes["model.norm.weight"]
    assert ("norm", "model.embed_layernorm") in kinds(read_checkpoint(write(tmp_path / "lfm2", shapes)))


def test_a_vector_of_another_length_is_no_norm(tmp_path: Path) -> None:
    shapes = {**llama_shapes(1), "model.gate.weight": (3,)}
    assert ("other", "model.gate") in kinds(read_checkpoint(write(tmp_path, shapes)))


def test_a_model_whose_norm_has_no_weight(tmp_path: Path) -> None:
    shapes = llama_shapes(1)
    del shapes["model.norm.weight"]
    assert [kind for kind, _ in kinds(read_checkpoint(write(tmp_path, shapes)))] == ["embedding", "layer", "head"]


def test_rows_decide_not_names(tmp_path: Path) -> None:
    shapes = {**llama_shapes(1), "output.weight": (3, HIDDEN), "model.project_out.weight": (HIDDEN, HIDDEN)}
    index = read_checkpoint(write(tmp_path, shapes))
    assert kinds(index)[1:3] == [("other", "output"), ("other", "model.project_out")]
    assert kinds(index)[-1] == ("head", "lm_head")


def test_as_many_positions_as_tokens(tmp_path: Path) -> None:
    shapes = {"a_wpe.wpe.weight": (VOCABULARY, HIDDEN), "wte.weight": (VOCABULARY, HIDDEN), **layer_shapes("h", 1)}
    index = read_checkpoint(write(tmp_path, shapes))
    assert kinds(index)[:2] == [("embedding", "wte"), ("embedding", "a_wpe.wpe")]
    assert index.blocks[-1].tied_to == "wte"


def test_a_packed_head_is_still_the_head(tmp_path: Path) -> None:
    shapes = llama_shapes(1)
    del shapes["lm_head.weight"]
    shapes |= {"lm_head.qweight": (2, 6), "lm_head.scales": (3,)}
    head = read_checkpoint(write(tmp_path, shapes, tie_word_embeddings=False)).blocks[-1]
    assert (head.kind, head.name, head.tensors) == ("head", "lm_head", ("lm_head.qweight", "lm_head.scales"))


def test_without_a_vocabulary_size_names_must_do(tmp_path: Path) -> None:
    index = read_checkpoint(write(tmp_path, {**llama_shapes(1), "p.wpe.weight": (9, 9)}, vocab_size=None))
    assert kinds(index) == [
        ("embedding", "model.embed_tokens"),
        ("embedding", "p.wpe"),
        ("layer", "model.layers.0"),
        ("norm", "model.norm"),
        ("head", "lm_head"),
    ]


def test_numbers_that_number_nothing(tmp_path: Path) -> None:
    odd = {"model.x.00.weight": (2,), "model.y.5": (2,), "0.z": (2,), "model.²": (2,), f"model.{'9' * 40}.w": (2,)}
    index = read_checkpoint(write(tmp_path, {**llama_shapes(1), **odd}))
    assert [b.name for b in index.layers] == ["model.layers.0"]
    assert [name for kind, name in kinds(index) if kind == "other"] == [
        "model.x.00",
        "model.y",
        "0",
        "model.²",
        f"model.{'9' * 40}",
    ]


# --- Counting layers -------------------------------------------------------------------------------


def test_a_missing_layer(tmp_path: Path) -> None:
    shapes = llama_shapes(4)
    del shapes["model.layers.2.w.weight"]
    error = refusal(write(tmp_path, shapes))
    assert str(error) == f"{tmp_path}: layer model.layers.2 is missing, though model.layers.3 is there"
    assert error.hint == "the checkpoint is incomplete; download or copy it again"


def test_a_layer_number_beyond_all_memory(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, {**llama_shapes(1), "model.layers.999999999.w": (4, 4)}))
    assert str(error) == f"{tmp_path}: layer model.layers.1 is missing, though model.layers.999999999 is there"


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "n_layers", "num_layers"])
def test_a_config_of_another_depth(tmp_path: Path, key: str) -> None:
    error = refusal(write(tmp_path, llama_shapes(3), **{key: 4}))
    assert str(error) == (
        f"{tmp_path}: config.json says '{key}': 4, but the weights hold 3 layers, model.layers.0 to model.layers.2"
    )
    assert error.hint == "config.json and the weights must come from the same checkpoint"


def test_a_text_config_of_another_depth(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, llama_shapes(2), text_config={"num_hidden_layers": 1}))
    assert "'num_hidden_layers': 1, but the weights hold 2 layers" in str(error)


def test_two_counts_of_which_one_is_right(tmp_path: Path) -> None:
    index = read_checkpoint(write(tmp_path, llama_shapes(2), num_layers=2, num_hidden_layers=4))
    assert len(index.layers) == 2


@pytest.mark.parametrize("value", ["3", 0, -1, 2.0, True, [3]])
def test_a_depth_that_is_no_number(tmp_path: Path, value: object) -> None:
    error = refusal(write(tmp_path, llama_shapes(3), num_hidden_layers=value))
    assert str(error) == (f"{tmp_path}/config.json: 'num_hidden_layers' is {value!r}, not a whole number above 0")


def test_layers_that_predict_further_tokens_are_other(tmp_path: Path) -> None:
    index = read_checkpoint(write(tmp_path, llama_shapes(4), num_hidden_layers=3, num_nextn_predict_layers=1))
    assert [b.name for b in index.layers] == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert ("other", "model.layers.3") in kinds(index)


def test_no_layers(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, {"lm_head.weight": (VOCABULARY, HIDDEN)}))
    assert str(error) == f"{tmp_path}: no tensor name numbers a layer (such as 'model.layers.0.…')"


# --- Tied heads ------------------------------------------------------------------------------------


def without(shapes: Shapes, *names: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name not in names}


@pytest.mark.parametrize(
    ("said", "stored", "tied"),
    [
        ({"tie_word_embeddings": True}, False, True),
        ({"tie_word_embeddings": True}, True, True),
        ({"tie_word_embeddings": False}, True, False),
        ({}, False, True),
        ({}, True, False),  # llama's class default
        ({"model_type": "gemma"}, True, True),
        ({"model_type": "gemma", "tie_word_embeddings": False}, True, False),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False, True),
        ({"model_type": "x", "text_config": {"model_type": "gemma3_text"}}, True, True),
        ({"model_type": ["gemma"], "tie_word_embeddings": "yes"}, True, False),
    ],
)
def test_whether_the_head_is_tied(tmp_path: Path, said: dict[str, Any], stored: bool, tied: bool) -> None:
    shapes = llama_shapes() if stored else without(llama_shapes(), "lm_head.weight")
    index = read_checkpoint(write(tmp_path, shapes, **said))
    head = index.blocks[-1]
    table = 2 * VOCABULARY * HIDDEN
    assert (head.kind, head.name) == ("head", "lm_head")
    assert head.tied_to == ("model.embed_tokens" if tied else None)
    assert (head.tensors, head.nbytes) == (((), 0) if tied else (("lm_head.weight",), table))
    assert index.nbytes == table * (1 if tied else 2) + 2 * (2 * 16 + HIDDEN)


def test_a_copy_of_another_shape_is_no_copy(tmp_path: Path) -> None:
    shapes = {**llama_shapes(), "lm_head.weight": (VOCABULARY, HIDDEN + 1)}
    head = read_checkpoint(write(tmp_path, shapes, tie_word_embeddings=True)).blocks[-1]
    assert (head.tied_to, head.tensors) == (None, ("lm_head.weight",))


@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_head_keeps_its_bias(tmp_path: Path, stored: bool) -> None:
    shapes = {**llama_shapes(), "lm_head.bias": (VOCABULARY,)}
    shapes = shapes if stored else without(shapes, "lm_head.weight")
    head = read_checkpoint(write(tmp_path, shapes, tie_word_embeddings=True)).blocks[-1]
    assert (head.tied_to, head.tensors, head.nbytes) == ("model.embed_tokens", ("lm_head.bias",), 2 * VOCABULARY)


def test_an_untied_head_must_be_stored(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, without(llama_shapes(), "lm_head.weight"), tie_word_embeddings=False))
    assert str(error) == (
        f"{tmp_path}: no weight for the language model's head, and config.json says 'tie_word_embeddings': false"
    )
    assert error.hint == "the checkpoint is incomplete, or it was saved from a model without a head"


def test_an_untied_embedding_must_be_stored(tmp_path: Path) -> None:
    shapes = without(llama_shapes(), "model.embed_tokens.weight")
    error = refusal(write(tmp_path, shapes, tie_word_embeddings=False))
    assert str(error) == f"{tmp_path}: no input embedding, and config.json says 'tie_word_embeddings': false"


def test_neither_embedding_nor_head(tmp_path: Path) -> None:
    error = refusal(write(tmp_path, layer_shapes("model.layers", 2)))
    assert str(error) == f"{tmp_path}: neither an input embedding nor a head was found among the tensors"


@pytest.mark.parametrize(("stack", "name"), [("model.layers", "model.embed_tokens"), ("h", "wte")])
def test_a_weight_stored_only_under_the_heads_name(tmp_path: Path, stack: str, name: str) -> None:
    shapes = {"lm_head.weight": (VOCABULARY, HIDDEN), **layer_shapes(stack, 1)}
    index = read_checkpoint(write(tmp_path, shapes, tie_word_embeddings=True))
    first, head = index.blocks[0], index.blocks[-1]
    assert (first.kind, first.name, first.tensors, first.tied_to) == ("embedding", name, (), "lm_head")
    assert (head.tied_to, head.nbytes) == (None, 2 * VOCABULARY * HIDDEN)


# --- What config.json says -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "length"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024, "n_ctx": 512}, 1024),
        ({"n_ctx": 512}, 512),
        ({"max_seq_len": 8}, 8),
        ({"seq_length": 9}, 9),
        ({"max_sequence_length": 10}, 10),
        ({"text_config": {"max_position_embeddings": 11}, "max_position_embeddings": 12}, 11),
        ({"max_position_embeddings": 131072, "rope_scaling": {"factor": 8.0}}, 131072),
        ({"max_position_embeddings": -1, "n_positions": 7}, 7),
        ({"max_position_embeddings": True}, None),
        ({"max_position_embeddings": "2048"}, None),
        ({}, None),
    ],
)
def test_context_length(tmp_path: Path, said: dict[str, Any], length: int | None) -> None:
    assert read_checkpoint(write(tmp_path, llama_shapes(1), **said)).context_length == length


@pytest.mark.parametrize("names", [None, [], "LlamaForCausalLM", [3]])
def test_an_architecture_that_is_not_named(tmp_path: Path, names: object) -> None:
    index = read_checkpoint(write(tmp_path, llama_shapes(1), architectures=names, model_type=4))
    assert (index.architecture, index.model_type) == ("", "")


def test_infinity_in_the_config_is_what_transformers_writes(tmp_path: Path) -> None:
    assert read_checkpoint(write(tmp_path, llama_shapes(1), time_step_limit=[0.0, float("inf")])).layers


def test_the_dtype_that_most_bytes_have(tmp_path: Path) -> None:
    header = {
        "wte.weight": entry("F32", [VOCABULARY, HIDDEN], 0, 3072),
        "h.0.a.w": entry("U8", [4000], 3072, 7072),
        "h.0.a.s": entry("BF16", [3], 7072, 7078),
    }
    folder = write(tmp_path, {})
    (folder / "model.safetensors").write_bytes(pack(header, bytes(7078)))
    assert read_checkpoint(folder).dtype == "U8"


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "not JSON: Expecting value at line 1 column 1"),
        (b"{", "not JSON: Expecting property name enclosed in double quotes at line 1 column 2"),
        (b"[]", "a JSON object was expected, not a list"),
        (b"null", "a JSON object was expected, not null"),
        (b"true", "a JSON object was expected, not a boolean"),
        (b"3", "a JSON object was expected, not a number"),
        (b'"x"', "a JSON object was expected, not a string"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b"[" * 100_000, "not JSON: nested too deeply"),
    ],
)
def test_a_config_that_is_no_object(tmp_path: Path, raw: bytes, problem: str) -> None:
    folder = write(tmp_path, llama_shapes(1))
    (folder / "config.json").write_bytes(raw)
    error = refusal(folder)
    assert (str(error), error.hint) == (f"{tmp_path}/config.json: {problem}", DAMAGED)


def test_a_huge_config_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path, llama_shapes(1))
    os.truncate(folder / "config.json", 2**34)
    tracemalloc.start()
    try:
        error = refusal(folder)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert str(error) == f"{tmp_path}/config.json has 17.2 GB; such a file has at most 16.8 MB"


# --- Folders that are no checkpoint ----------------------------------------------------------------

NO_WEIGHTS = "has no model.safetensors or model.safetensors.index.json"


def test_no_folder(tmp_path: Path) -> None:
    assert str(refusal(tmp_path / "none")) == f"{tmp_path}/none does not exist"
    (tmp_path / "file").touch()
    error = refusal(tmp_path / "file")
    assert (str(error), error.hint) == (
        f"{tmp_path}/file is a file, not a folder",
        "give the folder that holds config.json",
    )


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        ([], "has no config.json", "give the folder of a model"),
        (["config.json"], NO_WEIGHTS, "give the folder of a model"),
        (
            ["config.json", "pytorch_model.bin"],
            f"{NO_WEIGHTS}: its weights are pickled (pytorch_model.bin), which can run code when read",
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)",
        ),
        (
            ["model-q4.gguf"],
            "has no config.json: it holds GGUF (model-q4.gguf), which Lyra does not read",
            "use the model's original safetensors checkpoint",
        ),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "has no config.json: it is an adapter, not a whole model",
            "merge it into its base model once",
        ),
        (
            ["config.json", "weights.safetensors"],
            f"{NO_WEIGHTS}, only weights.safetensors",
            "a checkpoint in transformers' form has config.json beside model.safetensors",
        ),
        (
            ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            f"{NO_WEIGHTS}, only model-00001-of-00002.safetensors and 1 more",
            "or shards beside model.safetensors.index.json",
        ),
        (["model.safetensors"], "has no config.json, only model.safetensors", "has config.json beside"),
    ],
)
def test_a_folder_of_something_else(tmp_path: Path, files: list[str], message: str, hint: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    error = refusal(tmp_path)
    assert str(error) == f"{tmp_path} {message}"
    assert hint in error.hint


def test_the_file_that_the_config_names(tmp_path: Path) -> None:
    folder = write(tmp_path, llama_shapes(1), transformers_weights="sub/odd.safetensors")
    (folder / "sub").mkdir()
    (folder / "model.safetensors").rename(folder / "sub" / "odd.safetensors")
    assert read_checkpoint(folder).tensors["lm_head.weight"].file == "sub/odd.safetensors"


@pytest.mark.parametrize("name", ["../odd.safetensors", "/odd.safetensors", 3, "a\\b", "c:x", ".", "x\0"])
def test_a_named_file_outside_of_the_folder(tmp_path: Path, name: object) -> None:
    error = refusal(write(tmp_path, llama_shapes(1), transformers_weights=name))
    assert str(error) == f"{tmp_path}/config.json: 'transformers_weights' is {name!r}, no file of this folder"


# --- Shards ----------------------------------------------------------------------------------------


def shard(folder: Path, index: object, **shards: Shapes) -> Path:
    write(folder, {})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    for name, shapes in shards.items():
        (folder / f"{name}.safetensors").write_bytes(weights(shapes))
    return folder


def split_llama() -> tuple[dict[str, Any], Shapes, Shapes]:
    shapes = llama_shapes(2)
    first = dict(list(shapes.items())[:3])
    second = without(shapes, *first)
    names = {**dict.fromkeys(first, "a.safetensors"), **dict.fromkeys(second, "b.safetensors")}
    return {"metadata": {"total_size": 1}, "weight_map": names}, first, second


def test_shards(tmp_path: Path) -> None:
    listed, first, second = split_llama()
    index = read_checkpoint(shard(tmp_path, listed, a=first, b=second))
    assert {name: info.file for name, info in index.tensors.items()} == listed["weight_map"]


def test_a_tensor_in_a_shard_that_the_index_leaves_out(tmp_path: Path) -> None:
    listed, first, second = split_llama()
    del listed["weight_map"]["model.norm.weight"]
    assert ("norm", "model.norm") in kinds(read_checkpoint(shard(tmp_path, listed, a=first, b=second)))


def test_a_tensor_in_both_shards_is_read_from_the_one_that_the_index_names(tmp_path: Path) -> None:
    listed, first, second = split_llama()
    index = read_checkpoint(shard(tmp_path, listed, a={**second, **first}, b={**first, **second}))
    assert {name: info.file for name, info in index.tensors.items()} == listed["weight_map"]


def test_a_missing_shard(tmp_path: Path) -> None:
    listed, first, _ = split_llama()
    error = refusal(shard(tmp_path, listed, a=first))
    assert (str(error), error.hint) == (
        f"{tmp_path}/b.safetensors is missing",
        "download or copy the checkpoint again",
    )


def test_a_tensor_that_is_missing_from_its_shard(tmp_path: Path) -> None:
    listed, first, second = split_llama()
    error = refusal(shard(tmp_path, listed, a=first, b=without(second, "model.norm.weight")))
    assert str(error) == (
        f"{tmp_path}/b.safetensors: tensor 'model.norm.weight' is missing, though model.safetensors.index.json lists it"
    )


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/hostname", "x/../../a", "a\\b", "c:a", "a\0", "", 7, None])
def test_an_index_that_leaves_the_folder(tmp_path: Path, file: object) -> None:
    error = refusal(shard(tmp_path, {"weight_map": {"lm_head.weight": file}}))
    assert str(error) == (
        f"{tmp_path}/model.safetensors.index.json: tensor 'lm_head.weight' is said to lie in {file!r}, "
        "which is no file of this folder"
    )
    assert error.hint == "the index is damaged, or not to be trusted"


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": None}])
def test_an_index_without_a_map(tmp_path: Path, index: object) -> None:
    error = refusal(shard(tmp_path, index))
    assert str(error) == f"{tmp_path}/model.safetensors.index.json: 'weight_map' must map tensors to files"


def test_an_index_that_lists_a_tensor_twice(tmp_path: Path) -> None:
    error = refusal(shard(tmp_path, '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'))
    assert str(error) == f"{tmp_path}/model.safetensors.index.json: not JSON: the key 'a' stands twice"


def test_links_out_of_the_folder_are_how_the_cache_stores_files(tmp_path: Path) -> None:
    blobs = write(tmp_path / "blobs", llama_shapes(1))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../blobs/{path.name}")
    assert len(read_checkpoint(snapshot).layers) == 1


# --- Headers ---------------------------------------------------------------------------------------

GOOD = {"a": entry("F32", [2, 2], 0, 16), "b": entry("BF16", [3], 16, 22)}


def header_error(tmp_path: Path, content: bytes) -> str:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path, "w")
    return str(caught.value).removeprefix(f"{tmp_path}/w")


def test_a_good_header(tmp_path: Path) -> None:
    content = pack({"__metadata__": {"format": "pt"}, "b": GOOD["b"], "a": GOOD["a"]}, bytes(22))
    (tmp_path / "w").write_bytes(content)
    start = len(content) - 22
    assert read_header(tmp_path, "w") == (
        TensorInfo("a", "F32", (2, 2), "w", start, start + 16),
        TensorInfo("b", "BF16", (3,), "w", start + 16, start + 22),
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", ": 0 bytes are too few for a safetensors file"),
        (b"\0" * 7, ": 7 bytes are too few for a safetensors file"),
        (b"\0" * 8, ": no safetensors file: its header does not begin with '{'"),
        (pack(b" {}"), ": no safetensors file: its header does not begin with '{'"),
        ((2**60).to_bytes(8, "little") + b"{}", f": the header claims {2**60} bytes; at most 2 are possible"),
        ((3).to_bytes(8, "little") + b"{}", ": the header claims 3 bytes; at most 2 are possible"),
        (b"version https://git-lfs", " is a Git LFS pointer, not the weights"),
        (pack(b"{"), ": header: not JSON: Expecting property name enclosed in double quotes at line 1 column 2"),
        (pack(b"{\xff"), ": header: not UTF-8 at byte 1"),
        (pack(b"{} x"), ": header: not JSON: Extra data at line 1 column 4"),
        (pack(b'{"a": NaN}'), ": header: not JSON: NaN is no number"),
        (pack(b'{"a":' + b"[" * 99_999), ": header: not JSON: nested too deeply"),
        (pack(b'{"a":{},"a":{}}'), ": header: not JSON: the key 'a' stands twice"),
        (pack(b'{"a":{"dtype":"F32","dtype":"F32"}}'), ": header: not JSON: the key 'dtype' stands twice"),
        (pack({"__metadata__": {"format": 1}}), ": header: '__metadata__' must map text to text"),
        (pack({"__metadata__": "pt"}), ": header: '__metadata__' must map text to text"),
        (pack({"a": []}), ": tensor 'a': needs 'dtype', 'shape' and 'data_offsets'"),
        (pack({"a": {"dtype": "F32", "shape": []}}), ": tensor 'a': needs 'dtype', 'shape' and 'data_offsets'"),
        (pack({"": GOOD["a"]}, bytes(16)), ": tensor '': the name is empty"),
        (pack(b'{"\\ud800":{}}'), ": tensor '\\ud800': the name is no valid Unicode"),
        (pack({"a": entry("F31", [1], 0, 4)}, bytes(4)), ": tensor 'a': unknown dtype 'F31'"),
        (pack({"a": entry("f32", [1], 0, 4)}, bytes(4)), ": tensor 'a': unknown dtype 'f32'"),
        (pack({"a": entry([], [1], 0, 4)}, bytes(4)), ": tensor 'a': unknown dtype []"),
        (pack({"a": entry("F32", [True], 0, 4)}, bytes(4)), ": tensor 'a': shape [True] is no list of whole numbers"),
        (pack({"a": entry("F32", [1.0], 0, 4)}, bytes(4)), ": tensor 'a': shape [1.0] is no list of whole numbers"),
        (pack({"a": entry("F32", "1", 0, 4)}, bytes(4)), ": tensor 'a': shape '1' is no list of whole numbers"),
        (
            pack({"a": entry("F32", [-1, -1], 0, 4)}, bytes(4)),
            ": tensor 'a': shape [-1, -1] has a number below 0 or above 2**64 - 1",
        ),
        (
            pack({"a": entry("F32", [1], False, 4)}, bytes(4)),
            ": tensor 'a': data_offsets [False, 4] is no list of whole numbers",
        ),
        (
            pack({"a": entry("F32", [1], -4, 0)}, bytes(4)),
            ": tensor 'a': data_offsets [-4, 0] has a number below 0 or above 2**64 - 1",
        ),
        (pack({"a": entry("F32", [1], 4, 0)}, bytes(4)), ": tensor 'a': data_offsets [4, 0] are no range"),
        (
            pack({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, bytes(4)),
            ": tensor 'a': data_offsets [0, 4, 4] are no range",
        ),
        (
            pack({"a": entry("F32", [2**40, 2**40], 0, 4)}, bytes(4)),
            f": tensor 'a': shape [{2**40}, {2**40}] is larger than any file",
        ),
        (
            # 2**62 elements of 4 bytes wrap around to 0 in 64 bits.
            pack({"a": entry("F32", [2**31, 2**31], 0, 0)}),
            f": tensor 'a': shape [{2**31}, {2**31}] is larger than any file",
        ),
        (
            pack({"a": entry("F32", [2**62, 0], 0, 0)}),
            f": tensor 'a': shape [{2**62}, 0] is larger than any file",
        ),
        (
            pack({"a": entry("F32", [3], 0, 16)}, bytes(16)),
            ": tensor 'a': F32 of shape [3] is 12 bytes, but its offsets span 16 bytes",
        ),
        (
            pack({"a": entry("F4", [3], 0, 2)}, bytes(2)),
            ": tensor 'a': F4 of shape [3] is 12 bits, but its offsets span 2 bytes",
        ),
        (pack(GOOD, bytes(21)), ": tensor 'b': ends 1 B beyond the end of the file"),
        (pack(GOOD, bytes(23)), ": 1 bytes follow the last tensor"),
        (pack({}, bytes(5)), ": 5 bytes follow the last tensor"),
        (pack({**GOOD, "c": entry("U8", [2], 20, 22)}, bytes(22)), ": tensor 'c': overlaps the tensor before it"),
        (pack({**GOOD, "c": entry("U8", [2], 0, 2)}, bytes(22)), ": tensor 'a': overlaps the tensor before it"),
        (pack({**GOOD, "c": entry("U8", [0], 20, 20)}, bytes(22)), ": tensor 'c': overlaps the tensor before it"),
        (pack({**GOOD, "c": entry("U8", [2], 25, 27)}, bytes(27)), ": tensor 'c': a gap of 3 bytes before it"),
        (
            pack({"x" * 500: entry("Q", [], 0, 0)}),
            f": tensor '{'x' * 119}...: unknown dtype 'Q'",
        ),
    ],
)
def test_a_bad_header(tmp_path: Path, content: bytes, problem: str) -> None:
    assert header_error(tmp_path, content) == problem


def test_a_number_of_more_digits_than_python_converts(tmp_path: Path) -> None:
    problem = header_error(tmp_path, pack(b'{"a":' + b"9" * 5000 + b"}"))
    assert problem.startswith(": header: not JSON: Exceeds the limit (4300 digits)")


def test_a_header_above_the_formats_limit(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{")
    os.truncate(path, 200_000_000)
    with pytest.raises(CheckpointError, match=r"claims 100000001 bytes; at most 100000000 are possible$"):
        read_header(tmp_path, "w")


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")  # opening one for reading would wait for ever
    (tmp_path / "loop").symlink_to("loop")
    for name, problem in {
        "folder": "is a folder, not a file that can be read",
        "pipe": "is no regular file, not a file that can be read",
        "file/x": "cannot be read: Not a directory",
        "loop": "cannot be read: Too many levels of symbolic links",
        "none": "is missing",
    }.items():
        with pytest.raises(CheckpointError) as caught:
            read_header(tmp_path, name)
        assert str(caught.value) == f"{tmp_path}/{name} {problem}"


def test_weights_without_a_tensor(tmp_path: Path) -> None:
    assert str(refusal(write(tmp_path, {}))) == f"{tmp_path}: the weights hold no tensor"


def accepted_by_safetensors(content: bytes) -> bool:
    from safetensors import SafetensorError, deserialize

    try:
        deserialize(content)
    except SafetensorError:
        return False
    return True


def check_like_safetensors(folder: Path, content: bytes) -> None:
    """Check that reading ends in tensors inside the file that safetensors accepts too, or in a `CheckpointError`."""
    (folder / "w").write_bytes(content)
    try:
        found = read_header(folder, "w")
    except CheckpointError:
        return
    assert accepted_by_safetensors(content)
    assert all(a.end == b.begin for a, b in pairwise(found))
    assert sum(tensor.nbytes for tensor in found) <= len(content)
    assert not found or found[-1].end == len(content)


QUIET = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = st.one_of(
    st.integers(-2, 24), st.sampled_from([2**31, 2**40, 2**63, 2**64, 2**70]), st.booleans(), st.floats()
)


@QUIET
@given(content=st.binary(max_size=64))
def test_arbitrary_bytes(tmp_path: Path, content: bytes) -> None:
    check_like_safetensors(tmp_path, content)


@QUIET
@given(data=st.data())
def test_a_valid_file_with_bytes_changed(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(pack(GOOD, bytes(22)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    check_like_safetensors(tmp_path, bytes(content[: data.draw(st.integers(0, len(content)))]))
    check_like_safetensors(tmp_path, bytes(content))


@QUIET
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "c", "__metadata__", ""]),
        st.one_of(
            st.none(),
            st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(["F32", "U8", "F4", "F6_E2M3", "BOOL", "X"]),
                    "shape": st.lists(NUMBERS, max_size=3),
                    "data_offsets": st.lists(NUMBERS, max_size=3),
                }
            ),
        ),
        max_size=3,
    ),
    size=st.integers(0, 24),
)
def test_lying_headers(tmp_path: Path, header: object, size: int) -> None:
    check_like_safetensors(tmp_path, pack(header, bytes(size)))


@QUIET
@given(sizes=st.lists(st.integers(0, 5), max_size=5))
def test_honest_headers_are_read(tmp_path: Path, sizes: list[int]) -> None:
    content = weights({f"t{i}": (size, 2) for i, size in enumerate(sizes)})
    (tmp_path / "w").write_bytes(content)
    assert [t.shape for t in sorted(read_header(tmp_path, "w"), key=lambda t: t.name)] == [(s, 2) for s in sizes]


@QUIET
@given(raw=st.one_of(st.binary(max_size=40), st.recursive(st.none() | st.booleans() | st.text(), st.lists).map(repr)))
def test_arbitrary_config_and_index(prepared: Path, raw: bytes | str) -> None:
    content = raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass")
    for name in ("config.json", "model.safetensors.index.json"):
        file = prepared / name
        good = file.read_bytes()
        file.write_bytes(content)
        refusal(prepared)
        file.write_bytes(good)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    return shard(tmp_path, {"weight_map": {"a": "a.safetensors"}}, a={"a": (1,)})


def test_a_lying_header_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes((90_000_000).to_bytes(8, "little") + b"{")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_header(tmp_path, "w")
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


# --- Costs -----------------------------------------------------------------------------------------


def test_two_thousand_tensors_are_read_at_once(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.part{j}.weight": (1,) for i in range(100) for j in range(20)}
    folder = write(tmp_path, {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), **shapes})
    seconds = []
    for _ in range(3):
        start = time.process_time()
        index = read_checkpoint(folder)
        seconds.append(time.process_time() - start)
    assert len(index.layers) == 100
    assert min(seconds) < 0.1


def test_many_modules_outside_of_the_layers_cost_linear_time(tmp_path: Path) -> None:
    shapes = {**llama_shapes(1), **{f"x{i}.weight": (1,) for i in range(10_000)}}
    folder = write(tmp_path, shapes)
    start = time.process_time()
    assert len(read_checkpoint(folder).blocks) == 10_004
    assert time.process_time() - start < 2  # 0.2 s; quadratic time would be minutes


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    folder = write(tmp_path, llama_shapes(1))
    code = (
        "import sys, pathlib\n"
        "from lyra_emergence.checkpoint import read_checkpoint\n"
        "read_checkpoint(pathlib.Path(sys.argv[1]))\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'safetensors', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_checkpoint_has_its_hub_id_or_its_folders_name(tmp_path: Path) -> None:
    from lyra_emergence.bundled import BUNDLED_ID, bundled_directory

    def named(directory: Path) -> str:
        return CheckpointIndex(directory, {}, {}, ()).name

    assert named(tmp_path / "my-model") == "my-model"
    assert named(tmp_path / "models--microsoft--phi-2" / "snapshots" / "0f1e") == "microsoft/phi-2"
    assert named(tmp_path / "models--gpt2" / "snapshots" / "0f1e") == "gpt2"
    assert named(bundled_directory()) == BUNDLED_ID
