"""What packing costs in answers: perplexity and logits of the bundled model in 16, 8 and 4 bits, and by bitsandbytes.

    uv run python -m benchmarks.quantization
    uv run python -m benchmarks.quantization --examples 100 --without "8 bits by bitsandbytes"  # the slowest by far

The bundled model is a trained one. It reads questions over made-up journals as its training drew them, from a seed that
was not trained on, and is given the right answers token by token: the prompt runs as prompts do, the answer's tokens as
single tokens do. Perplexity is that of the answers' tokens. The error of logits is the norm of their difference from
those in float32 by torch, over the norm of these; *same token* is how often the most likely token is the same.
"""

from __future__ import annotations

import argparse
import math
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from lyra_emergence.loading import LoadedModel

SEED = 20261127
BUNDLED = ROOT / "src" / "lyra_emergence" / "bundled"
FORMS: dict[str, dict[str, Any]] = {
    "float32 by torch": {"dtype": "float32", "cpu_kernels": False},
    "bfloat16 by torch": {"dtype": "bfloat16", "cpu_kernels": False},
    "bfloat16": {"dtype": "bfloat16"},
    "8 bits": {"dtype": "bfloat16", "load_in_8bit": True},
    "8 bits by bitsandbytes": {"dtype": "bfloat16", "load_in_8bit": True, "cpu_kernels": False},
    "4 bits": {"dtype": "bfloat16", "load_in_4bit": True},
    "4 bits by bitsandbytes": {"dtype": "bfloat16", "load_in_4bit": True, "cpu_kernels": False},
}


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt and its right answer."""

    prompt: list[int]
    answer: list[int]


def main() -> None:
    """Score every form and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--without", action="append", default=[], choices=list(FORMS)[1:], help="repeatable")
    arguments = parser.parse_args()
    examples = list(drawn(arguments.examples))
    tokens = sum(len(example.answer) for example in examples)
    print(f"{len(examples)} examples, {tokens} tokens of answers")
    print("| form | perplexity | over bfloat16 by torch | error of logits | same token |")
    print("|---|---|---|---|---|")
    exact: list[torch.Tensor] = []
    plain = 0.0
    for name in [name for name in FORMS if name not in arguments.without]:
        logits = scored(FORMS[name], examples)
        exact = exact or logits
        perplexity = _perplexity(logits, examples)
        plain = perplexity if name == "bfloat16 by torch" else plain
        over = f"{100 * (perplexity / plain - 1):+.2f}%" if plain else ""
        print(f"| {name} | {perplexity:.4f} | {over} | {_error(logits, exact):.4f} | {_same(logits, exact):.2%} |")


def drawn(count: int) -> Iterator[Example]:
    """Yield examples of the last stage of training."""
    from transformers import AutoTokenizer

    from training.curriculum import Examples
    from training.tokenizer import example_text

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED, local_files_only=True)
    source = Examples(SEED)
    for _ in range(count):
        prompt, answer = example_text(source.draw())
        yield Example(*(tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)))


def scored(settings: dict[str, Any], examples: list[Example]) -> list[torch.Tensor]:
    """Return the logits of each example's answer, (tokens, vocabulary) in float32."""
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.loading import load

    config = ModelConfig(model_id=str(BUNDLED), device_map="cpu", **settings)
    with closing(load(config, directory=BUNDLED)) as loaded:
        return [_answered(loaded, example) for example in examples]


def _answered(loaded: LoadedModel, example: Example) -> torch.Tensor:
    import torch

    from lyra_emergence.runtime.stepper import Stepper

    with closing(Stepper(loaded, most_tokens=len(example.prompt) + len(example.answer))) as stepper:
        rows = [stepper.prefill(example.prompt)]
        rows += [stepper.step(token) for token in example.answer[:-1]]
    return torch.cat(rows)


def _perplexity(logits: list[torch.Tensor], examples: list[Example]) -> float:
    import torch

    targets = torch.tensor([token for example in examples for token in example.answer])
    return math.exp(torch.nn.functional.cross_entropy(torch.cat(logits), targets).item())


def _error(logits: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    import torch

    found, wanted = torch.cat(logits).double(), torch.cat(exact).double()
    return float((found - wanted).norm() / wanted.norm())


def _same(logits: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    import torch

    return float((torch.cat(logits).argmax(-1) == torch.cat(exact).argmax(-1)).double().mean())


if __name__ == "__main__":
    main()
