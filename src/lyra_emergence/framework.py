"""What the frameworks themselves take before and beside a model's tensors, measured once per machine and kept.

A child process imports them, runs a small model as generation does, and tells what its memory grew by: the modules,
thread pools and kernels' buffers in main memory, and on each NVIDIA GPU the context and workspaces. The figures belong
to versions of the packages and are kept under them. Until they are measured, figures from other machines stand in.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from lyra_emergence.cache_files import cache_path, replace_whole
from lyra_emergence.errors import LyraError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "KERNELS_KEPT",
    "MOST_KERNEL_BUFFERS",
    "FrameworkCosts",
    "framework_costs",
    "kernel_buffers",
    "measure_framework",
    "private_bytes",
]

JSON_FORMAT = "lyra.framework/1"
KERNELS_KEPT = 16
"""Kernels for products below float32 that oneDNN may keep on the CPU (`runtime/kernel_caches.py`).

A token needs one for every kind of projection and two for attention, 5 to 14 in all; a kernel takes a millisecond to
compile, so none of these may be lost from one layer to the next.
"""
_BUFFERS, _LOW_PRECISION_BUFFERS = 16 * 2**20, 10 * 2**20
_KERNEL_BYTES = 700 * 1024
MOST_KERNEL_BUFFERS = _LOW_PRECISION_BUFFERS + KERNELS_KEPT * _KERNEL_BYTES
"""Main memory that kernels take at most beside a model's tensors."""
_PACKAGES = ("torch", "transformers", "bitsandbytes")
_FILE = "framework.json"
_MOST_BYTES = 2**40
_LONGEST = 180.0
"""Seconds that the measurement may take: importing torch from a cold disk takes most of them."""


@dataclass(frozen=True, slots=True)
class FrameworkCosts:
    """Bytes that a process takes which has run a model, without the model.

    Attributes:
        main_memory: Private main memory: interpreter, modules, thread pools, the kernels' own buffers.
        quantization: What bitsandbytes adds to it.
        gpus: Context and workspaces on each NVIDIA GPU, by torch's device name.
        measured: Whether the figures were measured on this machine.
    """

    main_memory: int
    quantization: int
    gpus: Mapping[str, int] = field(default_factory=dict)
    measured: bool = True


ASSUMED = FrameworkCosts(main_memory=480 * 2**20, quantization=64 * 2**20, measured=False)
"""Measured with the CUDA build of torch 2.15 and transformers 5.23 on Linux: 453 to 468 MiB, and 56 to 60 MiB."""


def framework_costs() -> FrameworkCosts:
    """Return the figures kept for the installed versions, or the assumed ones."""
    return _read(cache_path(_FILE)) or ASSUMED


def _read(path: Path) -> FrameworkCosts | None:
    """Return the figures in a file; None where it is absent, damaged or of other versions."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["format"] == JSON_FORMAT and held["versions"] == _versions():
            return _checked(FrameworkCosts(**held["costs"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None


def _checked(costs: FrameworkCosts) -> FrameworkCosts:
    """Return figures from a file, or raise ValueError: planning adds them up without looking."""
    figures = (costs.main_memory, costs.quantization, *costs.gpus.values())
    if not all(type(figure) is int and 0 <= figure < _MOST_BYTES for figure in figures):
        raise ValueError("no bytes that a framework could take")
    return costs


def kernel_buffers(dtype: str, kernels: int) -> int:
    """Return the bytes of main memory that kernels' scratch and the allocator's loose ends take beside tensors.

    1 to 15 MiB were measured in float32, of which MKL keeps up to 8 for packed operands; below it 4 to 7 MiB, and 0.6
    to 0.8 for each kernel that is kept.

    Args:
        dtype: torch's name of the dtype that the model computes in.
        kernels: Kernels that oneDNN compiles for it, those that it drops among them.
    """
    if dtype == "float32":
        return _BUFFERS
    return _LOW_PRECISION_BUFFERS + min(kernels, KERNELS_KEPT) * _KERNEL_BYTES


def measure_framework() -> FrameworkCosts:
    """Measure in a child process, keep the figures and return them.

    Raises:
        LyraError: The child failed; its last line says why.
    """
    command = [sys.executable, "-c", _CHILD]
    try:
        done = subprocess.run(  # noqa: S603  # this interpreter and a program of ours
            command, capture_output=True, text=True, timeout=_LONGEST, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LyraError(f"measuring what torch takes took longer than {_LONGEST:.0f} s") from error
    if done.returncode:
        last = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise LyraError(f"measuring what torch takes failed: {last}")
    costs = FrameworkCosts(**json.loads(done.stdout.splitlines()[-1]))
    _keep(costs)
    return costs


def private_bytes(process: int | None = None) -> int:
    """Return the bytes of main memory that a process has to itself: pages that no file backs, where the system tells.

    Args:
        process: Its id; this process by default.
    """
    try:
        for line in Path(f"/proc/{process or 'self'}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    import psutil

    return int(psutil.Process(process).memory_info().rss)


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:2]))}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _keep(costs: FrameworkCosts) -> None:
    held = {"format": JSON_FORMAT, "versions": _versions(), "costs": asdict(costs)}
    replace_whole(cache_path(_FILE), json.dumps(held))


# The model is large enough that kernels make the buffers they make for real ones, and small enough for a second's work.
_CHILD = """
import json
from lyra_emergence.framework import measure_in_this_process
print(json.dumps(measure_in_this_process()))
"""


def measure_in_this_process() -> dict[str, object]:
    """Import the frameworks and run a model in this process, which should have done neither; return the figures."""
    import importlib.util

    from lyra_emergence.runtime.warm_up import run_packed_projection, run_small_model

    gpus = run_small_model()
    main_memory = private_bytes()
    quantization = 0
    if importlib.util.find_spec("bitsandbytes") is not None:
        run_packed_projection("8bit")
        run_packed_projection("4bit")
        quantization = max(0, private_bytes() - main_memory)
    return {"main_memory": main_memory, "quantization": quantization, "gpus": gpus, "measured": True}
