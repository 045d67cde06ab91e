"""Where a checkpoint's files are read from: a folder here, or whatever else has the same few methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from lyra_emergence.checkpoint.json_files import read_object
from lyra_emergence.checkpoint.safetensors_header import TensorInfo, read_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

__all__ = ["CheckpointFiles", "FolderFiles"]


class CheckpointFiles(Protocol):
    """The files of one checkpoint."""

    def names(self) -> list[str]:
        """Return the files' names, sorted."""

    def exists(self, name: str) -> bool:
        """Return whether there is a file of that name."""

    def where(self, name: str = "") -> str:
        """Return what error messages call the checkpoint, or one of its files."""

    def read_object(self, name: str, *, limit: int, strict: bool) -> dict[str, Any]:
        """Return the JSON object in a file, as `json_files.read_object` does."""

    def read_headers(self, names: Iterable[str]) -> Mapping[str, tuple[TensorInfo, ...]]:
        """Return the tensors of each of the safetensors files `names`, in their order."""


class FolderFiles:
    """The files of a folder.

    Args:
        directory: The folder.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def names(self) -> list[str]:
        """Return the files' names, sorted."""
        return sorted(path.name for path in self._directory.iterdir())

    def exists(self, name: str) -> bool:
        """Return whether there is a file of that name, which may lie in a folder below."""
        return (self._directory / name).exists()

    def where(self, name: str = "") -> str:
        """Return the folder's path, or that of a file in it."""
        return str(self._directory / name) if name else str(self._directory)

    def read_object(self, name: str, *, limit: int, strict: bool) -> dict[str, Any]:
        """Return the JSON object in a file."""
        return read_object(self._directory / name, limit=limit, strict=strict)

    def read_headers(self, names: Iterable[str]) -> Mapping[str, tuple[TensorInfo, ...]]:
        """Return the tensors of each of the safetensors files `names`."""
        return {name: read_header(self._directory, name) for name in names}
