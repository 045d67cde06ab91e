"""Kernels that oneDNN compiles for every shape do not pile up in main memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lyra_emergence.framework import KERNELS_KEPT
from lyra_emergence.runtime.kernel_caches import keep_few_kernels

_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_PRODUCTS = """
import sys
if "limited" in sys.argv:
    from lyra_emergence.runtime.kernel_caches import keep_few_kernels
    keep_few_kernels()
import torch
from lyra_emergence.framework import private_bytes
from lyra_emergence.runtime.memory import return_freed_memory
with torch.inference_mode():
    queries = torch.ones(4, 1, 64, dtype=torch.bfloat16)
    for tokens in range(100, 260):
        torch.bmm(queries, torch.ones(4, 64, tokens, dtype=torch.bfloat16))
        if tokens == 120:
            return_freed_memory()
            before = private_bytes()
    return_freed_memory()
    print(private_bytes() - before)
"""


def grown(*arguments: str) -> int:
    """Bytes that a process grows by as it multiplies with a matrix that gets longer by 140 columns."""
    environment = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    command = [sys.executable, "-c", _PRODUCTS, *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="private memory is measured on Linux only")
def test_products_of_many_shapes_leave_nothing_behind() -> None:
    assert grown("limited") < 8 * 2**20


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "500")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    keep_few_kernels()
    assert os.environ["LRU_CACHE_CAPACITY"] == "500"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == str(KERNELS_KEPT)
