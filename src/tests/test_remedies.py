"""What is tried where a model does not fit the fastest memory, in which order, and what the plan says of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import DoesNotFitError
from lyra_emergence.footprint import estimate_footprint
from lyra_emergence.machine import Device, Machine
from lyra_emergence.plan import Plan, make_plan
from lyra_emergence.remedies import attempts

from . import paper_checkpoints as paper

if TYPE_CHECKING:
    from pathlib import Path

    from lyra_emergence.checkpoint import CheckpointIndex

GB = 10**9


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory: pytest.TempPathFactory) -> CheckpointIndex:
    """Llama 2 7B's shape with eight key heads and a context of 32,768: 8,192 tokens are planned for by default."""
    return paper.llama(
        tmp_path_factory.mktemp("7b"), layers=32, hidden=4096, inner=11008, heads=32, key_heads=8, vocab=32000,
        context=32768,
    )  # fmt: skip


def machine(*gpus: int, cpu: int = 64 * GB) -> Machine:
    devices = tuple(Device(f"cuda:{n}", "cuda", n, size, size, 0, "GPU") for n, size in enumerate(gpus))
    return Machine(devices, Device("cpu", "cpu", None, cpu, cpu, 0, "CPU"))


def whole(index: CheckpointIndex, context: int, quantization: Any = None, *, on_cpu: bool = False) -> int:
    """The bytes that one GPU, or main memory, must have to hold the model."""
    made = estimate_footprint(index, context_length=context, quantization=quantization)
    return made.weights + made.kv_cache + made.activations.of(layer=True, kv_cache=made.kv_cache, on_cpu=on_cpu)


def plan(index: CheckpointIndex, on: Machine, **config: Any) -> Plan:
    return make_plan(ModelConfig(**config), index, on)


def what(made: Plan) -> tuple[str, int, str | None]:
    return made.rung.name, made.context_length, made.footprint.quantization


def test_the_order_of_attempts(seven_billion: CheckpointIndex) -> None:
    tried = [(a.goal, a.quantization, a.context) for a in attempts(ModelConfig(allow_quantization=True), seven_billion)]
    speed, rest = tried[:9], tried[9:]
    assert speed == [("fast", form, n) for form in (None, "8bit", "4bit") for n in (8192, 4096, 2048)]
    assert rest[:2] == [("memory", "8bit", 8192), ("memory", "4bit", 8192)]
    assert rest[2:7] == [("any", None, n) for n in (8192, 4096, 2048, 1024, 512)]


def test_a_shorter_context_keeps_the_model_on_the_gpu_and_is_said(seven_billion: CheckpointIndex) -> None:
    fits = whole(seven_billion, 4096)
    made = plan(seven_billion, machine(fits))
    assert what(made) == ("full", 4096, None)
    assert made.notes[-1] == (
        "the context is shortened to 4096 tokens: 8192 do not fit, so that nothing has to leave the fastest memory"
    )
    assert what(plan(seven_billion, machine(whole(seven_billion, 8192)))) == ("full", 8192, None)


def test_a_context_that_was_asked_for_is_kept_and_layers_spill(seven_billion: CheckpointIndex) -> None:
    made = plan(seven_billion, machine(whole(seven_billion, 4096)), context_length=8192)
    assert what(made) == ("planned", 8192, None)


def test_a_context_is_not_shortened_where_that_does_not_help(seven_billion: CheckpointIndex) -> None:
    made = plan(seven_billion, machine(8 * GB))
    assert what(made) == ("planned", 8192, None)
    assert not any("shortened" in note for note in made.notes)


def test_a_context_is_not_shortened_below_what_the_answers_need(seven_billion: CheckpointIndex) -> None:
    on = machine(whole(seven_billion, 2048))
    assert what(plan(seven_billion, on)) == ("full", 2048, None)
    assert what(plan(seven_billion, on, pipeline_kwargs={"max_new_tokens": 1025})) == ("planned", 8192, None)


def test_packing_comes_before_the_cpu_where_it_is_allowed(seven_billion: CheckpointIndex) -> None:
    for form in ("8bit", "4bit"):
        on = machine(whole(seven_billion, 8192, form))
        assert what(plan(seven_billion, on))[2] is None
        made = plan(seven_billion, on, allow_quantization=True)
        assert what(made) == ("full", 8192, form)
        assert made.notes[-1].startswith(f"the layers are packed to {form[0]} bits (")
        assert made.notes[-1].endswith("which 'allow_quantization' permits")


def test_both_remedies_together(seven_billion: CheckpointIndex) -> None:
    on = machine(whole(seven_billion, 2048, "8bit"))
    made = plan(seven_billion, on, allow_quantization=True)
    assert what(made) == ("full", 2048, "8bit")
    assert [note.split(":")[0][:20] for note in made.notes[-2:]] == ["the context is short", "the layers are packe"]


def test_what_is_allowed_is_packed_too_where_layers_spill(seven_billion: CheckpointIndex) -> None:
    made = plan(seven_billion, machine(3 * GB), allow_quantization=True)
    assert what(made) == ("planned", 8192, "8bit")


def test_packed_layers_that_main_memory_cannot_hold_are_left_in_the_file_as_they_are(
    seven_billion: CheckpointIndex,
) -> None:
    made = plan(seven_billion, machine(cpu=3 * GB), allow_quantization=True)
    assert what(made) == ("cpu", 8192, None)
    assert any(p.device == "disk" for p in made.placements)


def test_where_main_memory_is_the_fastest_its_limit_counts(seven_billion: CheckpointIndex) -> None:
    on = machine(cpu=whole(seven_billion, 2048, on_cpu=True))
    assert what(plan(seven_billion, on)) == ("cpu", 2048, None)
    assert not any(p.device == "disk" for p in plan(seven_billion, on).placements)


def test_without_bitsandbytes_nothing_is_packed(
    seven_billion: CheckpointIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert what(plan(seven_billion, machine(8 * GB), allow_quantization=True)) == ("planned", 8192, None)


def test_a_custom_map_is_followed_as_it_is(seven_billion: CheckpointIndex) -> None:
    tried = list(attempts(ModelConfig(device_map={"": 0}, allow_quantization=True), seven_billion))
    assert {a.goal for a in tried} == {"any"}


def test_a_refusal_tells_of_the_form_that_was_asked_for(seven_billion: CheckpointIndex) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        plan(seven_billion, machine(cpu=10**7), allow_quantization=True)
    assert "weights 0 B" in str(caught.value)  # they stay in the file; the cache does not


def test_the_chosen_packing_is_what_loads(tmp_path: Path) -> None:
    index = paper.llama(tmp_path, layers=4, hidden=256, inner=512, heads=4, key_heads=4, context=1024)
    made = plan(index, machine(whole(index, 1024, "4bit")), allow_quantization=True, context_length=1024)
    assert made.footprint.quantization == "4bit"
    assert made.to_json()["quantization"] == "4bit"
