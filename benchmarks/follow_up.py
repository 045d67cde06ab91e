"""The first token of a conversation's next turn: Lyra runs what is new, where transformers alone runs it all.

    uv run python -m benchmarks.follow_up                # a Llama of 1.1 billion weights
    uv run python -m benchmarks.follow_up --shape tiny   # does it run at all?

A conversation of so many tokens, an answer of 8, and a next turn of 16, 32 or 64 tokens more. Timed is the next turn's
first token: *kept* with what the turn before left, *anew* without, in the same process and in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from benchmarks.checkpoints import SHAPES, checkpoint_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.runtime.prompt_cache import PromptCache

CONVERSATIONS = (64, 256, 1024)
NEW = (16, 32, 64)
ANSWER = 8


def main() -> None:
    """Time every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1b", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.loading import load

    config = ModelConfig(device_map="cpu", context_length=2048)
    with closing(load(config, directory=checkpoint_of(arguments.shape))) as loaded:
        print("| conversation | new tokens | kept, s | anew, s | ratio |\n|---|---|---|---|---|")
        for row in rows(loaded, arguments.rounds):
            print(row, flush=True)


def rows(loaded: LoadedModel, rounds: int) -> Iterator[str]:
    """Yield the table's rows."""
    for conversation in CONVERSATIONS:
        for new in NEW:
            kept, anew = [], []
            for _ in range(rounds):
                kept.append(next_turn(loaded, conversation, new, keep=True))
                anew.append(next_turn(loaded, conversation, new, keep=False))
            ours, theirs = statistics.median(kept), statistics.median(anew)
            yield f"| {conversation} | {new} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} |"


def next_turn(loaded: LoadedModel, conversation: int, new: int, *, keep: bool) -> float:
    """Return the seconds to the first token of a next turn."""
    from lyra_emergence.runtime.prompt_cache import PromptCache

    kept = PromptCache() if keep else None
    prompt = _tokens(0, conversation)
    answer = _answered(loaded, prompt, ANSWER, kept)[0] if keep else _tokens(7, ANSWER)
    return _answered(loaded, [*prompt, *answer, *_tokens(conversation, new)], 1, kept)[1]


def _tokens(first: int, count: int) -> list[int]:
    return [(7 * at + 11) % 900 for at in range(first, first + count)]


def _answered(loaded: LoadedModel, prompt: list[int], new: int, kept: PromptCache | None) -> tuple[list[int], float]:
    """Return the tokens of an answer, and the seconds to its first."""
    from lyra_emergence.runtime.stepper import Stepper

    clock = time.perf_counter()
    with closing(Stepper(loaded, kept=kept, most_tokens=2048)) as stepper:
        logits: Any = stepper.prefill(prompt)
        tokens = [int(logits.argmax(-1))]
        first = time.perf_counter() - clock
        for _ in range(new):
            tokens.append(int(stepper.step(tokens[-1]).argmax(-1)))
    # The last token has been chosen and not run.
    return tokens[:-1], first


if __name__ == "__main__":
    main()
