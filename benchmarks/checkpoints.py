"""Checkpoints for benchmarks: real shapes, random weights, made on the spot."""

from __future__ import annotations

from pathlib import Path

import platformdirs

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 1000},
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000},
}
HEADS = {"tiny": (4, 2), "1.1b": (32, 4)}


def llama_checkpoint(shape: str) -> Path:
    """Return the folder of a bf16 Llama checkpoint of a shape in SHAPES, made on first use (2.2 GB for "1.1b")."""
    directory = Path(platformdirs.user_cache_dir("lyra-emergence")) / "benchmarks" / f"llama-{shape}"
    if not (directory / "done").exists():
        _make(shape, directory)
        (directory / "done").touch()
    return directory


def _make(shape: str, directory: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    heads, key_heads = HEADS[shape]
    config = LlamaConfig(
        **SHAPES[shape],
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(directory)
    torch.set_default_dtype(torch.float32)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SHAPES[shape]["vocab_size"])}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)
