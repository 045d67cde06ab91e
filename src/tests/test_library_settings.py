"""transformers' settings while Lyra loads, and threads that load at once."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from transformers.utils import logging as hf_logging

from lyra_emergence.config import ModelConfig
from lyra_emergence.loading import load
from lyra_emergence.runtime.library_settings import settings_for_loading

from .running import greedy, reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]

FAMILIES = ("llama", "gpt2", "mixtral")


def state() -> tuple[int, bool, str | None]:
    bars = hf_logging.is_progress_bar_enabled()
    return hf_logging.get_verbosity(), bars, os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")


def test_settings_are_what_they_were_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "0"):
        if value is not None:
            monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", value)
        before = state()
        assert before[2] == value
        with settings_for_loading():
            assert state() == (hf_logging.ERROR, False, "1")
        assert state() == before


def test_threads_that_hold_them_at_once_take_turns() -> None:
    before, inside, most = state(), [], []

    def hold() -> None:
        for _ in range(200):
            with settings_for_loading():
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert state() == before


def test_threads_load_the_same_and_other_checkpoints_at_once(
    checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    # transformers alone tells tied weights missing here.
    directories = [checkpoints(family) for family in FAMILIES]
    right = [reference(directory) for directory in directories]
    before = state()

    def total() -> int:
        return sum(sim.allocations(device) for device in range(sim.devices))

    def work(number: int, found: dict[int, list[int]]) -> None:
        loaded = load(ModelConfig(device_map="cpu" if number == 0 else None), directory=directories[number % 3])
        found[number] = greedy(loaded)
        loaded.close()

    def run() -> None:
        found: dict[int, list[int]] = {}
        threads = [threading.Thread(target=work, args=(number, found)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {number: right[number % 3] for number in range(6)}
        assert state() == before
        assert sim.settled() == (0, 0)

    run()
    allocations = total()
    for nth in (allocations // 9, allocations // 2):
        for persistent in (False, True):
            sim.fail_at(nth, persistent=persistent)
            run()
            assert sum(sim.injected(device) for device in range(sim.devices)) > 0
            sim.reset()
