"""Bytes in use and bytes free on devices, and giving back what the frameworks hold on to."""

from __future__ import annotations

import gc
from typing import Any

import torch

from lyra_emergence.machine import probe_machine

__all__ = ["allocated_bytes", "free_bytes", "give_back"]


def allocated_bytes(device: str) -> int:
    """Return the bytes that this process's tensors take on an accelerator."""
    kind, _, ordinal = device.partition(":")
    module: Any = torch.get_device_module(kind)
    return int(module.memory_allocated(int(ordinal)) if ordinal else module.current_allocated_memory())


def free_bytes(device: str) -> int:
    """Return the bytes that can be allocated on a device now; 0 for a device that is not there."""
    found = probe_machine(with_torch=True).find(device)
    return found.free_bytes if found is not None else 0


def give_back() -> None:
    """Collect garbage, and return the accelerators' cached blocks to their drivers."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
