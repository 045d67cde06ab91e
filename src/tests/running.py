"""Running checkpoints in tests: greedy tokens through Lyra, and through plain transformers on the CPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lyra_emergence.generation import GenerationOptions, stream_generate

from . import families

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lyra_emergence.loading import LoadedModel

# From here the tiny checkpoints recite a story with clear margins: bits that differ do not change the tokens.
PROMPT = tuple(families.make_tokenizer()(families.PROMPT)["input_ids"])
NEW_TOKENS = 12


@cache
def reference(directory: Path, new_tokens: int = NEW_TOKENS, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    """The greedy tokens of plain transformers on the CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).eval()
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


def greedy(loaded: LoadedModel, new_tokens: int = NEW_TOKENS, *, prompt: Sequence[int] = PROMPT) -> list[int]:
    """The greedy tokens of a loaded model."""
    options = GenerationOptions(max_new_tokens=new_tokens)
    return [token for chunk in stream_generate(loaded, prompt, options) for token in chunk.token_ids]


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
