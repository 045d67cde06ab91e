"""Reading a journal: a JSON file, JSON lines, a Markdown file, or a folder of all these.

A JSON file is a list of entries, or an object with the list under "entries". A file of JSON lines (.jsonl, .ndjson)
has an entry a line. A Markdown file (.md, .markdown) is one entry. A folder is read with the folders in it; what is
hidden or of another kind is passed over. What an entry says is `fields`' matter; both its forms may stand side by side.

What is wrong with an entry is a line in `Journal.problems` and hides no other entry; in a folder that holds for a
file as well.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lyra_emergence.errors import JournalError
from lyra_emergence.journal.entries import MAX_ENTRIES, MAX_FILE_BYTES, Journal, JournalEntry
from lyra_emergence.journal.fields import JSON_NAMES, InvalidEntryError, check_entry
from lyra_emergence.journal.markdown import FrontMatterError, read_markdown

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["JSON_LINES", "MARKDOWN", "journal_files", "list_span", "read_journal", "read_text"]

JSON_LINES: Final = frozenset({".jsonl", ".ndjson"})
MARKDOWN: Final = frozenset({".md", ".markdown"})
_READ: Final = JSON_LINES | MARKDOWN | {".json"}
_MAX_LISTED_PROBLEMS = 8
_FORM: Final = "data/journal/sample.json shows the form"


@dataclass(frozen=True, slots=True)
class _Raw:
    """An item of a file as it was read.

    Attributes:
        path: The file.
        place: Where in it, such as "entry 3"; "" for a file that is one entry.
        data: What stands there.
        problem: Why `data` could not be read, or "".
    """

    path: Path
    place: str
    data: Any
    problem: str = ""

    def where(self, entry_id: str = "") -> str:
        """Return file, place and id, as problems begin."""
        place = f": {self.place}" if self.place else ""
        return f"{self.path}{place}" + (f" (id {entry_id!r})" if entry_id and self.place else "")

    def named_from(self, path: Path) -> str:
        """Return how an entry of the file `path` refers to this one."""
        return self.place if self.path == path and self.place else self.where()


def read_journal(path: Path) -> Journal:
    """Read the journal at `path`.

    An id that is used again: the same entry once more is left out; another entry gets the id "<id> (2)", so that
    nothing written is lost. Both are problems.

    Raises:
        JournalError: The file or folder is missing, unreadable or too large, holds no journal, or has entries of which
            none is valid.
    """
    found: dict[str, tuple[_Raw, JournalEntry]] = {}
    problems: list[str] = []
    count = 0
    for count, raw in enumerate(_items(path), start=1):  # noqa: B007  # counted for the error below
        try:
            entry = _checked(raw)
        except InvalidEntryError as invalid:
            problems += [f"{raw.where(invalid.entry_id)}: {problem}" for problem in invalid.problems]
            continue
        problem = _add(found, entry, raw)
        if problem:
            problems.append(f"{raw.where(entry.id)}: id: {problem}")
    if count and not found:
        raise JournalError(_nothing_valid(path, count, problems), hint="correct the entries named above")
    entries = sorted((entry for _, entry in found.values()), key=lambda entry: entry.moment)
    return Journal(path, tuple(entries), tuple(problems))


def _checked(raw: _Raw) -> JournalEntry:
    if raw.problem:
        raise InvalidEntryError([raw.problem])
    try:
        return check_entry(raw.data)
    except InvalidEntryError as invalid:
        if raw.path.suffix.lower() in MARKDOWN:  # where the field is called so
            invalid.problems = [f"date:{line[10:]}" if line[:10] == "timestamp:" else line for line in invalid.problems]
        raise


def _add(found: dict[str, tuple[_Raw, JournalEntry]], entry: JournalEntry, raw: _Raw) -> str | None:
    """Put `entry` under its id or, that being taken, a new one; return the problem if there is one."""
    if entry.id not in found:
        found[entry.id] = raw, entry
        return None
    first, other = found[entry.id]
    if entry == other:
        return f"the same entry as {first.named_from(raw.path)}; left out"
    copy = 2
    while f"{entry.id} ({copy})" in found:
        copy += 1
    renamed = replace(entry, id=f"{entry.id} ({copy})")
    found[renamed.id] = raw, renamed
    return f"already the id of {first.named_from(raw.path)}; kept as {renamed.id!r}"


def _nothing_valid(path: Path, count: int, problems: list[str]) -> str:
    listed = problems[:_MAX_LISTED_PROBLEMS]
    if len(problems) > len(listed):
        listed.append(f"and {len(problems) - len(listed)} more")
    head = f"{path}: its only entry is not valid" if count == 1 else f"{path}: none of its {count} entries is valid"
    return "\n".join((head, *(f"  {problem}" for problem in listed)))


def _items(path: Path) -> Iterator[_Raw]:
    if not path.is_dir():
        yield from _bounded(_file_items(path, path.stem), path)
        return
    files = journal_files(path)
    if not files:
        raise JournalError(
            f"{path} is a folder without a journal file", hint="journal files end in .json, .jsonl or .md"
        )
    yield from _bounded((raw for file in files for raw in _folder_items(path, file)), path)


def _bounded(items: Iterator[_Raw], path: Path) -> Iterator[_Raw]:
    for number, raw in enumerate(items, start=1):
        if number > MAX_ENTRIES:
            raise JournalError(f"{path} holds more than {MAX_ENTRIES} entries", hint="split it into several journals")
        yield raw


def _folder_items(folder: Path, file: Path) -> Iterator[_Raw]:
    try:
        yield from _file_items(file, file.relative_to(folder).with_suffix("").as_posix())
    except JournalError as error:
        text = str(error)
        yield _Raw(file, "", None, text.removeprefix(str(file)).lstrip(": ") or text)


def journal_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a folder and of those in it that a journal can be made of, in order of their names."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(parent, name) for name in names if not name.startswith(".") and Path(name).suffix.lower() in _READ
        ]
    return tuple(sorted(found))


def _file_items(path: Path, name: str) -> Iterator[_Raw]:
    text = read_text(path)
    suffix = path.suffix.lower()
    if suffix in JSON_LINES:
        yield from _lines(path, text)
    elif suffix in MARKDOWN:
        yield _markdown(path, text, name)
    else:
        for number, data in enumerate(_listed(_parse(path, text), path), start=1):
            yield _Raw(path, f"entry {number}", data)


def _lines(path: Path, text: str) -> Iterator[_Raw]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield _Raw(path, f"line {number}", json.loads(line))
        except (ValueError, RecursionError) as exc:
            reason = exc.msg if isinstance(exc, json.JSONDecodeError) else "it is nested too deep or not usable"
            yield _Raw(path, f"line {number}", None, f"not JSON: {reason}")


def _markdown(path: Path, text: str, name: str) -> _Raw:
    try:
        return _Raw(path, "", read_markdown(text, name))
    except FrontMatterError as exc:
        return _Raw(path, "", None, str(exc))


def read_text(path: Path) -> str:
    """Return the text of a journal file, without a byte order mark.

    Raises:
        JournalError: It is missing, unreadable, too large or not UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise JournalError(
                f"{path} has {size} bytes; a journal may have {MAX_FILE_BYTES}", hint="split it into several files"
            )
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES)
    except FileNotFoundError as exc:
        raise JournalError(f"there is no journal at {path}", hint=f"check --journal; {_FORM}") from exc
    except OSError as exc:
        raise JournalError(f"cannot read {path}: {exc.strerror or exc}", hint="check its permissions") from exc
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise JournalError(f"{path} is not UTF-8 text (byte {exc.start})", hint="save it as UTF-8") from exc


