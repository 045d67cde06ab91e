"""Experts of a mixture apart from their layers: the same tokens, the planned bytes, and what the user is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.cli import main
from lyra_emergence.config import ModelConfig
from lyra_emergence.generation import Stepper
from lyra_emergence.loading import load
from lyra_emergence.machine import probe_machine
from lyra_emergence.plan import Plan, make_plan
from lyra_emergence.runtime.memory import peak_bytes, reset_peak

from .running import greedy, reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]

MIXTURES = ("mixtral", "qwen2-moe", "olmoe")


def planned(directory: Path) -> Plan:
    return make_plan(ModelConfig(), read_checkpoint(directory), probe_machine(with_torch=True))


def room_for(plan: Plan, experts: int) -> int:
    """Bytes of an accelerator that holds all but the embeddings, and of the experts so many."""
    blocks = plan.footprint.blocks
    held = [b for b in blocks if b.kind in ("layer", "norm", "head")]
    held += [b for b in blocks if b.kind == "experts"][:experts]
    return sum(b.nbytes for b in held) + plan.footprint.activations.of(layer=True, experts=True, head=True) + 600


def experts_on(plan: Plan, device: str) -> list[str]:
    return [p.block for p in plan.placements if p.kind == "experts" and p.device == device]


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_layer_without_its_experts_gives_the_same_tokens_in_the_planned_bytes(
    family: str, count: int, checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    directory = checkpoints(family)
    sim.set_cap(room_for(planned(directory), count))
    sim.occupy(sim.cap(1), 1)
    plan = planned(directory)
    assert plan.rung.name == "planned"
    assert plan.rung.reason == "as many layers as the budgets allow, and then their experts"
    assert plan.devices[0].layers == 4
    assert len(experts_on(plan, "sim:0")) == count
    loaded = load(ModelConfig(), directory=directory, plan=plan)
    tables = sum(t.nbytes for name, t in loaded.model.named_buffers() if name not in loaded.model.state_dict())
    assert sim.used() == plan.devices[0].weights + tables
    assert [a.outcome for a in loaded.report.attempts] == ["passed over", "loaded"]
    reset_peak("sim:0")
    stepper = Stepper(loaded)
    stepper.prefill([5] * (plan.context_length - 2))
    stepper.step(7)
    peak = peak_bytes("sim:0")
    assert peak is not None
    assert peak - tables <= plan.devices[0].used
    stepper.close()
    assert greedy(loaded) == reference(directory)
    loaded.close()
    assert sim.used() == 0


@pytest.mark.parametrize("family", MIXTURES)
def test_a_map_may_part_experts_from_their_layers(
    family: str, checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    directory = checkpoints(family)
    experts = [block.name for block in read_checkpoint(directory).blocks if block.kind == "experts"]
    for there in ("cpu", 1):
        split: dict[str, int | str] = {"": 0, **dict.fromkeys(experts[1:], there)}
        loaded = load(ModelConfig(device_map=split), directory=directory)
        assert loaded.plan.rung.reason == "the custom device map"
        assert loaded.report.device_map[experts[-1]] == there
        assert loaded.report.device_map[experts[0]] == 0
        assert greedy(loaded) == reference(directory)
        loaded.close()
    assert [sim.used(device) for device in range(sim.devices)] == [0, 0]


@pytest.mark.parametrize("nth", [5, 20, 30])
def test_running_out_at_the_experts_keeps_the_layers(
    nth: int, checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    directory = checkpoints("mixtral")
    sim.set_cap(room_for(planned(directory), 2))
    sim.occupy(sim.cap(1), 1)
    sim.fail_at(nth, device=0)
    loaded = load(ModelConfig(), directory=directory)
    assert [a.outcome for a in loaded.report.attempts] == ["passed over", "out of memory", "loaded"]
    assert greedy(loaded) == reference(directory)
    loaded.close()
    assert sim.used() == 0


def test_the_plan_shows_where_experts_are(
    checkpoints: Checkpoints, sim: SimulatedAccelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = checkpoints("mixtral")
    sim.set_cap(room_for(planned(directory), 1))
    sim.occupy(sim.cap(1), 1)
    assert main(["plan", "--model", str(directory)]) == 0
    shown = capsys.readouterr().out
    assert "\nsim:1  nothing free that may be used\n" in shown
    assert "\nlayers  0 0000\nexperts 0 0ccc\n" in shown, shown
    assert "  0 sim:0: layers 0-3, experts of layer 0, norm, head\n" in shown
    assert "  c cpu: embedding, experts of layers 1-3\n" in shown
    block = "model.layers.2.block_sparse_moe.experts"
    assert main(["plan", "--model", str(directory), "--explain", block]) == 0
    assert "a token reads few of its experts, so layers go first" in capsys.readouterr().out
