"""Compiles a library once per version of its sources, of torch and of the compiler, and keeps the result.

No header of Python or pybind11 is used: the library is driven through ctypes, so that it needs a C++ compiler and
torch's own headers and nothing else, and serves every Python version.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock

SOURCES = Path(__file__).with_name("csrc")
# The device does next to no work of its own: time goes into torch's CPU kernels, so compile fast.
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden")
PARALLEL_JOBS = 2


class CompilerMissingError(Exception):
    """There is no C++ compiler on this machine."""


class BuildError(Exception):
    """The compiler refused a source; the message is what it said."""


def find_compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path = name and shutil.which(name)
        if path:
            return path
    message = "the tests' library needs a C++ compiler (c++, g++ or clang++, or the one that CXX names)"
    raise CompilerMissingError(message)


def compile_library(
    directory: Path, sources: Path | None = None, name: str = "libsim.so", *, uses_torch: bool = True
) -> Path:
    """Returns the library of all `sources` (the device's by default) in `directory`, compiled where it is missing.

    Two processes may ask at once: one compiles and the other waits for it.
    """
    compiler, sources = find_compiler(), sources or SOURCES
    library = directory / _key(compiler, sources) / name
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(library.with_suffix(".lock"), timeout=600):
            if not library.exists():
                _compile(compiler, sources, library, uses_torch=uses_torch)
    return library


def _key(compiler: str, sources: Path) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version)
    for part in (torch.__version__, platform.machine(), *FLAGS):
        digest.update(part.encode())
    for source in sorted(sources.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, sources: Path, library: Path, *, uses_torch: bool) -> None:
    root = Path(torch.__file__).parent
    headers = [
        f"-I{root / 'include'}",
        f"-I{root / 'include/torch/csrc/api/include'}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    linked = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]

    def compile_one(source: Path) -> str:
        target = library.with_name(f"{source.stem}.o")
        _run([compiler, *FLAGS, *(headers if uses_torch else []), "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(PARALLEL_JOBS) as pool:
        objects = list(pool.map(compile_one, sorted(sources.glob("*.cpp"))))
    unfinished = library.with_suffix(".unfinished")
    _run([compiler, "-shared", *objects, *(linked if uses_torch else []), "-o", str(unfinished)])
    unfinished.replace(library)
    for object_file in objects:
        Path(object_file).unlink()


def _run(command: list[str]) -> None:
    # In English whatever the locale, and away from the test's own streams.
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")
