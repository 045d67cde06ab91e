"""Configuration files: found in the documented order, read once until they change, written whole or not at all.

Covers reading and writing, not the meaning of keys beyond `check_values`. The cache notices every change that the
file system's clock or size shows, including one within the same tick as the last read.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from lyra_emergence.config.checks import check_values
from lyra_emergence.config.problems import Problems
from lyra_emergence.config.strict_json import parse_json_object
from lyra_emergence.errors import LyraError
from lyra_emergence.whole_files import replace_file

__all__ = ["CONFIG_LOCATIONS", "discover", "read_config_file", "write_config_file", "write_whole"]

CONFIG_LOCATIONS = ("config/model_config.json", "data/model_config.json", "model_config.json")
"""Where a configuration is looked for, in this order, below the directory that one starts from."""

_MOST_BYTES = 1_000_000
_MOST_CACHED = 64
_TICK_NS = 20_000_000
"""Twice the coarsest clock tick of a kernel that stamps files (100 Hz)."""
_COARSE_TICK_NS = 2_000_000_000
"""File systems that stamp whole seconds (FAT: every second one)."""


class _Signature(NamedTuple):
    """What changes when a file's content does; times in nanoseconds, size in bytes."""

    modified: int
    changed: int
    size: int
    inode: int
    device: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Signature:
        return cls(status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev)

    def settled(self, now: int) -> bool:
        """Return whether a change after `now` is sure to show: within one tick of the clock it may not."""
        latest = max(self.modified, self.changed)
        tick = _COARSE_TICK_NS if self.modified % 1_000_000_000 == 0 else _TICK_NS
        return now - latest > tick


_cache: dict[Path, tuple[_Signature, dict[str, Any]]] = {}
_cache_lock = threading.Lock()


def discover(directory: Path) -> Path | None:
    """Return the first of `CONFIG_LOCATIONS` that stands below `directory`, even if it cannot be read, or None."""
    return next((directory / location for location in CONFIG_LOCATIONS if _stands(directory / location)), None)


def _stands(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        # A file that may be there but cannot be reached is broken, not missing: reading it says why.
        return True
    return True


def read_config_file(path: Path, problems: Problems) -> dict[str, Any]:
    """Return the checked values of the file at `path`, read again only if it changed since the last time.

    Args:
        path: The file.
        problems: Receives a line for everything that is wrong, each naming the file.

    Returns:
        A copy that the caller may change.
    """
    key = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links, which may change their target
    found = Problems(str(path) if str(path).isprintable() else repr(str(path)))
    with _cache_lock:
        try:
            values = _read_through_cache(key, path, found)
        except (OSError, ValueError) as exc:  # a ValueError: a NUL in the path
            found.add(_reason(exc))
            values = {}
    problems.lines += found.lines
    return copy.deepcopy(values)


def _read_through_cache(key: Path, path: Path, problems: Problems) -> dict[str, Any]:
    status = path.stat()
    signature = _Signature.of(status)
    cached = _cache.get(key)
    if cached is not None and cached[0] == signature:
        return cached[1]
    _cache.pop(key, None)
    # Opening a pipe that nobody writes to would wait forever.
    if not stat.S_ISREG(status.st_mode):
        problems.add("is a folder, not a file" if stat.S_ISDIR(status.st_mode) else "is not a regular file")
        return {}
    started = time.time_ns()
    content, stable = _read_bytes(path)
    values = _parse(content, problems)
    if not problems.lines and stable is not None and stable.settled(started):
        if len(_cache) >= _MOST_CACHED:
            _cache.clear()
        _cache[key] = stable, values
    return values


def _read_bytes(path: Path) -> tuple[bytes, _Signature | None]:
    """Return the content and its signature; None as the signature if the file changed while it was read."""
    with path.open("rb") as file:
        before = _Signature.of(os.fstat(file.fileno()))
        content = file.read(_MOST_BYTES + 1)
        after = _Signature.of(os.fstat(file.fileno()))
    return content, before if before == after else None


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, ValueError):
        return "is not a path that a file can have"
    return f"cannot be read: {(error.strerror or str(error)).lower()}"


def _parse(content: bytes, problems: Problems) -> dict[str, Any]:
    if len(content) > _MOST_BYTES:
        problems.add("is larger than 1 MB, which no configuration is")
        return {}
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        problems.add("is UTF-16 text; save it as UTF-8")
        return {}
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        problems.add(f"is not UTF-8 text (byte 0x{content[exc.start]:02x} at offset {exc.start}); save it as UTF-8")
        return {}
    if not text.strip():
        problems.add("is empty; write {} for the defaults")
        return {}
    return check_values(parse_json_object(text, "", problems, path=problems.source), problems)


def write_config_file(path: Path, values: dict[str, Any]) -> None:
    """Write `values` to `path` as JSON, whole or not at all.

    The file's permissions are kept, a link is followed, missing folders are made, and the `$schema` that an editor
    put into the old file stays.

    Raises:
        LyraError: The file cannot be written; what stood there still does.
    """
    schema = _schema_reference(path)
    document = {"$schema": schema, **values} if schema else values
    write_whole(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _schema_reference(path: Path) -> str | None:
    """Return the old file's `$schema`; an old file that cannot be read is about to be replaced anyway."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= _MOST_BYTES:
            old = json.loads(path.read_text("utf-8-sig"))
            reference = old.get("$schema") if isinstance(old, dict) else None
            return reference if isinstance(reference, str) else None
    return None


def write_whole(path: Path, text: str) -> None:
    """Put `text` at `path` in one step, so that a reader or a crash sees the old file or the new one.

    Raises:
        LyraError: The file cannot be written; nothing was changed, and no temporary file is left.
    """
    target = Path(os.path.realpath(path))
    try:
        replace_file(target, text.encode())
    except OSError as exc:
        in_the_way = isinstance(exc, (FileExistsError, NotADirectoryError))
        reason = "a file stands where a folder belongs" if in_the_way else (exc.strerror or str(exc)).lower()
        raise LyraError(f"cannot write {path}: {reason}", hint="choose another path") from exc
