"""Small files in the user's cache folder: what was measured once, and is measured again where they are gone."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from lyra_emergence.whole_files import replace_file

__all__ = ["cache_path", "replace_whole"]


def cache_path(name: str) -> Path:
    """Return where the file called `name` lies in the user's cache folder; there need be none."""
    from platformdirs import user_cache_path

    return Path(user_cache_path("lyra-emergence")) / name


def replace_whole(path: Path, text: str) -> None:
    """Put `text` at `path` in one step, so that no reader sees a part.

    A folder that cannot be written to costs the next measurement and is no error.
    """
    with suppress(OSError):
        replace_file(path, text.encode())
