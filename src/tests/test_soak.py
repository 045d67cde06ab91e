"""The soak for some seconds, and the rule that it judges by."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.soak import Sample, growth, slope

if TYPE_CHECKING:
    from .simulated_accelerator import SimulatedAccelerator

REPOSITORY = Path(__file__).parents[2]
STILL = Sample(device=0, pinned=0, threads=5, handles=6, maps=0, private=400 * 2**20, objects=10_000)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")
def test_nothing_grows_over_some_seconds(
    request: pytest.FixtureRequest, simulated_devices: SimulatedAccelerator
) -> None:
    assert request.config.cache is not None
    builds = request.config.cache.mkdir("simulated_accelerator")
    command = [
        sys.executable,
        "-m",
        "benchmarks.soak",
        "--minutes",
        "0.1",
        "--family",
        "llama",
        "--builds",
        str(builds),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {
        what: int(count) for count, _, what in (line.strip().partition(" ") for line in done.stdout.splitlines()[:5])
    }
    assert counts["cycles"] >= 8
    assert counts["answers"] == 3 * counts["cycles"]
    assert "WRONG" not in done.stdout


def test_the_rule() -> None:
    assert list(growth([STILL] * 20)) == []
    one_thread = [*[STILL] * 15, *[replace(STILL, threads=6)] * 5]
    assert list(growth(one_thread)) == ["threads grew from 5 to 6"]
    filling_up = [*[STILL] * 5, *[replace(STILL, handles=9, private=500 * 2**20)] * 15]
    assert list(growth(filling_up)) == []
    noisy = [replace(STILL, private=STILL.private + 2**20 * (step * 7919 % 5)) for step in range(40)]
    assert list(growth(noisy)) == []
    leaking = [replace(sample, private=sample.private + 200_000 * step) for step, sample in enumerate(noisy)]
    assert [said.split(" by ")[0] for said in growth(leaking)] == ["private grew"]
    keeping = [replace(STILL, objects=10_000 + 20 * step) for step in range(40)]
    assert list(growth(keeping)) == ["objects grew by 400 over 20 cycles, more than 300"]


def test_the_slope_does_not_follow_outliers() -> None:
    assert slope([0, 2, 4, 6, 8]) == 2
    assert slope([5] * 9 + [1000]) == 0
    assert slope(list(range(5000))) == 1
