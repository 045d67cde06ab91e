"""Main memory, as the kernel and the control groups (v1 and v2) around this process leave it.

A process that takes more than they allow is killed, with no error to recover from. So the bytes are asked for in two
senses: what a plan may count on, and what can be taken at all before the kernel kills.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["KEPT_FREE", "LowMainMemoryError", "control_group_memory", "main_memory", "require", "takeable_bytes"]

KEPT_FREE = 32 * 2**20
"""Bytes that are left alone: what Python, its libraries and the kernel's tables may take in between."""
_UNLIMITED = 1 << 60


class LowMainMemoryError(MemoryError):
    """Work was stopped before the kernel would have killed the process for it."""


def require(nbytes: int, what: str) -> None:
    """Check that `nbytes` more can be taken for `what` without being killed for it.

    Raises:
        LowMainMemoryError: They cannot.
    """
    left = takeable_bytes() - KEPT_FREE
    if nbytes > left:
        raise LowMainMemoryError(
            f"{what} wants {format_bytes(nbytes)} of main memory, and {format_bytes(max(0, left))} is left"
        )


def takeable_bytes(root: Path = Path("/")) -> int:
    """Return the bytes that this process can take before the kernel would kill for memory.

    Unlike what a plan counts on, pages of files count as free whether they were touched lately or not, and swap does:
    the kernel drops and swaps before it kills.
    """
    available = main_memory(root)[1] + _swap_left(root)
    return min(available, _below_limits(root, ("inactive_file", "active_file"))[1])


def _swap_left(root: Path) -> int:
    line = next((line for line in _lines(root / "proc/meminfo") if line.startswith("SwapFree:")), "SwapFree: 0")
    return int(line.split()[1]) * 1024


def main_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Return the bytes of main memory and those available, as the kernel says; psutil asks other systems.

    Linux is asked directly: importing psutil takes a tenth of the time that a plan may take.
    """
    held = dict(line.split(":", 1) for line in _lines(root / "proc/meminfo") if ":" in line)
    try:
        total, available = (int(held[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (KeyError, ValueError, IndexError):
        import psutil

        memory = psutil.virtual_memory()
        return int(memory.total), int(memory.available)
    return total, available


def control_group_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Return (limit, bytes free below it) of the tightest control group around this process.

    Reclaimable page cache that nobody touched lately (`inactive_file`) counts as free, as kubelet counts it. Both
    numbers are huge where no limit is set.
    """
    return _below_limits(root, ("inactive_file",))


def _below_limits(root: Path, droppable: tuple[str, ...]) -> tuple[int, int]:
    """As `control_group_memory`; of what is used, the kinds of pages named count as free."""
    limit, free = _UNLIMITED, _UNLIMITED
    for group in _control_groups(root):
        dropped = sum(int(group.pages.get(f"{group.prefix}{kind}", "0")) for kind in droppable)
        limit = min(limit, group.limit)
        free = min(free, max(0, group.limit - group.used + min(group.used, dropped)))
    return limit, free


@dataclass(frozen=True, slots=True)
class _Group:
    """A control group with a limit: bytes allowed and used, and its pages by kind, named with a prefix."""

    limit: int
    used: int
    pages: Mapping[str, str]
    prefix: str


def _control_groups(root: Path) -> Iterator[_Group]:
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _group_and_parents(root / "sys/fs/cgroup", path, ("memory.max", "memory.current"), "")
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            yield from _group_and_parents(root / "sys/fs/cgroup/memory", path, files, "total_")


def _group_and_parents(base: Path, path: str, files: tuple[str, str], prefix: str) -> Iterator[_Group]:
    # A limit anywhere on the way up binds. In a container the named path may not exist below the mount: its root does.
    parts = [part for part in path.split("/") if part and part != ".."]
    for depth in range(len(parts), -1, -1):
        folder = base.joinpath(*parts[:depth])
        limit, used = (_number(folder / file) for file in files)
        if limit is None or used is None or limit >= _UNLIMITED:
            continue
        pages = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
        yield _Group(limit, used, pages, prefix)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdecimal() else None
