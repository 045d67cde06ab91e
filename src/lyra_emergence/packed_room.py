"""Room for packed weights on disk: what is kept there, and what goes first where the limit or the disk is reached.

A folder that is in use may be removed: on POSIX its maps live on without their names; on Windows it stays.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lyra_emergence.packed_files import ABOUT, About, packed_folder, read_about
from lyra_emergence.units import format_bytes
from lyra_emergence.whole_files import remove_abandoned

if TYPE_CHECKING:
    from pathlib import Path

    from lyra_emergence.packed_files import PackedFiles

__all__ = ["KeptFolder", "folder_bytes", "kept_folders", "make_room", "remove_folder"]

_FREE_SHARE, _MOST_FREE = 0.1, 10**10
"""Of a disk, what is left free: this share, and no more than these bytes."""


@dataclass(frozen=True, slots=True)
class KeptFolder:
    """The packed weights of one checkpoint.

    Attributes:
        path: Their folder.
        about: What they are packed from; None where the folder does not say so.
        nbytes: Bytes of its files.
        used: When they were last used, in seconds since the epoch.
    """

    path: Path
    about: About | None
    nbytes: int
    used: float


def kept_folders() -> tuple[KeptFolder, ...]:
    """Return what is kept, that which was used longest ago first."""
    found = []
    with suppress(OSError):
        for path in packed_folder().iterdir():
            with suppress(OSError):
                found.append(KeptFolder(path, read_about(path), folder_bytes(path), _used(path)))
    return tuple(sorted(found, key=lambda kept: kept.used))


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the files in a folder; 0 where there is none."""
    total = 0
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(OSError):
                total += path.stat().st_size
    return total


def _used(folder: Path) -> float:
    with suppress(OSError):
        return (folder / ABOUT).stat().st_mtime
    return folder.stat().st_mtime


def remove_folder(folder: Path) -> bool:
    """Remove a folder, and return whether it is gone; what is open on Windows stays."""
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def make_room(files: PackedFiles, size: int, most: int) -> str:
    """Remove what was used longest ago until the packed weights of a checkpoint may take `size` bytes.

    Weights that were packed from the same folder before its checkpoint was exchanged go in any case, and what processes
    that died left behind.

    Args:
        files: The checkpoint's packed weights, which stay.
        size: Bytes that they take in all, with those that are there.
        most: Bytes that all packed weights may take.

    Returns:
        Why there is no room; "" where there is.
    """
    others = [kept for kept in kept_folders() if kept.path != files.folder]
    for folder in (files.folder, *(kept.path for kept in others)):
        remove_abandoned(folder)
    gone = {kept.path for kept in others if _is_outdated(kept.about, files.about) and remove_folder(kept.path)}
    others = [kept for kept in others if kept.path not in gone]
    if size > most:
        return f"they take {format_bytes(size)}, and 'packed_cache' allows {format_bytes(most)}"
    missing = size - folder_bytes(files.folder) - _spare()
    if missing > sum(kept.nbytes for kept in others):
        return f"the disk has too little space: {format_bytes(missing)} short of leaving some of it free"
    excess = max(missing, size + sum(kept.nbytes for kept in others) - most)
    for kept in others:
        if excess <= 0:
            break
        excess -= kept.nbytes if remove_folder(kept.path) else 0
    return "" if excess <= 0 else "older ones are in use"


def _is_outdated(kept: About | None, now: About) -> bool:
    if kept is None or kept.weights == now.weights:
        return False
    return (kept.directory, kept.quantization) == (now.directory, now.quantization)


def _spare() -> int:
    """Return the bytes that may be written before the disk is as full as it may be."""
    folder = packed_folder()
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    return disk.free - int(min(_FREE_SHARE * disk.total, _MOST_FREE))
