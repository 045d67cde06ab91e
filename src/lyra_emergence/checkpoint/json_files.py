"""JSON files from strangers: bounded in size, and every way to be malformed is one `CheckpointError`."""

from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING, Any, BinaryIO

from lyra_emergence.errors import CheckpointError
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["DAMAGED", "open_regular", "parse_object", "read_fully", "read_object", "shown"]

DAMAGED = "the file is damaged or incomplete; download or copy it again"
"""The remedy for a file that breaks its own format."""

_LONGEST_SHOWN = 120


def shown(text: object) -> str:
    """Return `text` quoted for an error message, cut to a length that a terminal bears."""
    quoted = ascii(text)
    return quoted if len(quoted) <= _LONGEST_SHOWN else f"{quoted[:_LONGEST_SHOWN]}..."


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """Open `path` for reading and return it with its size in bytes.

    Raises:
        CheckpointError: It is missing, unreadable, or no regular file. Opening a pipe would wait for ever.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise CheckpointError(f"{path} is {kind}, not a file that can be read")
        return path.open("rb", buffering=0), status.st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", hint="download or copy the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def read_fully(stream: BinaryIO, count: int, path: Path) -> bytes:
    """Return the next `count` bytes of a file, or what it has left where that is less.

    One call may give fewer although more follow: network file systems do so, and Linux never gives more than 2 GiB.

    Raises:
        CheckpointError: The disk fails.
    """
    parts: list[bytes] = []
    try:
        while count > 0 and (part := stream.read(count)):
            parts.append(part)
            count -= len(part)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return b"".join(parts)


def read_object(path: Path, *, limit: int, strict: bool) -> dict[str, Any]:
    """Return the JSON object in the file `path`.

    Args:
        path: The file.
        limit: The most bytes that are read; a longer file is refused before anything is allocated for it.
        strict: Refuse duplicate keys, NaN and Infinity. transformers itself writes Infinity into some config.json.

    Raises:
        CheckpointError: The file is missing, unreadable, longer than `limit`, or holds no JSON object.
    """
    stream, size = open_regular(path)
    with stream:
        if size > limit:
            raise CheckpointError(
                f"{path} has {format_bytes(size)}; such a file has at most {format_bytes(limit)}", hint=DAMAGED
            )
        raw = read_fully(stream, size, path)
    return parse_object(raw, str(path), strict=strict)


def parse_object(raw: bytes, where: str, *, strict: bool) -> dict[str, Any]:
    """Return the JSON object in `raw`; `where` begins the message of each error.

    Raises:
        CheckpointError: `raw` is not UTF-8, not JSON, not an object, or (when strict) has a key twice.
    """
    try:
        text = raw.decode("utf-8")
        if strict:
            value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
        else:
            value = json.loads(text)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 at byte {error.start}", hint=DAMAGED) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{where}: not JSON: {error.msg} at line {error.lineno} column {error.colno}", hint=DAMAGED
        ) from None
    except ValueError as error:
        # A refused constant, a key twice, or a number of more digits than Python converts.
        raise CheckpointError(f"{where}: not JSON: {error}", hint=DAMAGED) from None
    except RecursionError:
        raise CheckpointError(f"{where}: not JSON: nested too deeply", hint=DAMAGED) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON object was expected, not {_kind(value)}", hint=DAMAGED)
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} stands twice")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names[type(value)]
