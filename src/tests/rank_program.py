"""What torchrun starts in tests below the program: rank 0 loads a divided model and prints what came of it, as JSON.

The arguments are the checkpoint's folder and the key `distributed` as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from lyra_emergence.config import ModelConfig
from lyra_emergence.distributed import Launch, find_launch


def main() -> int:
    launch = find_launch(os.environ)
    assert launch is not None, "torchrun starts this"
    if launch.rank:
        from lyra_emergence.distributed.following import follow

        return follow(launch)
    return _lead(launch, Path(sys.argv[1]), json.loads(sys.argv[2]))


def _lead(launch: Launch, directory: Path, sizes: dict[str, int]) -> int:
    from lyra_emergence.distributed.leader import Leader, hold_signal
    from lyra_emergence.loading import load

    hold_signal()
    leader = Leader(launch, lambda message, hint: _write({"error": message, "hint": hint}))
    try:
        loaded = load(ModelConfig(distributed=sizes, context_length=256), directory=directory)
        _write(_ran(loaded))
    finally:
        leader.end()
    return 0


def _write(data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(data) + "\n")
    sys.stdout.flush()


def _ran(loaded: Any) -> dict[str, Any]:
    from lyra_emergence.cli.prepare import LocalModel
    from lyra_emergence.generation import GenerationOptions, PromptCache, stream_generate
    from lyra_emergence.runtime import stepper

    from .running import PROMPT, greedy

    drawn = GenerationOptions(max_new_tokens=12, do_sample=True, temperature=1.5, seed=7)

    def tokens(prompt: Any, options: GenerationOptions, **more: Any) -> list[int]:
        return [token for chunk in stream_generate(loaded, prompt, options, **more) for token in chunk.token_ids]

    found: dict[str, Any] = {
        "ready": [one.to_json() for one in loaded.report.ranks],
        "greedy": greedy(loaded),
        "drawn": [tokens(PROMPT, drawn) for _ in range(2)],
    }
    # An answer that is stopped, and a prompt that begins as the one before: its cache is cut back on all ranks.
    kept = PromptCache()
    stream = stream_generate(loaded, PROMPT, GenerationOptions(max_new_tokens=12), kept=kept)
    for _ in range(5):
        next(stream)
    found["under way"] = LocalModel(loaded, "it").as_data()["ranks"]
    stream.close()
    found["again"] = tokens(PROMPT, GenerationOptions(max_new_tokens=12), kept=kept)
    # Two answers in turn, each with a cache of its own.
    both = [stream_generate(loaded, PROMPT, GenerationOptions(max_new_tokens=6)) for _ in range(2)]
    found["in turn"] = [[token for chunk in pair for token in chunk.token_ids] for pair in zip(*both, strict=True)]
    # A prompt in several passes.
    stepper.PREFILL_CHUNK = 8
    found["chunked"] = greedy(loaded)
    return found


if __name__ == "__main__":
    sys.exit(main())
