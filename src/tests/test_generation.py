"""Generation on real models: transformers' own tokens, streamed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import DoesNotFitError, GenerationError
from lyra_emergence.generation import GenerationOptions, stream_generate
from lyra_emergence.loading import load

from .families import FAMILIES
from .families import PROMPT as TEXT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lyra_emergence.loading import LoadedModel

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]

LONG_PROMPT = 60


@pytest.fixture(scope="module")
def llama(checkpoints: Checkpoints) -> Iterator[LoadedModel]:
    loaded = load(ModelConfig(device_map="cpu"), directory=checkpoints("llama"))
    yield loaded
    loaded.close()


def ids_of(loaded: LoadedModel, count: int) -> list[int]:
    return [int(i) for i in torch.arange(count) * 7 % (len(loaded.tokenizer) - 10) + 5]


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill_is_whole_prefill(family: str, checkpoints: Checkpoints) -> None:
    loaded = load(ModelConfig(device_map="cpu"), directory=checkpoints(family))
    loaded.plan = replace(loaded.plan, footprint=replace(loaded.plan.footprint, chunk=23))
    prompt = ids_of(loaded, LONG_PROMPT)
    theirs = loaded.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, LONG_PROMPT, dtype=torch.long),
        max_new_tokens=8,
        do_sample=False,
    )
    chunks = stream_generate(loaded, prompt, GenerationOptions(max_new_tokens=8))
    assert [t for chunk in chunks for t in chunk.token_ids] == theirs[0, LONG_PROMPT:].tolist()
    loaded.close()


def test_text_is_the_decoded_tokens(llama: LoadedModel) -> None:
    chunks = list(stream_generate(llama, TEXT, GenerationOptions(max_new_tokens=30)))
    prompt = llama.tokenizer(TEXT)["input_ids"]
    tokens = [t for chunk in chunks for t in chunk.token_ids]
    whole = llama.tokenizer.decode(prompt + tokens, skip_special_tokens=True)
    assert llama.tokenizer.decode(prompt, skip_special_tokens=True) + "".join(c.text for c in chunks) == whole


def test_the_last_chunk_counts(llama: LoadedModel) -> None:
    *others, last = stream_generate(llama, ids_of(llama, 10), GenerationOptions(max_new_tokens=5))
    assert all(chunk.finish_reason is None and chunk.stats is None for chunk in others)
    assert last.finish_reason == "length"
    assert last.stats is not None
    assert (last.stats.prompt_tokens, last.stats.new_tokens) == (10, 5)
    assert last.stats.prefill_seconds > 0
    assert last.stats.tokens_per_second == pytest.approx(4 / last.stats.decode_seconds)


def test_an_end_token_ends_the_answer(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = ids_of(llama, 10)
    tokens = [t for c in stream_generate(llama, prompt, GenerationOptions(max_new_tokens=6)) for t in c.token_ids]
    monkeypatch.setattr(llama.model.generation_config, "eos_token_id", [tokens[3]])
    chunks = list(stream_generate(llama, prompt, GenerationOptions(max_new_tokens=6)))
    assert chunks[-1].finish_reason == "stop"
    assert [t for c in chunks for t in c.token_ids] == tokens[: tokens.index(tokens[3]) + 1]
    # The end token itself is no text.
    assert "".join(c.text for c in chunks) == "".join(
        c.text for c in list(stream_generate(llama, prompt, GenerationOptions(max_new_tokens=len(chunks) - 1)))
    )


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(llama: LoadedModel) -> None:
    whole = "".join(c.text for c in stream_generate(llama, TEXT, GenerationOptions(max_new_tokens=30)))
    stop = whole[8:12]
    chunks = list(stream_generate(llama, TEXT, GenerationOptions(max_new_tokens=30, stop=(stop,))))
    assert "".join(c.text for c in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].finish_reason == "stop"


def test_an_answer_that_only_repeats_itself_is_ended(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # The model's own next token, always: what a small model does with "x" * 1000.
    real = llama.model.forward
    token = llama.tokenizer("a")["input_ids"][-1]

    def insisting(*args: Any, **kwargs: Any) -> Any:
        output = real(*args, **kwargs)
        output.logits[..., token] = output.logits.max() + 1
        return output

    monkeypatch.setattr(llama.model, "forward", insisting)
    chunks = list(stream_generate(llama, TEXT, GenerationOptions(max_new_tokens=60, max_repeats=3)))
    assert chunks[-1].finish_reason == "loop"
    assert len(chunks) == 12
    free = list(stream_generate(llama, TEXT, GenerationOptions(max_new_tokens=60)))
    assert (len(free), free[-1].finish_reason) == (60, "length")


def test_the_context_clamps_the_answer(checkpoints: Checkpoints) -> None:
    loaded = load(ModelConfig(device_map="cpu", context_length=40), directory=checkpoints("llama"))
    chunks = list(stream_generate(loaded, ids_of(loaded, 30), GenerationOptions(max_new_tokens=4000)))
    assert sum(len(chunk.token_ids) for chunk in chunks) <= 10
    with pytest.raises(GenerationError, match=r"^the prompt has 40 tokens, and the context holds 40 with the answer$"):
        stream_generate(loaded, ids_of(loaded, 40))
    loaded.close()


def test_a_seed_repeats_a_sample_and_another_does_not(llama: LoadedModel) -> None:
    def sample(seed: int) -> list[int]:
        options = GenerationOptions(max_new_tokens=20, do_sample=True, temperature=2.0, seed=seed)
        return [t for c in stream_generate(llama, TEXT, options) for t in c.token_ids]

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in range(5)}) > 1


def test_sampling_follows_the_models_distribution(llama: LoadedModel) -> None:
    prompt = ids_of(llama, 12)
    with torch.inference_mode():
        logits = llama.model(torch.tensor([prompt])).logits[0, -1].float()
    expected = torch.softmax(logits / 1.5, -1)
    draws = 400
    counts = torch.zeros_like(expected)
    for seed in range(draws):
        options = GenerationOptions(max_new_tokens=1, do_sample=True, temperature=1.5, seed=seed)
        counts[next(stream_generate(llama, prompt, options)).token_ids[0]] += 1
    # Total variation of 400 draws from the same distribution over its few likely tokens stays well below this.
    assert float((counts / draws - expected).abs().sum() / 2) < 0.25


def test_top_k_of_one_is_greedy(llama: LoadedModel) -> None:
    greedy = [t for c in stream_generate(llama, TEXT, GenerationOptions(max_new_tokens=10)) for t in c.token_ids]
    options = GenerationOptions(max_new_tokens=10, do_sample=True, top_k=1)
    assert [t for c in stream_generate(llama, TEXT, options) for t in c.token_ids] == greedy


def test_the_repetition_penalty_is_transformers_own(llama: LoadedModel) -> None:
    prompt = ids_of(llama, 20)
    theirs = llama.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 20, dtype=torch.long),
        max_new_tokens=10,
        do_sample=False,
        repetition_penalty=1.8,
    )
    options = GenerationOptions(max_new_tokens=10, repetition_penalty=1.8)
    assert [t for c in stream_generate(llama, prompt, options) for t in c.token_ids] == theirs[0, 20:].tolist()


def test_closing_the_stream_ends_the_work(llama: LoadedModel) -> None:
    steps: list[int] = []
    hook = llama.model.register_forward_hook(lambda *_: steps.append(1))
    stream = stream_generate(llama, TEXT, GenerationOptions(max_new_tokens=50))
    next(stream)
    next(stream)
    stream.close()
    hook.remove()
    assert len(steps) == 2


def test_inference_mode_does_not_leak_to_the_consumer(llama: LoadedModel) -> None:
    stream = stream_generate(llama, TEXT, GenerationOptions(max_new_tokens=3))
    next(stream)
    assert not torch.is_inference_mode_enabled()
    stream.close()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (GenerationOptions(max_new_tokens=0), "max_new_tokens"),
        (GenerationOptions(max_repeats=-1), "max_repeats"),
        (GenerationOptions(temperature=-1.0), "temperature"),
        (GenerationOptions(top_k=-1), "top_k"),
        (GenerationOptions(top_p=0.0), "top_p"),
        (GenerationOptions(repetition_penalty=0.0), "repetition_penalty"),
        (GenerationOptions(stop=("",)), "stop"),
    ],
)
def test_options_out_of_range_are_named(options: GenerationOptions, name: str, llama: LoadedModel) -> None:
    with pytest.raises(GenerationError, match=rf"^'{name}': .* is out of range$"):
        stream_generate(llama, TEXT, options)


def test_options_come_from_call_then_configuration_then_model(checkpoints: Checkpoints) -> None:
    config = ModelConfig(device_map="cpu", pipeline_kwargs={"temperature": 0.5, "top_p": 0.9})
    loaded = load(config, directory=checkpoints("llama"))
    loaded.model.generation_config.top_p = 0.1
    loaded.model.generation_config.repetition_penalty = 1.3
    options = GenerationOptions.for_model(loaded, {"temperature": 0.2, "stop": "x"})
    assert (options.temperature, options.top_p, options.repetition_penalty) == (0.2, 0.9, 1.3)
    assert options.stop == ("x",)
    assert not GenerationOptions.for_model(loaded, {"temperature": 0, "do_sample": True}).do_sample
    loaded.close()


def test_an_empty_prompt_starts_from_the_beginning_token(llama: LoadedModel) -> None:
    start = llama.tokenizer.bos_token_id
    empty = [t for c in stream_generate(llama, [], GenerationOptions(max_new_tokens=4)) for t in c.token_ids]
    named = [t for c in stream_generate(llama, [start], GenerationOptions(max_new_tokens=4)) for t in c.token_ids]
    assert empty == named


def test_without_fallback_memory_running_out_is_told_and_leaves_the_model_whole(
    checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    loaded = load(ModelConfig(enable_progressive_fallback=False), directory=checkpoints("llama"))
    at_rest = sim.used(0)
    whole = [t for c in stream_generate(loaded, TEXT, GenerationOptions(max_new_tokens=6)) for t in c.token_ids]
    stream = stream_generate(loaded, TEXT, GenerationOptions(max_new_tokens=6))
    delivered = [*next(stream).token_ids, *next(stream).token_ids]
    sim.fail_at(20, persistent=True)
    with pytest.raises(DoesNotFitError, match=r"^memory ran out on sim:0 after \d+ tokens of prompt and ") as caught:
        next(stream)
    sim.fail_at(0)
    assert delivered == whole[:2]
    # Though the error is held, the cache and the activations are gone.
    assert caught.value is not None
    assert sim.used(0) == at_rest
    again = [t for c in stream_generate(loaded, TEXT, GenerationOptions(max_new_tokens=6)) for t in c.token_ids]
    assert again == whole
    loaded.close()
