"""Files of the user's own in the data folder, readable by nobody else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

__all__ = ["FILE_MODE", "data_folder", "private_file", "write_new"]

FILE_MODE: Final = 0o600
_FOLDER_MODE: Final = 0o700
_APPLICATION: Final = "lyra-emergence"


def data_folder() -> Path:
    """Return the user's data folder for Lyra; there need be none yet."""
    from platformdirs import user_data_path

    return Path(user_data_path(_APPLICATION, appauthor=False))


def private_file(name: str) -> Path:
    """Return the file `name` of the data folder, made where it is missing, and closed to others where it was not.

    Raises:
        OSError: It cannot be made.
    """
    path = data_folder() / name
    path.parent.mkdir(parents=True, exist_ok=True, mode=_FOLDER_MODE)
    os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, FILE_MODE))
    path.chmod(FILE_MODE)
    return path


def write_new(path: Path, text: str) -> None:
    """Write `text` to a file that is not there yet, for its owner only; a failure leaves no part of it.

    Raises:
        FileExistsError: There is a file of that name.
        OSError: It cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
