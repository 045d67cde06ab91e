"""Blocks of main memory that run on an accelerator for a long prompt."""

from __future__ import annotations

import _thread
import itertools
import threading
import time
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import CheckpointError
from lyra_emergence.generation import GenerationOptions, Stepper, stream_generate
from lyra_emergence.guests import DEFAULT_LEAST_TOKENS, least_tokens
from lyra_emergence.loading import load
from lyra_emergence.machine import Device, Machine
from lyra_emergence.placement import STAGING_PIECE, STAGING_PIECES
from lyra_emergence.plan import Plan, make_plan
from lyra_emergence.runtime import guests
from lyra_emergence.runtime.kv_cache import can_move
from lyra_emergence.speed import Band, DeviceRates, DtypeRates, MachineRates, predict

from .families import FAMILIES, LAYERS
from .running import NEW_TOKENS, PROMPT, reference
from .test_streaming import prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from lyra_emergence.checkpoint import CheckpointIndex
    from lyra_emergence.loading import LoadedModel

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]

GB = 10**9
# Ends as PROMPT does, so that the recital follows; longer than what guests are worth.
LONG = (PROMPT * 40)[-160:]
SHORT = LONG[-DEFAULT_LEAST_TOKENS + 1 :]
OPTIONS = GenerationOptions(max_new_tokens=NEW_TOKENS)


def split(family: str = "llama", here: Sequence[int] = (0, 1), device: int = 0, **settings: Any) -> ModelConfig:
    layers = {f"{prefix(family)}.{at}": device for at in here}
    return ModelConfig(device_map={"": "cpu", **layers}, **settings)


def answer(loaded: LoadedModel, prompt: Sequence[int] = LONG) -> list[int]:
    return [token for chunk in stream_generate(loaded, prompt, OPTIONS) for token in chunk.token_ids]


def expected(directory: Path, prompt: Sequence[int] = LONG) -> list[int]:
    return reference(directory, prompt=tuple(prompt))


def weights_of(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in loaded.model.named_parameters()}