def _parse(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as exc:
        raise JournalError(
            f"{path}:{exc.lineno}:{exc.colno}: not JSON: {exc.msg}", hint="a comma, quote or bracket is wrong there"
        ) from exc
    except RecursionError as exc:
        raise JournalError(f"{path}: its lists or objects are nested too deep") from exc
    except ValueError as exc:  # an integer of more digits than Python converts
        raise JournalError(f"{path}: not usable JSON: {exc}") from exc


def _listed(data: Any, path: Path) -> list[Any]:
    items = data.get("entries") if isinstance(data, dict) else data
    if not isinstance(items, list):
        kind = 'an object without a list "entries"' if isinstance(data, dict) else f"a {JSON_NAMES[type(data)]}"
        raise JournalError(f"{path} holds {kind}, not a list of entries", hint=_FORM)
    return items


def list_span(path: Path, text: str) -> tuple[int, int]:
    """Return where the list of entries begins and ends in the text of a JSON journal: the offsets of "[" and "]".

    Raises:
        JournalError: It is not JSON, or holds no list of entries.
    """
    _listed(_parse(path, text), path)
    start = len(text) - len(text.lstrip(_SPACE))
    if text[start] == "[":
        return start, len(text.rstrip(_SPACE)) - 1
    return _value_span(text, start + 1)


_SPACE = " \t\n\r"


def _value_span(text: str, position: int) -> tuple[int, int]:
    """Return the span of the last value called "entries" in an object whose keys begin at `position`."""
    decoder = json.JSONDecoder()
    span = (0, 0)
    while True:
        key, position = decoder.raw_decode(text, _next(text, position))
        start = _next(text, _next(text, position) + 1)  # behind the colon
        _, position = decoder.raw_decode(text, start)
        if key == "entries":
            span = (start, position - 1)
        position = _next(text, position)
        if text[position] == "}":
            return span
        position += 1  # behind the comma


def _next(text: str, position: int) -> int:
    while text[position] in _SPACE:
        position += 1
    return position
