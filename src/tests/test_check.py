"""Checking a plan: what is predicted, what is measured, and what the frameworks take by themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from lyra_emergence.check import DeviceCheck, check_plan
from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.cli import main
from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import DoesNotFitError, LyraError
from lyra_emergence.framework import (
    ASSUMED,
    MOST_KERNEL_BUFFERS,
    FrameworkCosts,
    framework_costs,
    kernel_buffers,
    measure_framework,
    private_bytes,
)
from lyra_emergence.machine import probe_machine
from lyra_emergence.plan import make_plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="private memory is measured on Linux only")
MIB = 2**20


@pytest.mark.parametrize(
    ("predicted", "measured", "holds"),
    [
        (100 * MIB, 100 * MIB, True),
        (100 * MIB, 84 * MIB, True),
        (100 * MIB, 84 * MIB - 1, False),
        (100 * MIB, 100 * MIB + 1, False),
        (1020 * MIB, 1000 * MIB, True),
        (1021 * MIB, 1000 * MIB, False),
        (100 * MIB, None, None),
    ],
)
def test_a_prediction_holds_within_two_percent_or_16_mib_and_never_under(
    predicted: int, measured: int | None, holds: bool | None
) -> None:
    assert DeviceCheck("cpu", predicted, measured, 0, 0).holds is holds


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_a_split_plan_is_measured_on_each_device(
    family: str, checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    directory = checkpoints(family)
    index = read_checkpoint(directory)
    config = ModelConfig(model_id=str(directory))
    whole = make_plan(config, index, probe_machine(with_torch=True)).devices[0]
    config.max_memory = {"0": whole.activations + (whole.weights + whole.kv_cache) // 2, "1": 0}
    plan = make_plan(config, index, probe_machine(with_torch=True))
    check = check_plan(config, directory, plan)
    assert (check.rung, check.prompt_tokens, check.new_tokens) == ("planned", 252, 4)
    names = [device.device for device in check.devices]
    assert names == ["sim:0", "cpu"]
    for device in check.devices[:1]:
        assert device.holds, device
        assert device.weights_measured is not None
        # What no block claims: rotary tables.
        assert 0 <= device.weights_measured - device.weights_predicted <= 1024
    assert check.tokens_per_second > 0
    assert json.loads(json.dumps(check.to_json()))["format"] == "lyra.check/1"


@on_linux
def test_main_memory_is_measured_with_its_peak(checkpoints: Checkpoints, tmp_path: Path) -> None:
    # In a process of its own: what other tests left in the allocator would serve this one.
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from lyra_emergence.check import check_plan\n"
        "from lyra_emergence.checkpoint import read_checkpoint\n"
        "from lyra_emergence.config import ModelConfig\n"
        "from lyra_emergence.machine import probe_machine\n"
        "from lyra_emergence.plan import make_plan\n"
        "directory = Path(sys.argv[1])\n"
        "config = ModelConfig(model_id=str(directory), device_map='cpu', dtype='bfloat16')\n"
        "plan = make_plan(config, read_checkpoint(directory), probe_machine())\n"
        "print(json.dumps(check_plan(config, directory, plan).to_json()))\n"
    )
    command = [sys.executable, "-c", code, str(checkpoints("llama"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    (cpu,) = json.loads(done.stdout.splitlines()[-1])["devices"]
    assert cpu["predicted"] > kernel_buffers("bfloat16", 0)
    assert cpu["mapped"] == 0  # converted
    assert cpu["holds"] is True


@on_linux
def test_the_watcher_sees_a_peak_that_is_over(tmp_path: Path) -> None:
    from lyra_emergence.check import _PrivateMemory

    with _PrivateMemory() as memory:
        before = memory.now()
        block = torch.ones(64 * MIB // 4)
        held = memory.now()
        time.sleep(0.2)  # for the other process to look, on a busy machine too
        del block
        peak = memory.peak()
    assert before is not None
    assert held is not None
    assert peak is not None
    assert held - before >= 60 * MIB
    assert peak >= held


def test_memory_that_runs_out_in_the_run_is_an_error_and_leaves_nothing(
    checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    directory = checkpoints("llama")
    config = ModelConfig(model_id=str(directory))
    plan = make_plan(config, read_checkpoint(directory), probe_machine(with_torch=True))
    blind = replace(plan, rungs=(replace(plan.rungs[plan.start], name="full"),), start=0)
    before = sim.used()
    # Room for the weights and what is reserved for a moment after loading, not for the run.
    sim.fail_at(60, persistent=True)
    with pytest.raises(DoesNotFitError):
        check_plan(config, directory, blind)
    sim.fail_at(0)
    assert sim.settled()[0] <= before


# --- What the frameworks take ------------------------------------------------------------------------


def test_until_it_is_measured_figures_of_other_machines_stand_in() -> None:
    assert framework_costs() == ASSUMED
    assert not ASSUMED.measured


@on_linux
def test_the_frameworks_are_measured_in_a_process_of_their_own_and_kept(home: Path) -> None:
    before = private_bytes()
    costs = measure_framework()
    assert costs.measured
    assert 100 * MIB < costs.main_memory < 4000 * MIB
    assert framework_costs() == costs
    assert private_bytes() - before < 20 * MIB
    kept = next(home.rglob("framework.json"))
    held = json.loads(kept.read_text())
    held["versions"]["torch"] = "0.1"
    kept.write_text(json.dumps(held))
    assert framework_costs() == ASSUMED
    for damage in ("", "[]", '{"format": "lyra.framework/1"}', '{"format": 1, "costs": 3}'):
        kept.write_text(damage)
        assert framework_costs() == ASSUMED


def test_a_measurement_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lyra_emergence.framework._CHILD", "raise SystemExit('no torch here')")
    with pytest.raises(LyraError, match="measuring what torch takes failed: no torch here"):
        measure_framework()


@on_linux
def test_what_the_process_has_already_is_not_reserved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lyra_emergence.machine.framework_costs", lambda: FrameworkCosts(private_bytes() + 100 * MIB, 0)
    )
    # What kernels take beside a model comes later.
    reserved = 100 * MIB + MOST_KERNEL_BUFFERS
    assert probe_machine().cpu.reserved_bytes == pytest.approx(reserved, abs=5 * MIB)
    monkeypatch.setattr("lyra_emergence.machine.framework_costs", lambda: FrameworkCosts(1, 0))
    assert probe_machine().cpu.reserved_bytes == 0


# --- The command -------------------------------------------------------------------------------------


@pytest.fixture
def _known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lyra_emergence.framework.framework_costs", lambda: FrameworkCosts(1, 0))


@pytest.mark.usefixtures("_known_costs")
def test_the_command_shows_predicted_beside_measured(
    checkpoints: Checkpoints, sim: SimulatedAccelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--check", "--model", str(checkpoints("llama")), "--context", "200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": a prompt of 196 tokens and 4 after it, on the rung 'full'")
    assert lines[2].split() == ["predicted", "measured", "spare"]
    assert lines[3].startswith("sim:")  # either, as their pace was measured a moment ago
    assert lines[3].endswith("  as planned")
    assert " tokens/s, prompt " in lines[-1]


@pytest.mark.usefixtures("_known_costs")
def test_the_command_as_json(
    checkpoints: Checkpoints, sim: SimulatedAccelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--check", "--json", "--model", str(checkpoints("llama")), "--batch", "3"]) == 0
    check = json.loads(capsys.readouterr().out)
    assert (check["holds"], check["rung"], check["batch"]) == (True, "full", 3)


def test_a_check_is_for_this_machine_and_for_weights_that_are_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["plan", "--check", "--gpu", "24GB"]) == 2
    assert "cannot plan for other hardware" in capsys.readouterr().err
