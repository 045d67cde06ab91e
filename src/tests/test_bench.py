"""`lyra.py bench`: what it measures is what ran, and its limit is the bytes over the rate."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from lyra_emergence.bench import Spread, bench, decode_limit
from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.cli import main
from lyra_emergence.cli.bench import _limit_line
from lyra_emergence.config import ModelConfig
from lyra_emergence.machine import probe_machine
from lyra_emergence.plan import make_plan
from lyra_emergence.speed.machine_rates import Band, DeviceRates, DtypeRates, MachineRates

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]


def rates(read: float) -> MachineRates:
    band, moment = Band(read, read, read), Band(1e-4, 1e-4, 1e-4)
    dtype = DtypeRates(band, band, band, band, moment, moment, moment)
    return MachineRates("here", DeviceRates({"float32": dtype}), {}, None)


def test_the_limit_is_the_bytes_of_a_token_over_the_rate(checkpoints: Checkpoints) -> None:
    directory = checkpoints("llama")
    plan = make_plan(ModelConfig(device_map="cpu"), read_checkpoint(directory), probe_machine(with_torch=False))
    read = sum(p.weights for p in plan.placements if p.kind not in {"embedding", "other"})
    assert decode_limit(plan, rates(1e9)) == pytest.approx(1e9 / read)
    # Another dtype was measured, or none.
    half = MachineRates("here", DeviceRates({}), {}, None)
    assert decode_limit(plan, half) is None


def test_what_is_measured_is_what_ran(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    config = ModelConfig()
    plan = make_plan(config, read_checkpoint(directory), probe_machine(with_torch=True))
    found = bench(config, directory, plan, prompt_tokens=1000, new_tokens=6, rounds=2)
    assert found.prompt_tokens == plan.context_length - 6
    assert (found.new_tokens, found.rounds, found.rung) == (6, 2, "full")
    for spread in (found.first_token_seconds, found.prefill_tokens_per_second, found.decode_tokens_per_second):
        assert 0 < spread.low <= spread.median <= spread.high
    use = next(use for use in plan.devices if use.device == "sim:0")
    assert use.weights < found.device_bytes["sim:0"] <= use.weights + use.kv_cache + use.activations
    assert json.loads(json.dumps(found.to_json()))["format"] == "lyra.bench/1"
    assert sim.settled() == (0, 0)


def test_a_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_a_limit_that_was_passed_is_no_limit() -> None:
    assert _limit_line(20.0, 0.85) == "reading the weights alone allows 20.0 tokens/s here: 85% of that was reached"
    assert "lyra.py plan --measure measures anew" in _limit_line(1.6, 7.8)


def test_the_command(checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", str(checkpoints("llama")), "--prompt", "40", "--new", "5", "--rounds", "1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "a prompt of 40 tokens, 5 new ones, median of 1 rounds" in out
    assert "reading the weights alone allows " in out
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt_tokens"], found["new_tokens"], found["dtype"]) == (40, 5, "float32")
    assert found["predicted"]["decode_tokens_per_second"]["likely"] > 0
    assert found["decode_limit_tokens_per_second"] > 0
