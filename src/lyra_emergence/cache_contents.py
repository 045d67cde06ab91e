"""What the cache folder holds, and removing it: everything there is made anew where it is gone."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lyra_emergence.cache_files import cache_path
from lyra_emergence.packed_room import folder_bytes, kept_folders, remove_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Cached", "Kind", "cached", "remove"]

Kind = Literal["packed", "kernels", "measured"]
_MEASURED = {
    "framework.json": "what Python and torch take",
    "rates.json": "how fast this machine is",
    "kernels.json": "which kernels are faster",
    "trials.json": "caches and temporaries by model",
}


@dataclass(frozen=True, slots=True)
class Cached:
    """One thing in the cache folder.

    Attributes:
        kind: "packed" (weights of a checkpoint), "kernels" (compiled for this CPU) or "measured" (figures).
        name: The checkpoint; of other kinds the file or folder.
        about: What it is, in words: of packed weights "8 bits" or "4 bits".
        path: Where it lies.
        nbytes: Bytes on disk.
        used: When it was last used or, of other kinds than packed weights, written; in seconds since the epoch.
        source: The folder of the checkpoint; "" of other kinds, and where that is not known.
    """

    kind: Kind
    name: str
    about: str
    path: Path
    nbytes: int
    used: float
    source: str = ""

    @property
    def age(self) -> float:
        """Seconds since it was last used."""
        return max(0.0, time.time() - self.used)


def cached() -> tuple[Cached, ...]:
    """Return what there is, packed weights first, the last used first among them."""
    return (*_packed(), *_kernels(), *_measured())


def remove(found: Cached) -> bool:
    """Remove one thing, and return whether it is gone.

    Weights that a running program has mapped stay usable to it; on Windows, where they cannot be removed, they stay.
    """
    if found.kind == "packed":
        return remove_folder(found.path)
    # The folder of the kernels may be a link to where a user wants them.
    files = [found.path] if found.kind == "measured" else list(found.path.glob("*.so"))
    for file in files:
        with suppress(OSError):
            file.unlink()
    return not any(file.exists() for file in files)


def _packed() -> Iterator[Cached]:
    for kept in reversed(kept_folders()):
        if kept.about is None:
            yield Cached("packed", kept.path.name, "not readable", kept.path, kept.nbytes, kept.used)
            continue
        bits = f"{kept.about.quantization.removesuffix('bit')} bits"
        source = kept.about.directory
        yield Cached("packed", kept.about.model, bits, kept.path, kept.nbytes, kept.used, source)


def _kernels() -> Iterator[Cached]:
    folder = cache_path("kernels")
    with suppress(OSError):
        if nbytes := folder_bytes(folder):
            yield Cached("kernels", "kernels", "compiled for this CPU", folder, nbytes, folder.stat().st_mtime)


def _measured() -> Iterator[Cached]:
    for name, about in _MEASURED.items():
        path = cache_path(name)
        with suppress(OSError):
            status = path.stat()
            yield Cached("measured", name, about, path, status.st_size, status.st_mtime)
