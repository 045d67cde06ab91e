"""Main memory that is refused on demand: a library in front of the C library's allocator, in programs that tests start.

What it covers: posix_memalign and its kin, which torch's CPU allocator calls for every tensor and oneDNN and MKL for
their scratch; malloc and its kin, which operator new, numpy, Rust (tokenizers, safetensors) and Python call, Python for
objects above 512 bytes; mmap, which maps files, Python's arenas and compiled kernels. Each kind has a least size from
which it counts.

What it does not cover: what the C library maps for itself (stacks of threads, its own heaps), Python's small objects
once their arena is there, and memory that is given but never backed, for which Linux kills the process. It needs
Linux, glibc and a C++ compiler.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from ..simulated_accelerator import BuildError, CompilerMissingError
from ..simulated_accelerator.compilation import compile_library
from .handle import NEVER, Refusing, RefusingAllocator

__all__ = [
    "NEVER",
    "BuildError",
    "CompilerMissingError",
    "Refusing",
    "RefusingAllocator",
    "UnsupportedError",
    "build",
    "preloaded",
]

SOURCES = Path(__file__).with_name("csrc")


class UnsupportedError(Exception):
    """The C library here is not the one that the shim stands in front of."""


def build(directory: Path) -> Path:
    """Returns the library in `directory`, compiled first where it is not there yet.

    Raises:
        UnsupportedError: This is not Linux with glibc.
        CompilerMissingError: There is no C++ compiler.
        BuildError: The source does not compile.
    """
    if platform.libc_ver()[0] != "glibc":
        raise UnsupportedError("refusing allocations needs Linux and glibc")
    return compile_library(directory, SOURCES, "liballocator_shim.so", uses_torch=False)


def preloaded(library: Path) -> dict[str, str]:
    """Returns the environment of a program that is to have the library in front of its allocator."""
    return {**os.environ, "LD_PRELOAD": str(library)}
