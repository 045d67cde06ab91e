"""Running checkpoints in tests: greedy tokens through Lyra, and through plain transformers on the CPU."""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lyra_emergence.generation import GenerationOptions, stream_generate
from lyra_emergence.turn_lock import TurnLock

from . import families

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lyra_emergence.generation import PromptCache
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


def greedy(
    loaded: LoadedModel,
    new_tokens: int = NEW_TOKENS,
    *,
    prompt: Sequence[int] = PROMPT,
    kept: PromptCache | None = None,
) -> list[int]:
    """The greedy tokens of a loaded model."""
    options = GenerationOptions(max_new_tokens=new_tokens)
    return [token for chunk in stream_generate(loaded, prompt, options, kept=kept) for token in chunk.token_ids]


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Fed:
    """The tokens that a model was given, pass by pass."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.passes: list[int] = []
        loaded.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _model: Any, _args: Any, kwargs: Any) -> None:
        self.passes.append(kwargs["input_ids"].shape[1])


class RecordedLock(TurnLock):
    """A model's lock that notes who asks for it and who gets it."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[tuple[str, int]] = []

    def acquire(self) -> None:
        self._events.append(("asked", threading.get_ident()))
        super().acquire()
        self._events.append(("got", threading.get_ident()))

    @property
    def takers(self) -> int:
        """How many threads had it."""
        return len({who for what, who in self._events if what == "got"})

    @property
    def most_overtaken(self) -> int:
        """How often one and the same thread got it at most while another one waited.

        Counted, so that a busy machine changes nothing; but asking is noted a moment before it happens, and one that
        gets it in that moment counts too: 1 is a lock that goes around, and 2 may be one.
        """
        waiting: dict[int, dict[int, int]] = {}  # who waits: how often each other one got it since it asked
        most = 0
        for what, who in self._events:
            if what == "asked":
                waiting[who] = {}
                continue
            waiting.pop(who)
            for passed in waiting.values():
                passed[who] = passed.get(who, 0) + 1
                most = max(most, passed[who])
        return most
