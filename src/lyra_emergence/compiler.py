"""The C++ compiler that builds the kernels of the CPU, if there is one."""

from __future__ import annotations

import os
import shutil

__all__ = ["find_compiler"]


def find_compiler() -> str | None:
    """Return the path of the compiler that `CXX` names, else of `c++`, `g++` or `clang++`; None where there is none."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)
