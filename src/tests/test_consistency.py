"""config.json's sizes against the tensors: every contradiction is told, and nothing else."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.checkpoint.consistency import CHECKED_TYPES
from lyra_emergence.errors import CheckpointError

from .paper_checkpoints import write_paper

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize(
    ("family", "setting", "told"),
    [
        (
            "llama",
            {"vocab_size": 999},
            "'vocab_size' is 999, but tensor 'model.embed_tokens.weight' has shape [384, 64]",
        ),
        ("gpt2", {"n_embd": 96}, "'n_embd' is 96, but tensor 'transformer.wte.weight' has shape [384, 64]"),
        ("gpt-neox", {"hidden_size": 96}, "'hidden_size' is 96, but tensor 'gpt_neox.embed_in.weight' has shape "),
        ("llama", {"num_attention_heads": 8}, "'num_attention_heads' is 8, heads of 16 and so 128 rows, but tensor "),
        ("qwen2", {"num_key_value_heads": 1}, "'num_key_value_heads' is 1, heads of 16 and so 16 rows, but tensor "),
        (
            "phi",
            {"intermediate_size": 99},
            "'intermediate_size' is 99, but tensor 'model.layers.0.mlp.fc1.weight' has ",
        ),
        ("gemma2", {"intermediate_size": 99}, "'intermediate_size' is 99, but tensor 'model.layers.0.mlp."),
        (
            "mixtral",
            {"num_local_experts": 7},
            "'num_local_experts' is 7, but tensor 'model.layers.0.block_sparse_moe.",
        ),
        ("qwen2-moe", {"num_experts": 7}, "'num_experts' is 7, but tensor 'model.layers.1.mlp.gate.weight' has shape "),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_an_error(
    family: str, setting: dict[str, int], told: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(checkpoints(family), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "model")
    assert str(caught.value).startswith(f"{path}: {told}")
    assert caught.value.hint == "config.json and the weights must come from the same checkpoint"


@pytest.mark.parametrize("model_type", sorted(CHECKED_TYPES))
def test_what_transformers_builds_from_a_config_does_not_contradict_it(model_type: str, tmp_path: Path) -> None:
    """Sizes that are no multiples of one another, so that a rule which mixes two of them up is found out."""
    config = transformers.CONFIG_MAPPING[model_type](**odd_sizes(model_type))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    write_paper(tmp_path / "model", shapes, config.to_dict(), dtype="BF16")


def odd_sizes(model_type: str) -> dict[str, Any]:
    if model_type == "gpt2":
        return {"vocab_size": 211, "n_embd": 84, "n_head": 6, "n_layer": 2, "n_inner": 130}
    sizes: dict[str, Any] = {"vocab_size": 211, "num_hidden_layers": 2, "num_attention_heads": 6, "hidden_size": 84}
    sizes |= {"pad_token_id": 0, "intermediate_size": 130}
    if model_type == "opt":
        return sizes | {"ffn_dim": 131, "word_embed_proj_dim": 48}
    if model_type not in ("gpt_neox", "opt"):
        sizes["num_key_value_heads"] = 3
    if model_type in ("gemma", "gemma2", "gemma3_text", "glm4", "qwen3", "qwen3_moe"):
        sizes["head_dim"] = 22
    if model_type in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"):
        sizes |= {"num_experts": 5, "num_local_experts": 5, "moe_intermediate_size": 36, "mlp_only_layers": [0]}
    return sizes


@pytest.mark.parametrize(
    ("architecture", "config", "told"),
    [
        ("T5ForConditionalGeneration", {"is_encoder_decoder": True}, "an encoder and a decoder (T5ForConditional"),
        ("BertForMaskedLM", {}, "a model that fills gaps in a text (BertForMaskedLM), not one that continues it"),
    ],
)
def test_models_of_another_kind_are_refused(
    architecture: str, config: dict[str, Any], told: str, tmp_path: Path
) -> None:
    shapes = {"model.layers.0.w.weight": (4, 4), "lm_head.weight": (4, 4)}
    with pytest.raises(CheckpointError) as caught:
        write_paper(tmp_path / "model", shapes, {"architectures": [architecture], **config})
    assert str(caught.value).startswith(f"{tmp_path / 'model'}: {told}")
    assert caught.value.hint == "take a causal language model, whose architecture is called ...ForCausalLM"


def test_a_decoder_made_of_a_masked_model_is_taken(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (4, 4), "model.layers.0.w.weight": (4, 4), "lm_head.weight": (4, 4)}
    write_paper(tmp_path / "model", shapes, {"architectures": ["BertForMaskedLM"], "is_decoder": True})