def where_blocks_run(loaded: LoadedModel) -> dict[str, list[str]]:
    """The device of each block's every pass, from now on."""
    seen: dict[str, list[str]] = {}
    for block in loaded.blocks:
        if block.module is not None:
            note = seen.setdefault(block.name, [])
            block.module.register_forward_pre_hook(lambda *_, block=block, note=note: note.append(block.runs_on))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_tokens(family: str, checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints(family)
    loaded = load(split(family), directory=directory)
    before, at_rest = weights_of(loaded), sim.settled()
    seen = where_blocks_run(loaded)
    assert answer(loaded) == expected(directory)
    layers = [seen[f"{prefix(family)}.{at}"] for at in range(LAYERS)]
    assert [devices[0] for devices in layers] == ["sim:0"] * LAYERS
    # Single tokens run where the weights are.
    assert [set(devices[1:]) for devices in layers] == [{"sim:0"}, {"sim:0"}, {"cpu"}, {"cpu"}]
    experts = {devices[0] for name, devices in seen.items() if name.endswith("experts")}
    assert experts <= {"sim:0"}
    assert {block.runs_on == block.device for block in loaded.blocks} == {True}
    after = weights_of(loaded)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sim.settled() == at_rest
    loaded.close()


def test_a_short_prompt_runs_where_the_weights_are(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    loaded = load(split(), directory=directory)
    seen = where_blocks_run(loaded)
    assert answer(loaded, SHORT) == expected(directory, SHORT)
    assert set(seen["model.layers.3"]) == {"cpu"}
    loaded.close()


def test_it_can_be_turned_off(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    loaded = load(split(prompt_streaming=False), directory=directory)
    seen = where_blocks_run(loaded)
    assert answer(loaded) == expected(directory)
    assert set(seen["model.layers.3"]) == {"cpu"}
    assert {placement.through for placement in loaded.plan.placements} == {""}
    loaded.close()


@pytest.mark.parametrize("chunk", [None, 80])
def test_guests_are_copied_once_for_each_chunk(
    chunk: int | None, checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    directory = checkpoints("llama")
    loaded = load(split(prefill_chunk=chunk), directory=directory)
    loaded.residency.least_tokens = 64
    seen = where_blocks_run(loaded)
    assert answer(loaded) == expected(directory)
    assert seen["model.layers.3"].count("sim:0") == (1 if chunk is None else len(LONG) // chunk)
    loaded.close()


PLACES = {
    "before their hosts": {"here": (2, 3)},
    "around their hosts": {"here": (1, 2)},
    "with one host": {"here": (1,)},
    "with one guest": {"here": (0, 1, 3)},
    "on another device": {"here": (0, 1), "device": 1},
    "converted": {"here": (0, 1), "dtype": "bfloat16"},
}


@pytest.mark.parametrize("place", PLACES)
def test_guests_may_be_anywhere(place: str, checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    loaded = load(split(**PLACES[place]), directory=directory)
    before, at_rest = weights_of(loaded), sim.settled()
    seen = where_blocks_run(loaded)
    first = answer(loaded)
    assert {devices[0] for name, devices in seen.items() if "layers" in name} == {
        f"sim:{PLACES[place].get('device', 0)}"
    }
    assert first == answer(loaded)
    if place != "converted":
        assert first == expected(directory)
    after = weights_of(loaded)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sim.settled() == at_rest
    loaded.close()


def test_two_accelerators_have_guests_of_their_own(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("mixtral")
    inside = "block_sparse_moe.experts"
    places = {"model.layers.0": 0, f"model.layers.0.{inside}": 1, "model.layers.1": 0, f"model.layers.1.{inside}": 1}
    loaded = load(ModelConfig(device_map={"": "cpu", **places}), directory=directory)
    seen = where_blocks_run(loaded)
    assert answer(loaded) == expected(directory)
    assert seen["model.layers.3"][0] == "sim:0"
    assert seen[f"model.layers.3.{inside}"][0] == "sim:1"
    loaded.close()


def test_guests_on_disk_are_read_ahead_first(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    places = {"": "cpu", "model.layers.0": 0, **{f"model.layers.{at}": "disk" for at in (1, 2, 3)}}
    loaded = load(ModelConfig(device_map=places), directory=directory)
    assert loaded.residency.stream is not None
    seen = where_blocks_run(loaded)
    for _ in range(2):
        assert answer(loaded) == expected(directory)
    assert seen["model.layers.2"][0] == "sim:0"
    assert seen["model.layers.2"][-1] == "cpu"
    loaded.close()


def test_a_prompt_of_several_chunks_and_a_next_turn(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("mistral")  # with a window that slides
    loaded = load(split(), directory=directory)
    loaded.residency.least_tokens = 16
    seen = where_blocks_run(loaded)
    with closing(Stepper(loaded)) as stepper:
        stepper._chunk = 40
        tokens = [int(stepper.prefill(LONG).argmax(-1))]
        while len(tokens) < NEW_TOKENS:
            tokens.append(int(stepper.step(tokens[-1]).argmax(-1)))
        # More of the conversation behind it.
        tokens.append(int(stepper._advance([*tokens[-1:], *LONG[:39]]).argmax(-1)))
        said = (*LONG, *tokens[:NEW_TOKENS], *LONG[:39])
    assert tokens[:NEW_TOKENS] == expected(directory)
    assert tokens[-1] == expected(directory, said)[0]
    assert seen["model.layers.3"][:4] == ["sim:0"] * 4
    assert seen["model.layers.3"][-1] == "sim:0"
    loaded.close()


def test_the_next_guest_is_copied_while_one_runs(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    loaded = load(split(), directory=checkpoints("llama"))
    (some,) = loaded.residency.guests(len(LONG))
    layers = loaded.model.model.layers
    homes = [[parameter.detach().clone() for parameter in layer.parameters()] for layer in layers]
    hosts = [[parameter.detach() for parameter in layers[at].parameters()] for at in (0, 1)]
    copied = []

    def wait_for_the_next(*_: object) -> None:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            if all(torch.equal(there.cpu(), home) for there, home in zip(hosts[1], homes[3], strict=True)):
                copied.append(True)
                return
            time.sleep(0.001)

    layers[2].register_forward_pre_hook(wait_for_the_next)
    model, inputs = loaded.model, torch.tensor([LONG])
    with torch.inference_mode():
        from transformers.cache_utils import DynamicCache

        caches = {"past_key_values": DynamicCache(config=model.config)}
        with some.running(caches):
            model(input_ids=inputs, use_cache=True, **caches)
    assert copied == [True]
    hosts.clear()
    loaded.close()


def refuse(*_: object) -> int:
    raise RuntimeError("can't start new thread")


def stillborn(*_: object) -> int:
    return 1  # what a thread does whose first frame finds no memory: nothing


@pytest.mark.parametrize("start", [refuse, stillborn])
def test_without_a_thread_the_pass_copies_itself(
    start: Callable[..., int], checkpoints: Checkpoints, sim: SimulatedAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoints("llama")
    loaded = load(split(), directory=directory)
    monkeypatch.setattr(guests._thread, "start_new_thread", start)
    assert answer(loaded) == expected(directory)
    monkeypatch.undo()
    assert _thread.start_new_thread is guests._thread.start_new_thread
    loaded.close()


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (3, 2, 1, 0), (2, 2, 3, 0), (1, 3), (2, 0, 2, 0, 3, 1)])
def test_blocks_may_be_called_in_any_order(
    order: tuple[int, ...], checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    loaded = load(split(cpu_kernels=False), directory=checkpoints("llama"))
    (some,) = loaded.residency.guests(len(LONG))
    layers, before = loaded.model.model.layers, weights_of(loaded)
    hidden = torch.randn(1, 8, 64)
    tables = loaded.model.model.rotary_emb(hidden, torch.arange(8)[None])

    def run() -> list[torch.Tensor]:
        return [layers[at](hidden, position_embeddings=tables).cpu() for at in order]

    with torch.inference_mode():
        alone = run()
        with some.running({}):
            found = run()
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    after = weights_of(loaded)
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded.close()


@pytest.mark.parametrize("persistent", [False, True], ids=["once", "from there on"])
def test_a_refused_allocation_loses_nothing(
    persistent: bool, checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    directory = checkpoints("llama")
    loaded = load(split(), directory=directory)
    before, at_rest = weights_of(loaded), sim.settled()
    counted = sim.allocations(0)
    assert answer(loaded) == expected(directory)
    total = sim.allocations(0) - counted
    for nth in range(1, total, max(1, total // 16)):
        sim.fail_at(nth, persistent=persistent)
        assert answer(loaded) == expected(directory), nth
        assert sim.injected(0) > 0, nth
        sim.reset()
        assert answer(loaded) == expected(directory), nth
        after = weights_of(loaded)
        assert all(torch.equal(before[name], after[name]) for name in before), nth
        assert sim.settled(at_rest) == at_rest, nth
    loaded.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, IndexError])
@pytest.mark.parametrize("at", range(LAYERS))
def test_a_pass_that_is_broken_off_leaves_the_weights_whole(
    at: int, error: type[BaseException], checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    directory = checkpoints("llama")
    loaded = load(split(), directory=directory)
    before, at_rest = weights_of(loaded), sim.settled()

    def fail(*_: object) -> None:
        raise error

    hook = loaded.model.model.layers[at].mlp.register_forward_pre_hook(fail)
    with pytest.raises(error):
        answer(loaded)
    hook.remove()
    after = weights_of(loaded)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {block.runs_on == block.device for block in loaded.blocks} == {True}
    assert answer(loaded) == expected(directory)
    assert sim.settled(at_rest) == at_rest
    loaded.close()


def test_weights_that_cannot_be_read_end_the_answer_with_their_error(
    checkpoints: Checkpoints, sim: SimulatedAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoints("llama")
    loaded = load(split(), directory=directory)
    block = next(block for block in loaded.blocks if block.name == "model.layers.3")

    def fail() -> Iterator[list[torch.Tensor]]:
        raise CheckpointError("gone")

    monkeypatch.setattr(block, "in_main_memory", fail)
    with pytest.raises(CheckpointError, match="gone"):
        answer(loaded)
    monkeypatch.undo()
    assert answer(loaded) == expected(directory)
    loaded.close()


def test_two_answers_share_a_model_with_guests(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    loaded = load(split(), directory=directory)
    prompts = (LONG, LONG[3:], SHORT)
    found: dict[tuple[int, ...], list[int]] = {}

    def run(prompt: tuple[int, ...]) -> None:
        found[prompt] = answer(loaded, prompt)

    threads = [threading.Thread(target=run, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {prompt: expected(directory, prompt) for prompt in prompts}
    loaded.close()


def test_threads_and_pinned_memory_end(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    loaded = load(split(), directory=checkpoints("llama"))
    before = threading.active_count(), sim.pinned()
    answer(loaded)
    assert threading.active_count() == before[0]
    largest = max(p.nbytes for p in loaded.model.model.layers.parameters())
    assert sim.pinned() - before[1] == STAGING_PIECES * largest
    loaded.close()
    del loaded
    sim.settled()
    assert sim.pinned() == before[1]


def test_blocks_that_moved_are_no_guests(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    loaded = load(split(), directory=directory)
    assert answer(loaded) == expected(directory)
    loaded.residency.step_down("sim:0", 0, 1)
    # One host is left, which now runs three guests; then none.
    assert loaded.residency.away == ("model.layers.1",)
    seen = where_blocks_run(loaded)
    with closing(Stepper(loaded)) as stepper:
        assert int(stepper.prefill(LONG).argmax(-1)) == expected(directory)[0]
    assert seen["model.layers.3"] == ["sim:0"]
    # That it left is no plan: it runs where it is.
    assert seen["model.layers.1"] == ["cpu"]
    loaded.residency.step_down("sim:0", 0, 1)
    assert loaded.residency.guests(len(LONG)) == ()
    loaded.close()


def test_packed_weights_are_no_guests(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    index = read_checkpoint(directory)
    plan = made(index, 10**9, **split(load_in_8bit=True).model_dump(exclude_defaults=True))
    assert {placement.through for placement in plan.placements} == {""}


def test_only_caches_that_are_known_are_moved() -> None:
    from transformers.cache_utils import DynamicCache, StaticLayer

    caches = {"past_key_values": DynamicCache()}
    caches["past_key_values"].layers = [StaticLayer(8)]
    assert not can_move(caches)
    assert not can_move({})


# The plan


def made(index: CheckpointIndex, gpu: int, ram: int = 64 * GB, **settings: Any) -> Plan:
    device = Device("sim:0", "sim", 0, gpu, gpu, 0, "a test's")
    return make_plan(ModelConfig(**settings), index, Machine((device,), Device("cpu", "cpu", None, ram, ram, 0, "")))


@pytest.fixture(scope="module")
def llama(checkpoints: Checkpoints) -> CheckpointIndex:
    return read_checkpoint(checkpoints("llama"))


def test_the_plan_counts_what_guests_take(llama: CheckpointIndex) -> None:
    plan = made(llama, GB, **split().model_dump(exclude_defaults=True))
    layers = [p for p in plan.placements if p.kind == "layer"]
    assert [(p.device, p.through) for p in layers] == [("sim:0", "")] * 2 + [("cpu", "sim:0")] * 2
    sim, cpu = plan.devices
    assert sim.streaming == 2 * layers[0].kv_cache
    assert cpu.streaming == STAGING_PIECES * min(STAGING_PIECE, layers[0].weights)


def test_guests_cost_no_layer(llama: CheckpointIndex) -> None:
    whole = made(llama, GB)
    for share in range(10, 100, 5):
        budget = whole.devices[0].used * share // 100
        without, with_them = (made(llama, budget, prompt_streaming=wanted) for wanted in (False, True))
        assert [replace(p, through="") for p in with_them.placements] == list(without.placements)
        assert all(use.unused >= 0 for use in with_them.devices if use.limit)
        if {p.device for p in with_them.placements if p.kind == "layer"} < {"sim:0"}:
            assert {p.through for p in with_them.placements} == {""}


def test_without_room_for_their_keys_and_values_there_are_none(llama: CheckpointIndex) -> None:
    used = made(llama, GB, prompt_streaming=False, **split().model_dump(exclude_defaults=True)).devices[0].used
    cache = made(llama, GB).placements[1].kv_cache
    for budget, fits in ((used + 2 * cache - 1, False), (used + 2 * cache, True)):
        plan = made(llama, budget, max_memory={"0": budget}, **split().model_dump(exclude_defaults=True))
        assert any(p.through for p in plan.placements) == fits


def test_what_a_prompt_takes_is_what_was_planned(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    loaded = load(split(), directory=directory)
    sim.settled()
    sim.reset()
    with closing(Stepper(loaded)) as stepper:
        stepper.prefill((PROMPT * 60)[:250])
        use = loaded.plan.devices[0]
        assert use.weights + use.kv_cache < sim.peak(0) <= use.used
    loaded.close()


def rates(cpu_flops: float, copy: float, staged: float | None = None) -> MachineRates:
    def exact(value: float) -> Band:
        return Band(value, value, value)

    def of(flops: float) -> DtypeRates:
        tiny = exact(1e-9)
        return DtypeRates(exact(1e12), exact(flops), exact(1e12), exact(1e12), tiny, tiny, tiny)

    gpu = DeviceRates({"float32": of(1e15)}, exact(copy), exact(1e-9), exact(staged) if staged else None)
    return MachineRates("here", DeviceRates({"float32": of(cpu_flops)}), {"sim:0": gpu}, None)


def test_how_long_a_prompt_has_to_be(llama: CheckpointIndex) -> None:
    plan = made(llama, GB, **split().model_dump(exclude_defaults=True))
    # Two guests and two hosts of n numbers are 16 n bytes to copy; two guests take 4 n operations a token: 4 FLOP/s
    # for each byte/s are as long with 16 tokens.
    for cpu_flops, copy, staged, least in ((4e9, 1e9, None, 20), (4e10, 1e9, None, 199), (4e10, 1e9, 2e9, 99)):
        assert least_tokens(plan.placements, plan.footprint, rates(cpu_flops, copy, staged)) == least
    assert least_tokens(plan.placements, plan.footprint, rates(1e9, 1e12)) == 16
    assert least_tokens(plan.placements, plan.footprint, None) == DEFAULT_LEAST_TOKENS


def test_the_predicted_speed_of_a_prompt_knows_guests(llama: CheckpointIndex) -> None:
    settings = split().model_dump(exclude_defaults=True)
    plan, without = (made(llama, GB, prompt_streaming=wanted, **settings) for wanted in (True, False))
    speeds = [predict(p.footprint, p.placements, rates(1e9, 1e9)) for p in (plan, without)]
    assert speeds[0] is not None
    assert speeds[1] is not None
    assert speeds[0].decode_tokens_per_second == speeds[1].decode_tokens_per_second
    layer = next(p for p in plan.placements if p.kind == "layer").weights
    # On the accelerator only the copies take time; on the CPU, two layers' products do.
    assert speeds[0].prefill_tokens_per_second.likely == pytest.approx(128 / (4 * layer / 1e9), rel=0.01)
    assert speeds[1].prefill_tokens_per_second.likely == pytest.approx(
        128 / (1.1 * 2 * 2 * layer / 4 * 128 / 1e9), rel=0.2
    )


def test_orders_of_hosts_and_guests_in_a_plan(llama: CheckpointIndex) -> None:
    for here in itertools.combinations(range(LAYERS), 2):
        plan = made(llama, GB, **split(here=here).model_dump(exclude_defaults=True))
        assert [p.through for p in plan.placements if p.kind == "layer"] == [
            "" if at in here else "sim:0" for at in range(LAYERS)
        ]
