"""The process ends at once, and nothing that is to be done at the end is left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import atexit, sys, threading, time
from lyra_emergence.cli.ending import run_and_end

class Left:
    def __del__(self):
        print("taken apart")

kept = Left()
kept.itself = kept

def program():
    def work():
        time.sleep(0.2)
        print("thread done")
    threading.Thread(target=work).start()
    atexit.register(print, "registered")
    {body}

sys.exit(run_and_end(program))
"""


def ended(body: str, stdout: int | IO[str] = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    # Unbuffered, every print would meet a full file for itself.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", PROGRAM.format(body=body)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT, env=environ)


def test_threads_and_what_is_registered_end_first_and_objects_are_left_as_they_are() -> None:
    done = ended("print('answer'); return 3")
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines() == ["answer", "thread done", "registered"]


def test_an_error_ends_as_python_ends_it() -> None:
    done = ended("raise RuntimeError('broken')")
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: broken\n")
    assert done.stdout.splitlines() == ["thread done", "registered", "taken apart"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no file that is always full")
def test_output_that_finds_no_room_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        done = ended("print('answer'); return 0", full)
    assert done.returncode == 120
    assert "No space left on device" in done.stderr
