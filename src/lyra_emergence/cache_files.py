"""Small files in the user's cache folder: what was measured once, and is measured again where they are gone."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["cache_path", "replace_whole"]


def cache_path(name: str) -> Path:
    """Return where the file called `name` lies in the user's cache folder; there need be none."""
    from platformdirs import user_cache_path

    return Path(user_cache_path("lyra-emergence")) / name


def replace_whole(path: Path, text: str) -> None:
    """Write a file under another name and put it in the old one's place, so that no reader sees a part.

    A folder that cannot be written to costs the next measurement and is no error.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
