"""A disk that fills up, breaks or is cut off at a chosen call: a library that is preloaded before libc.

`run` starts a program of Python with it; the program holds a `disk` (see `_PRELUDE`) whose methods are those of
disk_shim.c. What it covers: files that the program itself writes and reads under one folder. What it does not: pages of
a map, which no call reads or writes, and calls that libc makes from within itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..simulated_accelerator.compilation import find_compiler

SOURCE = Path(__file__).with_name("disk_shim.c")

_PRELUDE = """
import ctypes, errno, json, os, sys
from pathlib import Path
sys.dont_write_bytecode = True
disk = ctypes.CDLL(None)
disk.disk_calls.restype = disk.disk_injected.restype = ctypes.c_long
disk.disk_fail_at.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int]
folder = Path(sys.argv[1])
disk.disk_reset(os.fsencode(folder))

def killed_at(nth, work):
    '''Does the work in a copy of this process, which dies at the call; returns whether it came that far.'''
    child = os.fork()
    if child == 0:
        disk.disk_kill_at(nth)
        work()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
"""


def compile_shim(directory: Path) -> Path:
    """Returns the library, compiled into `directory` where it is not there yet."""
    library = directory / f"disk-shim-{SOURCE.stat().st_mtime_ns}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = [find_compiler(), "-x", "c", "-std=gnu11", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
        subprocess.run([*command, str(SOURCE), "-o", str(unfinished), "-ldl"], check=True, capture_output=True)
        unfinished.replace(library)
    return library


def run(library: Path, folder: Path, program: str, *arguments: str) -> Any:
    """Runs a program with the library; returns the JSON that it printed last.

    It finds `disk`, `folder`, `killed_at` and the modules of `_PRELUDE`.
    """
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _PRELUDE + program, str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
