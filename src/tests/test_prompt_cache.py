"""Prompts that begin as the one before: only what is new runs, tokens are the same, and memory stays in the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from lyra_emergence.chat import ChatSession
from lyra_emergence.config import ModelConfig
from lyra_emergence.generation import GenerationOptions, PromptCache, stream_generate
from lyra_emergence.loading import load

from .families import FAMILIES
from .running import NEW_TOKENS, PROMPT, Fed, reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lyra_emergence.loading import LoadedModel

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]

OPTIONS = GenerationOptions(max_new_tokens=NEW_TOKENS)


def answer(loaded: LoadedModel, prompt: Any, kept: PromptCache | None, **options: Any) -> tuple[list[int], Any]:
    chunks = list(stream_generate(loaded, prompt, GenerationOptions(max_new_tokens=NEW_TOKENS, **options), kept=kept))
    return [token for chunk in chunks for token in chunk.token_ids], chunks[-1].stats


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_runs_what_is_new(family: str, checkpoints: Checkpoints) -> None:
    loaded = load(ModelConfig(device_map="cpu"), directory=checkpoints(family))
    kept = PromptCache()
    first, stats = answer(loaded, PROMPT, kept)
    assert stats.reused_tokens == 0
    assert first == reference(checkpoints(family))
    turn = [*PROMPT, *first[:-1], *PROMPT[-2:]]
    expected, _ = answer(loaded, turn, None)
    fed = Fed(loaded)
    second, stats = answer(loaded, turn, kept)
    assert second == expected
    # The last token of an answer was drawn and not run.
    assert stats.reused_tokens in (0, len(PROMPT) + len(first) - 1)
    assert fed.passes[0] == len(turn) - stats.reused_tokens
    loaded.close()


def test_reuse_is_real_where_attention_is_full(checkpoints: Checkpoints) -> None:
    loaded = load(ModelConfig(device_map="cpu"), directory=checkpoints("llama"))
    kept = PromptCache()
    first, _ = answer(loaded, PROMPT, kept)
    assert kept.tokens == len(PROMPT) + len(first) - 1
    # Another question after the same beginning: what differs is cut off.
    other = [*PROMPT[:-1], *PROMPT[:3]]
    expected, _ = answer(loaded, other, None)
    kept_again = PromptCache()
    answer(loaded, PROMPT, kept_again)
    found, stats = answer(loaded, other, kept_again)
    assert (found, stats.reused_tokens) == (expected, len(PROMPT) - 1)
    # The very same prompt: its last token runs, since its logits are wanted.
    same, stats = answer(loaded, other, kept_again)
    assert (same, stats.reused_tokens) == (expected, len(other) - 1)
    # Nothing in common.
    found, stats = answer(loaded, PROMPT[1:], kept_again)
    assert stats.reused_tokens == 0
    loaded.close()


def test_another_conversation_takes_the_room(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    loaded = load(ModelConfig(), directory=checkpoints("llama"))
    at_rest = sim.settled()[0]
    one, two = PromptCache(), PromptCache()
    answer(loaded, PROMPT, one)
    held = sim.settled()[0] - at_rest
    assert held == one.cached_bytes("sim:0") > 0
    answer(loaded, PROMPT, two)
    assert (one.tokens, two.tokens > 0) == (0, True)
    assert sim.settled()[0] - at_rest == held
    answer(loaded, PROMPT, None)
    assert two.tokens == 0
    assert sim.settled()[0] == at_rest
    loaded.close()


def test_what_is_kept_is_given_up_where_memory_is_short(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    loaded = load(ModelConfig(), directory=directory)
    kept = PromptCache()
    first, _ = answer(loaded, PROMPT, kept)
    turn = [*PROMPT, *first[:-1], *PROMPT[-2:]]
    expected, _ = answer(loaded, turn, None)
    answer(loaded, PROMPT, kept)
    for nth in (1, 4, 30):
        sim.fail_at(nth, persistent=True)
        found, stats = answer(loaded, turn, kept)
        sim.reset()
        assert found == expected, nth
        assert stats.recoveries
        assert answer(loaded, PROMPT, kept)[0] == first
    loaded.close()
    kept.drop()
    assert sim.settled() == (0, 0)


def test_an_answer_that_was_broken_off(checkpoints: Checkpoints) -> None:
    loaded = load(ModelConfig(device_map="cpu"), directory=checkpoints("llama"))
    kept = PromptCache()
    stream = stream_generate(loaded, PROMPT, OPTIONS, kept=kept)
    begun = [token for _ in range(3) for token in next(stream).token_ids]
    stream.close()
    assert kept.tokens == len(PROMPT) + 2
    found, stats = answer(loaded, [*PROMPT, *begun], kept)
    assert stats.reused_tokens == len(PROMPT) + 2
    assert [*begun, *found][:NEW_TOKENS] == reference(checkpoints("llama"))
    # In the middle of a step: some layers have taken its token in, others not.
    layer = loaded.model.model.layers[2]
    handle = layer.register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        answer(loaded, [*PROMPT, *begun], kept)
    handle.remove()
    found, stats = answer(loaded, [*PROMPT, *begun], kept)
    assert [*begun, *found][:NEW_TOKENS] == reference(checkpoints("llama"))
    loaded.close()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_chat_runs_its_beginning_once(checkpoints: Checkpoints) -> None:
    loaded = load(ModelConfig(device_map="cpu"), directory=checkpoints("llama"))
    session = ChatSession(loaded, options=GenerationOptions(max_new_tokens=5))
    *_, last = session.ask("Who?")
    assert last.answer is not None
    assert last.answer.stats is not None
    assert last.answer.stats.reused_tokens == 0
    *_, last = session.ask("When?")
    assert last.answer is not None
    assert last.answer.stats is not None
    assert last.answer.stats.reused_tokens > 0
    session.clear()
    *_, last = session.ask("When?")
    assert last.answer is not None
    assert last.answer.stats is not None
    assert last.answer.stats.reused_tokens == 0
    loaded.close()


def test_samples_are_the_same_with_what_was_kept(checkpoints: Checkpoints) -> None:
    loaded = load(ModelConfig(device_map="cpu"), directory=checkpoints("llama"))
    kept = PromptCache()
    drawn = {"do_sample": True, "temperature": 1.5, "seed": 4}
    torch.manual_seed(0)
    first, _ = answer(loaded, PROMPT, None, **drawn)
    answer(loaded, PROMPT, kept)
    second, stats = answer(loaded, PROMPT, kept, **drawn)
    assert (first, stats.reused_tokens) == (second, len(PROMPT) - 1)
    loaded.close()
