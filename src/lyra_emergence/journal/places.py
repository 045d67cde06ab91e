"""Where Lyra keeps what belongs to a journal in the user's data folder: the own journal, indexes, locks."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lyra_emergence.errors import JournalError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PRIVATE", "data_folder", "exclusive", "index_path", "own_journal"]

PRIVATE: Final = 0o600
"""Permissions of journals, backups and indexes: their owner reads and writes, nobody else."""
_PRIVATE_FOLDER: Final = 0o700
_PATIENCE: Final = 30.0
"""Seconds to wait for another process that writes to the same journal: it takes a fraction of one."""


def data_folder() -> Path:
    """Return the user's data folder for Lyra; there need be none."""
    from platformdirs import user_data_path

    return Path(user_data_path("lyra-emergence"))


def own_journal() -> Path:
    """Return where the journal lies that is written to where none is named; there need be none."""
    return data_folder() / "journal.jsonl"


def index_path(journal: Path) -> Path:
    """Return where the index of the journal at `journal` lies."""
    return _beside(journal, "indexes", ".sqlite3")


def _beside(journal: Path, folder: str, suffix: str) -> Path:
    """Return a file of the data folder that belongs to a journal, named after it and the hash of its whole path."""
    whole = journal.absolute().resolve()
    digest = hashlib.sha256(str(whole).encode("utf-8", "surrogateescape")).hexdigest()
    return data_folder() / folder / f"{whole.stem[:40]}-{digest[:16]}{suffix}"


@contextmanager
def exclusive(journal: Path) -> Iterator[None]:
    """Keep other processes of Lyra from writing to the journal for the length of the block.

    The lock is the system's on an empty file and goes with the process, however that ends.

    Raises:
        JournalError: Another process holds it for half a minute, or the data folder cannot be written.
    """
    path = _beside(journal, "locks", ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=_PRIVATE_FOLDER)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE)
    except OSError as exc:
        raise JournalError(
            f"cannot write {path}: {exc.strerror or exc}", hint="check the folder's permissions"
        ) from exc
    try:
        _wait_for(descriptor, journal)
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, journal: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while not _try_lock(descriptor):
        if time.monotonic() > end:
            raise JournalError(
                f"another process has been writing to {journal} for {_PATIENCE:.0f} seconds", hint="try again later"
            )
        time.sleep(0.02)


def _try_lock(descriptor: int) -> bool:
    with suppress(OSError):
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
