"""Checkpoints for benchmarks: real shapes, random weights, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import platformdirs

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 1000},
    "200m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "vocab_size": 32000},
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000},
    "tiny-phi2": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 1000},
    "2.7b": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "vocab_size": 51200},
}
HEADS = {"tiny": (4, 2), "200m": (16, 4), "1.1b": (32, 4), "tiny-phi2": (4, 4), "2.7b": (32, 32)}
PHI2 = ("tiny-phi2", "2.7b")
"""Shapes that are phi-2's; the others are Llama's."""


LARGE: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "vocab_size": 1000},
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "vocab_size": 128256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "vocab_size": 32000},
}
"""Llamas with a context of 4,096 tokens. Layers have the same random weights: the file is whole, and quickly made."""
_LARGE_HEADS = {"tiny": (4, 2), "1.1b": (32, 4), "3b": (24, 8), "8b": (32, 8), "13b": (40, 40)}
_SHARD = 2 * 2**30


def large_checkpoint_of(shape: str) -> Path:
    """Return the folder of a bf16 checkpoint of a shape in LARGE, made on first use: 16 GB for 8b, 26 GB for 13b."""
    directory = Path(platformdirs.user_cache_dir("lyra-emergence")) / "benchmarks" / f"large-{shape}"
    if not (directory / "done").exists():
        _make_large(shape, directory)
        (directory / "done").touch()
    return directory


def _make_large(shape: str, directory: Path) -> None:
    import json

    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads, key_heads = _LARGE_HEADS[shape]
    config = LlamaConfig(
        **LARGE[shape],
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: like.shape for name, like in AutoModelForCausalLM.from_config(config).state_dict().items()}
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    _save_tokenizer(LARGE[shape]["vocab_size"], directory)
    torch.manual_seed(0)
    made: dict[Any, Any] = {}
    files: dict[str, str] = {}
    shard: dict[str, Any] = {}
    names = list(shapes)
    for name in names:
        wanted = shapes[name]
        if wanted not in made:
            made[wanted] = torch.ones(wanted) if len(wanted) == 1 else 0.02 * torch.randn(wanted)
            made[wanted] = made[wanted].bfloat16()
        shard[name] = made[wanted].clone()
        if name == names[-1] or sum(tensor.nbytes for tensor in shard.values()) > _SHARD:
            file = f"model-{len(set(files.values())):05}.safetensors"
            save_file(shard, directory / file, metadata={"format": "pt"})
            files |= dict.fromkeys(shard, file)
            shard = {}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


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
    from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig

    heads, key_heads = HEADS[shape]
    known: dict[str, Any] = {**SHAPES[shape], "num_attention_heads": heads, "num_key_value_heads": key_heads}
    known |= {"max_position_embeddings": 2048, "dtype": "bfloat16"}
    config = PhiConfig(**known, partial_rotary_factor=rotary_share(shape)) if shape in PHI2 else LlamaConfig(**known)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    torch.set_default_dtype(torch.float32)
    _save_tokenizer(SHAPES[shape]["vocab_size"], directory)


def _save_tokenizer(words: int, directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(directory)


def rotary_share(shape: str) -> float:
    """Return the share of a head that positions turn: phi-2's 32 of 80, half of a tiny one's 16, all of a Llama's."""
    return {"2.7b": 0.4, "tiny-phi2": 0.5}.get(shape, 1.0)
