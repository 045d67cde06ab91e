"""Running out of memory while generating: no token is lost, nothing leaks, and what happened is told."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import DoesNotFitError
from lyra_emergence.generation import GenerationOptions, Stepper, stream_generate
from lyra_emergence.loading import load
from lyra_emergence.runtime.recovery import failing_device

from .families import FAMILIES
from .running import NEW_TOKENS, PROMPT, Fed, greedy, reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lyra_emergence.load_report import LoadEvent
    from lyra_emergence.loading import LoadedModel

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]

OPTIONS = GenerationOptions(max_new_tokens=NEW_TOKENS)


def tokens_of(loaded: LoadedModel, options: GenerationOptions = OPTIONS) -> tuple[list[int], Any]:
    chunks = list(stream_generate(loaded, PROMPT, options))
    return [token for chunk in chunks for token in chunk.token_ids], chunks[-1].stats


def allocations_of(loaded: LoadedModel, sim: SimulatedAccelerator) -> int:
    """How many allocations an answer asks for, on all devices together."""
    before = sum(sim.allocations(device) for device in range(sim.devices))
    greedy(loaded)
    return sum(sim.allocations(device) for device in range(sim.devices)) - before


PLACES: dict[str, dict[str, Any]] = {
    "full": {},
    "split": {"device_map": {"": "cpu", "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0}},
    "two": {"device_map": {"": 1, "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0}},
}


@pytest.mark.parametrize("persistent", [False, True], ids=["once", "from there on"])
@pytest.mark.parametrize("place", PLACES)
def test_a_failure_at_any_allocation_of_an_answer_loses_nothing(
    place: str, persistent: bool, checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    directory = checkpoints("llama")
    loaded = load(ModelConfig(**PLACES[place]), directory=directory)
    at_rest = sim.settled()
    total = allocations_of(loaded, sim)
    assert total > 100
    for nth in [1, 2, 3, *range(4, total, total // 6), total]:
        sim.fail_at(nth, persistent=persistent)
        tokens, stats = tokens_of(loaded)
        assert sum(sim.injected(device) for device in range(sim.devices)) > 0, nth
        sim.reset()
        assert tokens == reference(directory), nth
        assert stats.recoveries, nth
        assert sim.settled(at_rest) <= at_rest, nth
        # Memory is free again: the next answer brings everything back.
        assert greedy(loaded) == reference(directory)
        assert loaded.residency.away == ()
        assert sim.settled(at_rest) == at_rest, nth
    loaded.close()
    assert sim.settled() == (0, 0)


@pytest.mark.parametrize("place", PLACES)
def test_a_recovery_runs_the_text_so_far_again_at_most(
    place: str, checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    loaded = load(ModelConfig(**PLACES[place]), directory=checkpoints("llama"))
    fed = Fed(loaded)
    total = allocations_of(loaded, sim)
    undisturbed = sum(fed.passes)
    assert undisturbed == len(PROMPT) + NEW_TOKENS - 1
    for nth in [*range(1, total, total // 12), total]:
        for persistent in (False, True):
            fed.passes.clear()
            sim.fail_at(nth, persistent=persistent)
            _, stats = tokens_of(loaded)
            again = sum(fed.passes) - undisturbed
            sim.reset()
            lost = [recovery.tokens for recovery in stats.recoveries]
            assert again <= sum(lost), (nth, persistent)
            # A step that failed once runs once more, and nothing before it does.
            if not persistent:
                assert len(lost) == 1
                assert again in (0, len(PROMPT) if lost == [len(PROMPT)] else 1), nth
            greedy(loaded)
    loaded.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_survives(family: str, checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints(family)
    loaded = load(ModelConfig(), directory=directory)
    total = allocations_of(loaded, sim)
    for nth, persistent in ((total // 3, True), (total // 2, False), (4, True)):
        sim.fail_at(nth, persistent=persistent)
        assert tokens_of(loaded)[0] == reference(directory), nth
        sim.reset()
    loaded.close()
    assert sim.settled() == (0, 0)


def test_the_remedies_come_in_order(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    events: list[LoadEvent] = []
    loaded = load(ModelConfig(), directory=checkpoints("llama"), on_event=events.append)
    prompt = (PROMPT * 40)[:200]
    sim.fail_at(30, persistent=True)
    chunks = list(stream_generate(loaded, prompt, OPTIONS))
    sim.fail_at(0)
    stats = chunks[-1].stats
    assert stats is not None
    remedies = [recovery.remedy for recovery in stats.recoveries]
    assert remedies[:3] == [
        "cached memory was given back",
        "the prompt goes on in chunks of 64 tokens",
        "model.embed_tokens, model.layers.3 moved from sim:0 to the CPU",
    ]
    # The first layer is the last to leave: its keys and values go before it.
    assert remedies[-2] == "keys and values of the layers on sim:0 moved to main memory"
    assert stats.recoveries[-1].blocks[0] == "model.layers.0"
    assert {recovery.device for recovery in stats.recoveries} == {"sim:0"}
    assert set(loaded.residency.away) == {block.name for block in loaded.blocks}
    told = [event.message for event in events if event.kind == "recover"]
    assert told == [str(recovery) for recovery in stats.recoveries]
    assert told[0] == "memory ran out on sim:0 after 200 tokens; nothing was lost: cached memory was given back"
    loaded.close()


def test_keys_and_values_leave_alone_where_no_block_may(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    loaded = load(ModelConfig(enable_progressive_fallback=False), directory=checkpoints("llama"))
    prompt = (PROMPT * 40)[:200]
    undisturbed = [token for chunk in stream_generate(loaded, prompt, OPTIONS) for token in chunk.token_ids]
    at_rest = sim.settled()
    stream = stream_generate(loaded, prompt, OPTIONS)
    tokens = [token for _ in range(2) for token in next(stream).token_ids]
    cached = sim.settled()[0] - at_rest[0]
    # A step makes one layer's keys and values anew, a quarter of all: there is less than that.
    sim.occupy(sim.free(0) - cached // 8)
    tokens += [token for _ in range(4) for token in next(stream).token_ids]
    assert sim.refusals(0) > 0
    assert sim.settled() == at_rest
    sim.occupy(0)
    rest = list(stream)
    assert tokens + [token for chunk in rest for token in chunk.token_ids] == undisturbed
    remedies = [recovery.remedy for recovery in rest[-1].stats.recoveries]
    assert remedies == [
        "cached memory was given back",
        "keys and values of the layers on sim:0 moved to main memory",
    ]
    assert loaded.residency.away == ()
    loaded.close()


def test_keys_and_values_come_back(
    checkpoints: Checkpoints, sim: SimulatedAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lyra_emergence.runtime.residency._FIRST_WAIT", 2)
    directory = checkpoints("llama")
    loaded = load(ModelConfig(), directory=directory)
    stepper = Stepper(loaded)
    logits = stepper.prefill(PROMPT)
    held = stepper.cached.cached_bytes("sim:0")
    assert loaded.residency.offload_caches("sim:0")
    assert (stepper.cached.cached_bytes("sim:0"), stepper.cached.cached_bytes("cpu")) == (0, held)
    tokens = []
    for _ in range(4):
        tokens.append(int(logits.argmax(-1)))
        logits = stepper.step(tokens[-1])
    assert tokens == reference(directory)[:4]
    assert stepper.cached.cached_bytes("cpu") == 0
    assert stepper.cached.cached_bytes("sim:0") > held
    stepper.close()
    loaded.close()


def test_an_answer_goes_on_when_another_process_takes_the_memory(
    checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    directory = checkpoints("llama")
    loaded = load(ModelConfig(), directory=directory)
    stream = stream_generate(loaded, PROMPT, OPTIONS)
    tokens = [token for _ in range(4) for token in next(stream).token_ids]
    sim.occupy(sim.free(0), 0)
    tokens += [token for _ in range(4) for token in next(stream).token_ids]
    assert loaded.residency.away
    sim.occupy(0, 0)
    tokens += [token for chunk in stream for token in chunk.token_ids]
    assert tokens == reference(directory)
    # Asked again, it is back where it was.
    assert greedy(loaded) == reference(directory)
    assert loaded.residency.away == ()
    loaded.close()


def test_blocks_come_back_within_a_long_answer(
    checkpoints: Checkpoints, sim: SimulatedAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lyra_emergence.runtime.residency._FIRST_WAIT", 2)
    events: list[LoadEvent] = []
    directory = checkpoints("llama")
    loaded = load(ModelConfig(), directory=directory, on_event=events.append)
    stream = stream_generate(loaded, PROMPT, OPTIONS)
    tokens = [token for _ in range(3) for token in next(stream).token_ids]
    sim.fail_at(1, persistent=True)
    tokens += next(stream).token_ids
    sim.fail_at(0)
    assert {f"model.layers.{i}" for i in range(4)} <= set(loaded.residency.away)
    tokens += [token for chunk in stream for token in chunk.token_ids]
    assert tokens == reference(directory)
    assert loaded.residency.away == ()
    assert any(event.message.startswith("memory is free again: ") for event in events)
    loaded.close()


def test_room_is_made_before_a_request_that_would_not_fit(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    events: list[LoadEvent] = []
    directory = checkpoints("llama")
    loaded = load(ModelConfig(), directory=directory, on_event=events.append)
    before = sim.refusals(0)
    sim.occupy(sim.free(0) - 200_000, 0)
    assert greedy(loaded) == reference(directory)
    assert sim.refusals(0) == before
    assert [event.message.endswith(" left sim:0, which has too little free") for event in events][-1]
    loaded.close()


@pytest.mark.parametrize("seed", [3, None])
def test_sampling_draws_what_it_would_have_drawn(
    seed: int | None, checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    loaded = load(ModelConfig(), directory=checkpoints("llama"))
    options = GenerationOptions(max_new_tokens=20, do_sample=True, temperature=1.7, seed=seed)
    torch.manual_seed(5)
    undisturbed = tokens_of(loaded, options)[0]
    total = allocations_of(loaded, sim)
    for nth in range(1, total, total // 6):
        torch.manual_seed(5)
        sim.fail_at(nth)
        tokens, stats = tokens_of(loaded, options)
        sim.reset()
        assert stats.recoveries
        assert tokens == undisturbed, nth
    loaded.close()


def test_two_answers_share_a_model_that_runs_out_of_memory(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    loaded = load(ModelConfig(), directory=directory)
    total = allocations_of(loaded, sim)
    prompts = (PROMPT, PROMPT[::-1])
    for nth in range(5, 2 * total, total // 3):
        sim.fail_at(nth, persistent=nth % 2 == 0)
        found: dict[tuple[int, ...], list[int]] = {}

        def answer(prompt: tuple[int, ...], found: dict[tuple[int, ...], list[int]] = found) -> None:
            found[prompt] = [token for chunk in stream_generate(loaded, prompt, OPTIONS) for token in chunk.token_ids]

        threads = [threading.Thread(target=answer, args=(prompt,)) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sim.reset()
        assert found == {prompt: reference(directory, prompt=prompt) for prompt in prompts}, nth
    loaded.close()
    assert sim.settled() == (0, 0)


def test_another_answer_may_empty_the_device_before_this_one_recovers(
    checkpoints: Checkpoints, sim: SimulatedAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both fail on it; by the time that the second one looks for a remedy, there is nothing left to move there."""
    loaded = load(ModelConfig(), directory=checkpoints("llama"))
    real, calls = Stepper._recover, []

    def recover(stepper: Stepper, failure: BaseException) -> None:
        calls.append(1)
        if len(calls) == 2:
            with loaded.step_lock:
                loaded.residency.step_down("sim:0", 0, 99)
        real(stepper, failure)

    monkeypatch.setattr(Stepper, "_recover", recover)
    sim.fail_at(30, persistent=True)
    tokens, stats = tokens_of(loaded)
    sim.reset()
    assert tokens == reference(checkpoints("llama"))
    assert [recovery.remedy for recovery in stats.recoveries] == [
        "cached memory was given back",
        "what ran on sim:0 had left it by then",
    ]
    loaded.close()


