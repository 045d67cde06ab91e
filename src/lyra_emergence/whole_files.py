"""Writing files whole or not at all.

A reader, a full disk, a `kill -9` or a power cut at any moment finds the old file or the new one, never a part. What a
process that died leaves behind is a hidden temporary file, which the next write of the same file takes away.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import stat
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["remove_abandoned", "replace_file"]

_ABANDONED = 3600.0
"""Seconds after which a temporary file belongs to nobody: writing one takes a few at most."""


def replace_file(target: Path, *parts: bytes | memoryview, mode: int | None = None) -> None:
    """Put `parts`, one behind the other, at `target` in one step, and make missing folders.

    The file has the permissions `mode`, never more at any moment; where that is None, those of the old one.

    Raises:
        OSError: It cannot be written; what stood there still does, and no temporary file is left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent, glob.escape(target.name))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    # Mode 0o666 lets the umask decide, as for any new file.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            temporary.chmod(stat.S_IMODE(target.stat().st_mode) if mode is None else mode)
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(target.parent)


def remove_abandoned(folder: Path, name: str = "*") -> None:
    """Remove what processes that died left in a folder, of files whose names match the pattern `name`."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f".{name}.????????????.tmp"):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut; a system that cannot sync a folder keeps its own guarantees."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
