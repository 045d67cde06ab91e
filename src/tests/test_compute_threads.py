"""Computing with one thread where no more can be started."""

from __future__ import annotations

import _thread
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lyra_emergence.runtime.compute_threads import settle_for_fewer_threads

if TYPE_CHECKING:
    import pytest


def in_a_new_thread() -> bool:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(settle_for_fewer_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_threads_are_tried_once_by_each_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    assert not in_a_new_thread()
    real, started = _thread.start_new_thread, []

    def one(*arguments: Any) -> int:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(1)
        return real(*arguments)

    found: list[bool] = []

    def work() -> None:
        monkeypatch.setattr(_thread, "start_new_thread", one)
        found.append(settle_for_fewer_threads())
        found.append(settle_for_fewer_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True, False]
    assert set_to == [1]


LIMITED = """
import resource, threading
import torch
from lyra_emergence.runtime.compute_threads import settle_for_fewer_threads

torch.set_num_threads(3)
lines = open("/proc/self/status").read().splitlines()
size = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))
x = torch.empty(2_000_000)
resource.setrlimit(resource.RLIMIT_AS, (size + 12 * 2**20, -1))
print(settle_for_fewer_threads(), torch.get_num_threads())
print(int(x.fill_(2).sum()))  # with OpenMP's own try the process would have ended here
"""


def test_a_process_that_may_start_no_thread_goes_on_with_one() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "1", "4000000"]