@pytest.mark.parametrize(
    "error",
    [IndexError("out of range"), KeyboardInterrupt(), RuntimeError("CUDA error: device-side assert triggered")],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_surface_at_once(
    error: BaseException, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(ModelConfig(device_map="cpu"), directory=checkpoints("llama"))
    real, calls = loaded.model.forward, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", failing)
    with pytest.raises(type(error)):
        greedy(loaded)
    assert len(calls) == 3
    assert greedy(loaded) == reference(checkpoints("llama"))
    loaded.close()


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), IndexError("index out of range in self"), FileNotFoundError(2, "No such file or directory")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("layer", [0, 3])
def test_an_error_in_the_middle_of_a_layer_leaves_the_model_as_it_was(
    layer: int, error: BaseException, checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    """Half of the layers have taken the token into their caches, and hooks stand between two devices."""
    loaded = load(ModelConfig(**PLACES["two"]), directory=checkpoints("llama"))
    at_rest = sim.settled()
    calls: list[int] = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise error

    handle = loaded.model.get_submodule(f"model.layers.{layer}.mlp").register_forward_pre_hook(interrupt)
    text: list[int] = []

    def draw() -> None:
        for chunk in stream_generate(loaded, PROMPT, OPTIONS):
            text.extend(chunk.token_ids)

    with pytest.raises(type(error)) as caught:
        draw()
    assert caught.value is error
    assert len(calls) == 5
    assert text == reference(checkpoints("llama"))[:4]
    del caught
    error.__traceback__ = None
    handle.remove()
    assert sim.settled(at_rest) == at_rest
    assert greedy(loaded) == reference(checkpoints("llama"))
    assert loaded.residency.away == ()
    loaded.close()
    assert sim.settled() == (0, 0)


def test_kernels_that_find_no_memory_for_their_code_are_done_without(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """test_errors.py has the real error; what is tested here is that oneDNN is off before the next try."""
    loaded = load(ModelConfig(device_map="cpu"), directory=checkpoints("llama"))
    real, seen = loaded.model.forward, []

    def refusing(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch._C._get_mkldnn_enabled())
        if len(seen) == 3:
            raise RuntimeError("could not create a primitive")
        return real(*args, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", refusing)
    try:
        tokens, stats = tokens_of(loaded)
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert tokens == reference(checkpoints("llama"))
    assert seen[:4] == [True, True, True, False]
    assert [recovery.device for recovery in stats.recoveries] == ["cpu"]
    loaded.close()


def test_main_memory_that_is_refused_is_asked_for_again_and_then_told(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoints("llama")
    loaded = load(ModelConfig(device_map="cpu"), directory=directory)
    real, failures = loaded.model.forward, [2]

    def refusing(*args: Any, **kwargs: Any) -> Any:
        if failures[0]:
            failures[0] -= 1
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
        return real(*args, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", refusing)
    prompt = (PROMPT * 40)[:200]
    chunks = list(stream_generate(loaded, prompt, OPTIONS))
    assert chunks[-1].stats is not None
    assert [r.device for r in chunks[-1].stats.recoveries] == ["cpu"] * 2
    failures[0] = 1000
    with pytest.raises(DoesNotFitError, match=r"^memory ran out on cpu after \d+ tokens of prompt and answer: "):
        greedy(loaded)
    failures[0] = 0
    assert greedy(loaded) == reference(directory)
    loaded.close()


def test_caches_of_an_abandoned_answer_are_not_moved_along(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    loaded = load(ModelConfig(), directory=checkpoints("llama"))
    stepper = Stepper(loaded)
    stepper.prefill(PROMPT)
    assert stepper.cached.cached_bytes("sim:0") > 0
    at_rest = sim.used(0)
    del stepper
    assert sim.settled()[0] < at_rest
    loaded.close()


@pytest.mark.parametrize(
    ("error", "device"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 1 has a total"),
            "x:1",
        ),
        (torch.OutOfMemoryError("SIM out of memory. Tried to allocate 8 bytes. Device 0 has a total"), "x:0"),
        (torch.OutOfMemoryError("HIP out of memory."), "x:0"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 MB"), "x:0"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), "cpu"),
        (RuntimeError("std::bad_alloc"), "cpu"),
        (MemoryError(), "cpu"),
    ],
)
def test_the_device_is_told_from_the_text(error: BaseException, device: str) -> None:
    assert failing_device(error, ("x:0", "x:1")) == device
    assert failing_device(error, ()) == "cpu"
