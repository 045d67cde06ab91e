"""What a program with the shim in front of its allocator holds in its hands."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

NEVER = 2**62
"""No allocation is that large."""

_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "shim_arm": (None, [ctypes.c_int64, ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t]),
    "shim_disarm": (None, []),
    "shim_pause": (None, [ctypes.c_int]),
    "shim_cap": (None, [ctypes.c_int64]),
    "shim_spare": (ctypes.c_int, [ctypes.c_size_t, ctypes.c_size_t]),
    "shim_counted": (ctypes.c_int64, []),
    "shim_refusals": (ctypes.c_int64, []),
    "shim_live": (ctypes.c_int64, []),
}


@dataclass(frozen=True, slots=True)
class Refusing:
    """Which allocations count: those of at least so many bytes, by kind."""

    aligned: int = NEVER
    heap: int = NEVER
    mapped: int = NEVER


class RefusingAllocator:
    """The allocator of this process, which was started with the shim preloaded."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments

    def fail_at(self, nth: int, what: Refusing, *, persistent: bool = False) -> None:
        """Begins a count, and refuses the `nth` allocation from now (0 for none), or all from there on."""
        self._library.shim_arm(nth, persistent, what.aligned, what.heap, what.mapped)

    def cap(self, nbytes: int, what: Refusing) -> None:
        """Begins a count, and refuses what would take the heap more than `nbytes` beyond what is in use now."""
        self._library.shim_arm(0, 0, what.aligned, what.heap, what.mapped)
        self._library.shim_cap(nbytes)

    def disarm(self) -> None:
        """Every allocation is given again. The counts stay."""
        self._library.shim_disarm()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Neither counts nor refuses anything within this context."""
        self._library.shim_pause(1)
        try:
            yield
        finally:
            self._library.shim_pause(0)

    def spare(self, library: str) -> None:
        """Neither counts nor refuses what code of a loaded library asks for; `library` is a part of its file's name.

        Raises:
            ValueError: No such library is loaded, or too many are spared.
        """
        lines = Path("/proc/self/maps").read_text().splitlines()
        found = [line.split()[0] for line in lines if library in line.rpartition("/")[2] and " r-xp " in line]
        for begin, _, end in (addresses.partition("-") for addresses in found):
            if not self._library.shim_spare(int(begin, 16), int(end, 16)):
                raise ValueError("too many libraries are spared")
        if not found:
            raise ValueError(f"no library named '{library}' is loaded")

    @property
    def allocations(self) -> int:
        """Allocations asked for since the count began, refused ones included."""
        return int(self._library.shim_counted())

    @property
    def refusals(self) -> int:
        """Allocations refused since the count began."""
        return int(self._library.shim_refusals())

    @property
    def live(self) -> int:
        """Bytes of the heap that are in use."""
        return int(self._library.shim_live())
