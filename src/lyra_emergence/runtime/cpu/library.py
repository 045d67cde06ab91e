"""The compiled kernels: built on first use where there is a C++ compiler, kept in the cache folder, never required.

No header of Python or torch is used. The library is called through ctypes, which lets go of the interpreter's lock; its
threads are those of the OpenMP library that torch has loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lyra_emergence.cache_files import cache_path
from lyra_emergence.compiler import find_compiler
from lyra_emergence.main_memory import LowMainMemoryError, require

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

__all__ = ["Layer", "Library", "Matrix", "find_library", "is_compiled", "why_none"]

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
_INTERFACE = 1
_LONGEST = 120.0
"""Seconds that compiling may take; it takes two."""
_COMPILING = 384 * 2**20
"""Bytes that the compiler is left for: it takes some 250 MiB, and in a control group without them it would not end."""
_NO_MEMORY = 3


class Matrix(ctypes.Structure):
    """`Matrix` of kernels.cpp."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    )


class Layer(ctypes.Structure):
    """`Layer` of kernels.cpp."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("hidden", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("key_heads", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("scaling", ctypes.c_float),
        ("norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("query", Matrix),
        ("key", Matrix),
        ("value", Matrix),
        ("output", Matrix),
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
    )


_SIZE, _POINTER = ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[type, list[type]]] = {
    "lyra_interface": (ctypes.c_int, []),
    "lyra_most_tokens": (_SIZE, []),
    "lyra_linear": (ctypes.c_int, [_POINTER, _POINTER, ctypes.c_int, _SIZE, _POINTER, ctypes.c_int]),
    "lyra_layer": (
        ctypes.c_int,
        [_POINTER, _POINTER, _POINTER, _POINTER, ctypes.c_int, _POINTER, _POINTER, _SIZE, _SIZE, ctypes.c_int],
    ),
    "lyra_attend": (
        ctypes.c_int,
        [_POINTER, _POINTER, ctypes.c_int, _POINTER, _POINTER, *[_SIZE] * 4, ctypes.c_float, ctypes.c_int],
    ),
    "lyra_packed_codes": (_SIZE, [ctypes.c_int, _SIZE, _SIZE]),
    "lyra_packed_scales": (_SIZE, [ctypes.c_int, _SIZE, _SIZE]),
    "lyra_pack": (
        ctypes.c_int,
        [_POINTER, ctypes.c_int, ctypes.c_int, _SIZE, _SIZE, _POINTER, _POINTER, ctypes.c_int],
    ),
    "lyra_unpack": (ctypes.c_int, [_POINTER, _SIZE, _SIZE, _POINTER, ctypes.c_int, ctypes.c_int]),
}


class Library:
    """The functions of kernels.cpp, their results checked."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.most_tokens = int(library.lyra_most_tokens())
        self.packed_codes = library.lyra_packed_codes
        self.packed_scales = library.lyra_packed_scales
        self._library = library

    def linear(self, *arguments: object) -> None:
        """Call `lyra_linear`.

        Raises:
            MemoryError: Memory was refused.
        """
        _check(self._library.lyra_linear(*arguments))

    def layer(self, *arguments: object) -> None:
        """Call `lyra_layer`; raises as `linear`."""
        _check(self._library.lyra_layer(*arguments))

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, threads: int) -> torch.Tensor:
        """Return what each head of `query`, (heads, size), sees in keys and values, (1, key heads, tokens, size).

        Raises:
            MemoryError: Memory was refused.
        """
        import torch

        from lyra_emergence.runtime.cpu.linear import KINDS

        output = torch.empty_like(query)
        heads, size = query.shape
        _, key_heads, tokens, _ = keys.shape
        addresses = (query.data_ptr(), output.data_ptr(), KINDS[query.dtype], keys.data_ptr(), values.data_ptr())
        _check(self._library.lyra_attend(*addresses, heads, key_heads, tokens, size, size**-0.5, threads))
        return output

    def pack(self, *arguments: object) -> None:
        """Call `lyra_pack`; raises as `linear`."""
        _check(self._library.lyra_pack(*arguments))

    def unpack(self, *arguments: object) -> None:
        """Call `lyra_unpack`; raises as `linear`."""
        _check(self._library.lyra_unpack(*arguments))


def _check(code: int) -> None:
    if code == _NO_MEMORY:
        raise MemoryError("the CPU kernels were refused memory for their inputs")
    if code:
        raise ValueError(f"the CPU kernels were called with sizes that they do not take (code {code})")


_lock = threading.Lock()


def find_library() -> Library | None:
    """Return the kernels, compiled first where they are not there yet; None where that cannot be done."""
    with _lock:
        return _find()[0]


def is_compiled() -> bool:
    """Return whether `find_library` returns at once, with the kernels or without."""
    compiler = find_compiler()
    with suppress(OSError, subprocess.SubprocessError):
        return compiler is None or _path(compiler).exists()
    return True


def why_none() -> str:
    """Return why there are no compiled kernels; "" where there are."""
    with _lock:
        return _find()[1]


@cache
def _find() -> tuple[Library | None, str]:
    compiler = find_compiler()
    if compiler is None:
        return None, "there is no C++ compiler (c++, g++ or clang++, or the one that CXX names)"
    try:
        path = _path(compiler)
        library = _opened(path) if path.exists() else None
        if library is None:
            require(_COMPILING, "the compiler")
            _compile(compiler, path)
            library = _opened(path)
    except LowMainMemoryError as error:
        return None, str(error)
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"the compiler failed: {error}"
    return library, "" if library is not None else "what was compiled cannot be loaded"


def _opened(path: Path) -> Library | None:
    """Open a library; None where it is damaged, or not of this interface."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(str(path))
        if library.lyra_interface() == _INTERFACE:
            return Library(library)
    return None


def _path(compiler: str) -> Path:
    return cache_path("kernels") / f"{_key(compiler)}.so"


@cache
def _key(compiler: str) -> str:
    """Name what was compiled by all that it depends on: sources, flags, compiler, and the CPU's instructions."""
    version = _run([compiler, "--version"])
    digest = hashlib.sha256(version + _SOURCE.read_bytes())
    for part in (*_FLAGS, sys.platform, platform.machine(), *_instructions()):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _instructions() -> Iterator[str]:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features", "model name")):
                yield line
            if not line:
                return


def _compile(compiler: str, path: Path) -> None:
    """Compile under another name, then put the result in place: no other process sees a part.

    Raises:
        OSError: The cache folder cannot be written.
        CalledProcessError: The compiler refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        target = Path(folder) / path.name
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(target)]
        _run(command)
        # A library that a power cut left half written would be mapped, and end the process where it ends.
        with target.open("rb") as file:
            os.fsync(file.fileno())
        target.replace(path)


def _run(command: list[str]) -> bytes:
    done = subprocess.run(  # noqa: S603 - the user's compiler and a source of ours
        command, capture_output=True, check=True, timeout=_LONGEST
    )
    return done.stdout
