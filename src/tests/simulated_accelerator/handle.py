"""What a test holds in its hands: the memory of the simulated devices, and how to make it fail."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Iterator

DEFAULT_CAP = 8 * 2**30


class _Field(IntEnum):
    USED = 0
    PEAK = 1
    CAP = 2
    OCCUPIED = 3
    ALLOCATIONS = 4
    REFUSALS = 5
    INJECTED = 6


class SimulatedAccelerator:
    """The devices `sim:0`, `sim:1`, ... with their own memory each. All sizes are bytes, exactly as asked for."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    @property
    def devices(self) -> int:
        return int(self._library.sim_devices())

    def set_cap(self, nbytes: int, device: int = 0) -> None:
        """Sets a device's total memory. It may be less than what is in use: nothing more fits then."""
        self._library.sim_set_cap(self._checked(device), nbytes)

    def occupy(self, nbytes: int, device: int = 0) -> None:
        """Lets "another process" hold that much of a device; 0 ends it. It is neither free nor used."""
        self._library.sim_occupy(self._checked(device), nbytes)

    def fail_at(self, nth: int, *, persistent: bool = False, device: int | None = None) -> None:
        """Refuses the `nth` allocation from now (1 is the next), or all from there on; 0 takes the order back.

        Counted on one device, or over all of them together where `device` is None. Empty tensors allocate nothing.
        """
        if nth < 0:
            raise ValueError(f"the first allocation from now is number 1, not {nth}")
        self._library.sim_fail_at(-1 if device is None else self._checked(device), nth, persistent)

    def cap(self, device: int = 0) -> int:
        return self._read(device, _Field.CAP)

    def used(self, device: int = 0) -> int:
        return self._read(device, _Field.USED)

    def free(self, device: int = 0) -> int:
        return max(0, self.cap(device) - self.used(device) - self._read(device, _Field.OCCUPIED))

    def peak(self, device: int = 0) -> int:
        """The most that was in use since the last reset (or `torch.sim.reset_peak_memory_stats`)."""
        return self._read(device, _Field.PEAK)

    def allocations(self, device: int = 0) -> int:
        """Allocations asked for since the last reset, refused ones included: what `fail_at` counts."""
        return self._read(device, _Field.ALLOCATIONS)

    def refusals(self, device: int = 0) -> int:
        """Allocations that raised since the last reset, for whatever reason."""
        return self._read(device, _Field.REFUSALS)

    def injected(self, device: int = 0) -> int:
        """Allocations that raised since the last reset because `fail_at` said so; 0 ends a sweep."""
        return self._read(device, _Field.INJECTED)

    def pinned(self) -> int:
        """Bytes of page-locked host memory that live now."""
        return int(self._library.sim_pinned_bytes())

    def reset(self, cap: int = DEFAULT_CAP) -> None:
        """Every device: `cap` bytes, no failure armed, nothing occupied, counters at zero, peak = used."""
        for device in range(self.devices):
            self._library.sim_reset(device)
            self._library.sim_set_cap(device, cap)

    @contextmanager
    def lent(self) -> Iterator[SimulatedAccelerator]:
        """Switches the devices on for one test, and off again: other tests see a machine without them."""
        import torch

        self._library.sim_set_enabled(1)
        self.reset()
        try:
            yield self
        finally:
            self.reset()
            torch.accelerator.set_device_index(0)
            self._library.sim_set_enabled(0)

    def settled(self, expected: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Bytes in use on each device; garbage is collected first where that is more than `expected` (or zero)."""
        expected = expected or (0,) * self.devices
        if any(self.used(device) > nbytes for device, nbytes in enumerate(expected)):
            gc.collect()
        return tuple(self.used(device) for device in range(self.devices))

    def _read(self, device: int, field: _Field) -> int:
        return int(self._library.sim_read(self._checked(device), field))

    def _checked(self, device: int) -> int:
        if not 0 <= device < self.devices:
            raise ValueError(f"there is no simulated device {device}: there are {self.devices}")
        return device
