"""What torch finds as `torch.sim`: the functions that device-neutral code asks of a device's module.

Registered with `torch._register_device_module`; `torch.get_device_module("sim")` returns it. Memory figures are bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch.accelerator import (
    current_device_index as current_device,
)
from torch.accelerator import (
    device_index as device,
)
from torch.accelerator import (
    empty_cache,
    max_memory_allocated,
    max_memory_reserved,
    memory_allocated,
    memory_reserved,
    memory_stats,
    reset_accumulated_memory_stats,
    reset_peak_memory_stats,
    synchronize,
)
from torch.accelerator import (
    get_memory_info as mem_get_info,
)
from torch.accelerator import (
    set_device_index as set_device,
)

if TYPE_CHECKING:
    import ctypes

__all__ = [
    "Event",
    "Stream",
    "current_device",
    "current_stream",
    "default_stream",
    "device",
    "device_count",
    "empty_cache",
    "get_amp_supported_dtype",
    "get_device_name",
    "get_device_properties",
    "get_rng_state",
    "initial_seed",
    "is_available",
    "is_bf16_supported",
    "is_initialized",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "reset_accumulated_memory_stats",
    "reset_peak_memory_stats",
    "set_device",
    "set_rng_state",
    "set_stream",
    "stream",
    "synchronize",
]

# Set when the backend is registered, before torch can call anything in here.
_library: ctypes.CDLL = None  # type: ignore[assignment]


class DeviceProperties(NamedTuple):
    name: str
    total_memory: int
    major: int = 0
    minor: int = 0
    multi_processor_count: int = 1


class Stream(torch.Stream):
    """A stream of a simulated device. Work runs at once, so a stream is only a number."""

    def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Self:
        if kwargs:
            return super().__new__(cls, priority=priority, **kwargs)
        return super().__new__(cls, torch.device("sim", _index(device)), priority=priority)


def Event(device: Any = None, *, enable_timing: bool = False) -> torch.Event:  # noqa: N802 (torch.cuda.Event)
    """An event of a simulated device: it has happened as soon as it is recorded.

    Not a class: `Stream.wait_event` takes torch's own class and no other.
    """
    return torch.Event(torch.device("sim", _index(device)), enable_timing=enable_timing)


def is_available() -> bool:
    return bool(_library.sim_enabled())


def is_initialized() -> bool:
    return is_available()


def device_count() -> int:
    return int(_library.sim_devices()) if is_available() else 0


def get_device_properties(device: Any = None) -> DeviceProperties:
    return DeviceProperties(get_device_name(device), total_memory=mem_get_info(_index(device))[1])


def get_device_name(device: Any = None) -> str:
    return f"Simulated accelerator {_index(device)}"


def is_bf16_supported() -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


def manual_seed_all(seed: int) -> None:
    for index in range(_library.sim_devices()):
        _library.sim_seed(index, seed % 2**64)


def manual_seed(seed: int) -> None:
    _library.sim_seed(current_device(), seed % 2**64)


def initial_seed() -> int:
    return _default_generator(None).initial_seed()


def get_rng_state(device: Any = "sim") -> torch.Tensor:
    return _default_generator(device).get_state()


def set_rng_state(new_state: torch.Tensor, device: Any = "sim") -> None:
    _default_generator(device).set_state(new_state)


def current_stream(device: Any = None) -> torch.Stream:
    return torch.accelerator.current_stream(_index(device))


def default_stream(device: Any = None) -> torch.Stream:
    index = _index(device)
    return torch.Stream(stream_id=0, device_index=index, device_type=torch.Stream(f"sim:{index}").device_type)


def set_stream(stream: torch.Stream) -> None:
    torch.accelerator.set_stream(stream)


def stream(stream: torch.Stream) -> torch.Stream:
    """For `with torch.sim.stream(s):`; a torch stream is its own context manager."""
    return stream


def _is_in_bad_fork() -> bool:
    return False


def _default_generator(device: Any) -> torch.Generator:
    return torch._C._accelerator_getDefaultGenerator(_index(device))


def _index(device: Any) -> int:
    if isinstance(device, int):
        return device
    index = torch.device(device).index if device is not None else None
    return current_device() if index is None else index
