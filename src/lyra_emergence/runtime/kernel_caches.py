"""Keeping few of the kernels that oneDNN compiles for products below float32 on the CPU.

oneDNN compiles a kernel for every shape of a product and keeps 1,024 of them, 0.6 to 0.9 MiB each; torch keeps as many
beside it. A shape that comes once is kept like one that comes at every token. Attention that is written out asks for
two new ones at every token, as keys and values grow: GPT-OSS of four layers in bfloat16 grew by 1.2 MiB a token. A
mixture asks for one for every number of tokens that its experts get: 600 MiB after a prompt of 1,024 tokens through 64
experts. With few kept, those that a token needs anew stay, and the rest goes.
"""

from __future__ import annotations

import os

from lyra_emergence.framework import KERNELS_KEPT

__all__ = ["keep_few_kernels"]

_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's variable, and torch's for what it keeps of oneDNN's."""


def keep_few_kernels() -> None:
    """Set the caches' size for this process, unless its environment does already.

    Each cache reads its variable when it is first used: where a product below float32 ran before, nothing changes.
    """
    for variable in _CAPACITIES:
        os.environ.setdefault(variable, str(KERNELS_KEPT))
