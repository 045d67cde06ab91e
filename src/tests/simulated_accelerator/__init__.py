"""A second device for tests: a torch backend named `sim` with its own, capped memory and failures on demand.

It is a real torch device (PrivateUse1) whose memory lies on the host and whose kernels are the CPU's: real models
run on it, to the very same tokens. Mocks of torch are no evidence; this is the nearest thing to a GPU without one.

What it covers: two devices with their current-device rules; byte-exact accounting without caching or rounding; a cap
per device and `torch.OutOfMemoryError` beyond it; refusing the N-th allocation, once or from there on; errors for
tensors of different devices in one operator, as on CUDA; device addresses that the host cannot dereference; fresh
memory filled with not-a-number; generators, streams, events and pinned memory; `torch.accelerator` and `torch.sim`.

What it does not cover: work runs at once in the calling thread, so a missing synchronization never shows; what a
kernel needs for itself is CPU memory and not counted; no fragmentation, no caching allocator, no graphs, no
`torch.compile`, no sparse or quantized tensors; no gradients through attention, which runs fused.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

from .compilation import BuildError, CompilerMissingError, compile_library
from .handle import DEFAULT_CAP, SimulatedAccelerator

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DEFAULT_CAP", "BuildError", "CompilerMissingError", "SimulatedAccelerator", "cache_directory", "load"]

_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "sim_read": (ctypes.c_int64, [ctypes.c_int, ctypes.c_int]),
    "sim_pinned_bytes": (ctypes.c_int64, []),
    "sim_set_cap": (None, [ctypes.c_int, ctypes.c_int64]),
    "sim_occupy": (None, [ctypes.c_int, ctypes.c_int64]),
    "sim_fail_at": (None, [ctypes.c_int, ctypes.c_int64, ctypes.c_int]),
    "sim_reset": (None, [ctypes.c_int]),
    "sim_set_enabled": (None, [ctypes.c_int]),
    "sim_enabled": (ctypes.c_int, []),
    "sim_devices": (ctypes.c_int, []),
    "sim_max_devices": (ctypes.c_int, []),
    "sim_set_devices": (None, [ctypes.c_int]),
    "sim_register_hooks": (None, []),
    "sim_seed": (None, [ctypes.c_int, ctypes.c_uint64]),
}


def load(directory: Path | None = None, *, devices: int = 2) -> SimulatedAccelerator:
    """Builds the backend where needed (about ten seconds, once) and registers it with torch, switched off.

    Torch keeps a backend for the rest of the process, so the number of devices is fixed by the first call.
    `directory` holds the builds; the user's cache folder without one.

    Raises:
        CompilerMissingError: there is no C++ compiler.
        BuildError: the sources do not compile.
        ValueError: another number of devices than the first call asked for, or more than there can be.
    """
    accelerator = _register(directory, devices)
    if accelerator.devices != devices:
        raise ValueError(f"the backend is registered with {accelerator.devices} devices, not {devices}")
    return accelerator


def _once(function: Callable[[Path | None, int], SimulatedAccelerator]) -> Callable[..., SimulatedAccelerator]:
    loaded: list[SimulatedAccelerator] = []

    def call(directory: Path | None, devices: int) -> SimulatedAccelerator:
        if not loaded:
            loaded.append(function(directory, devices))
        return loaded[0]

    return call


@_once
def _register(directory: Path | None, devices: int) -> SimulatedAccelerator:
    import torch

    from . import device_module

    library = _open(compile_library(directory or cache_directory()))
    if not 1 <= devices <= library.sim_max_devices():
        raise ValueError(f"there can be 1 to {library.sim_max_devices()} simulated devices, not {devices}")
    library.sim_set_devices(devices)
    device_module._library = library
    torch.utils.rename_privateuse1_backend("sim")
    library.sim_register_hooks()
    torch._register_device_module("sim", device_module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return SimulatedAccelerator(library)


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def cache_directory() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("lyra-emergence")) / "simulated_accelerator"
