"""Checkpoints for benchmarks: real shapes, random weights, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import platformdirs

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 1000},
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000},
    "tiny-phi2": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 1000},
    "2.7b": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "vocab_size": 51200},
}
HEADS = {"tiny": (4, 2), "1.1b": (32, 4), "tiny-phi2": (4, 4), "2.7b": (32, 32)}
PHI2 = ("tiny-phi2", "2.7b")
"""Shapes that are phi-2's; the others are Llama's."""


def checkpoint_of(shape: str) -> Path:
    """Return the folder of a bf16 checkpoint of a shape in SHAPES, made on first use: 2.2 GB for 1.1b."""
    family = "phi2" if shape in PHI2 else "llama"
    directory = Path(platformdirs.user_cache_dir("lyra-emergence")) / "benchmarks" / f"{family}-{shape}"
    if not (directory / "done").exists():
        _make(shape, directory)
        (directory / "done").touch()
    return directory


def _make(shape: str, directory: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig, PreTrainedTokenizerFast

    heads, key_heads = HEADS[shape]
    known: dict[str, Any] = {**SHAPES[shape], "num_attention_heads": heads, "num_key_value_heads": key_heads}
    known |= {"max_position_embeddings": 2048, "dtype": "bfloat16"}
    config = PhiConfig(**known, partial_rotary_factor=rotary_share(shape)) if shape in PHI2 else LlamaConfig(**known)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    torch.set_default_dtype(torch.float32)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SHAPES[shape]["vocab_size"])}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)


def rotary_share(shape: str) -> float:
    """Return the share of a head that positions turn: phi-2's 32 of 80, half of a tiny one's 16, all of a Llama's."""
    return {"2.7b": 0.4, "tiny-phi2": 0.5}.get(shape, 1.0)
