"""Bytes in use and bytes free on devices, and giving back what the frameworks and the C library hold on to."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache
from typing import Any

import torch

from lyra_emergence.errors import is_out_of_memory
from lyra_emergence.machine import probe_machine

__all__ = [
    "allocated_bytes",
    "free_bytes",
    "give_back",
    "keep_freed_memory",
    "peak_bytes",
    "prove_room",
    "reset_peak",
    "return_freed_memory",
    "stop_using_onednn",
]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
_MAPPED_FROM = 256 * 1024
_MOST_MAPPED_FROM = 32 * 2**20
"""glibc accepts no more."""
_TRIMMED_FROM = 2**20


def allocated_bytes(device: str) -> int:
    """Return the bytes that this process's tensors take on an accelerator."""
    module, ordinal = _module(device)
    return int(module.current_allocated_memory() if ordinal is None else module.memory_allocated(ordinal))


def peak_bytes(device: str) -> int | None:
    """Return the most bytes that tensors took on an accelerator since `reset_peak`; None where it keeps no count."""
    module, ordinal = _module(device)
    return None if ordinal is None else int(module.max_memory_allocated(ordinal))


def reset_peak(device: str) -> None:
    """Begin a new count of the most bytes on an accelerator, where it keeps one."""
    module, ordinal = _module(device)
    if ordinal is not None:
        module.reset_peak_memory_stats(ordinal)


def _module(device: str) -> tuple[Any, int | None]:
    kind, _, ordinal = device.partition(":")
    return torch.get_device_module(kind), int(ordinal) if ordinal else None


def free_bytes(device: str) -> int:
    """Return the bytes that can be allocated on a device now; 0 for a device that is not there.

    Where there is no memory left to look with, it is 0 too.
    """
    try:
        found = probe_machine(with_torch=True).find(device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return 0
    return found.free_bytes if found is not None else 0


def prove_room(nbytes: int) -> None:
    """Ask main memory for `nbytes`, and let them go again.

    For what comes next in code that ends the process where it is refused memory: better an error before it.

    Raises:
        RuntimeError: They are not to be had.
    """
    torch.empty(nbytes, dtype=torch.uint8)


def give_back() -> None:
    """Collect garbage, and return the accelerators' cached blocks to their drivers."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def return_freed_memory() -> None:
    """Let glibc's allocator return what torch frees on the CPU to the system at once, and return what it has kept.

    Left alone, it raises its threshold for separate maps to 32 MB as soon as a large tensor is freed. From then on
    temporaries of a prompt land in a heap that is never whole again: a prompt of 2,048 tokens took 1.8 times the memory
    of its tensors, and kept half of it (docs/decisions.md has the figures). Does nothing under other C libraries.
    """
    _set_allocator(_MAPPED_FROM, _TRIMMED_FROM)
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Let glibc's allocator keep what is freed, for single tokens: each makes the caches anew, a token longer.

    Fresh pages for them would cost as much time as attention itself.
    """
    _set_allocator(_MOST_MAPPED_FROM, 2 * _MOST_MAPPED_FROM)


def stop_using_onednn() -> None:
    """Compute without oneDNN from now on, in the whole process; prompts take longer on the CPU."""
    # The setter of torch.backends would warn of a switch for Intel's GPUs.
    torch._C._set_mkldnn_enabled(False)  # noqa: SLF001


def _set_allocator(mapped_from: int, trimmed_from: int) -> None:
    mallopt = getattr(_c_library(), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, mapped_from)
        mallopt(_TRIM_THRESHOLD, trimmed_from)


@cache
def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform.startswith("linux") else None
