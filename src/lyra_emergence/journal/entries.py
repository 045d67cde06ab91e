"""A journal file: reading and checking it.

The file is a JSON list of entries, or an object with the list under "entries". An entry is either

    {"id": "a", "timestamp": "2025-03-02T19:40:00", "text": "...", "title": "...", "tags": ["garden"], "mood": "calm"}

of which id, timestamp and text must be there, or the older form, whose fields lie under "journal_entry": timestamp,
label, entry_type, description, key_insights, lyra_reflections, tags. Both may stand in one list; other keys are
ignored.

What is wrong with an entry is a line in `Journal.problems` and hides no other entry.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lyra_emergence.errors import JournalError
from lyra_emergence.journal.text import one_line, shorten

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Journal", "JournalEntry", "read_journal"]

# Bounds against a wrong file, such as a disk image named .json: far above any journal, below any machine's memory.
MAX_FILE_BYTES = 256 * 2**20
MAX_ENTRIES = 1_000_000
MAX_TEXT = 2_000_000
MAX_TITLE = 1_000
MAX_TAGS = 100
_MAX_LISTED_PROBLEMS = 8
_LABEL_LENGTH = 60
_EXAMPLE_TIMESTAMP = "write it like '2025-03-02' or '2025-03-02T19:40:00Z'"


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One entry.

    Attributes:
        id: Unique within the journal.
        timestamp: When it was written, as the file says it: with an offset only where the file has one.
        text: What it says.
        title: Its title, or "".
        tags: Its tags, in the file's order.
        mood: Its mood, or "".
    """

    id: str
    timestamp: datetime
    text: str
    title: str = ""
    tags: tuple[str, ...] = ()
    mood: str = ""

    @property
    def date(self) -> str:
        """The day as its writer saw it, such as "2025-03-02"."""
        return self.timestamp.date().isoformat()

    @property
    def label(self) -> str:
        """The title, or the first words of the text, on one line without control characters."""
        return shorten(one_line(self.title) or one_line(self.text), _LABEL_LENGTH)

    @property
    def moment(self) -> datetime:
        """The timestamp with an offset, to compare entries by: UTC where the file has none."""
        return self.timestamp if self.timestamp.tzinfo else self.timestamp.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Journal:
    """The valid entries of a file, oldest first, and what is wrong with the rest.

    Attributes:
        path: The file.
        entries: The valid entries by time.
        problems: One line per problem, naming the file, the entry (its place from 1 and its id) and the field.
    """

    path: Path
    entries: tuple[JournalEntry, ...]
    problems: tuple[str, ...] = ()


def read_journal(path: Path) -> Journal:
    """Read the journal at `path`.

    An id that is used again: the same entry once more is left out; another entry gets the id "<id> (2)", so that
    nothing written is lost. Both are problems.

    Raises:
        JournalError: The file is missing, unreadable, too large or not JSON, or it has entries and none is valid.
    """
    items = _items(_parse(path, _read(path)), path)
    found: dict[str, tuple[int, JournalEntry]] = {}
    problems: list[str] = []
    for number, item in enumerate(items, start=1):
        try:
            entry = _entry(item)
        except _InvalidEntryError as invalid:
            where = _where(path, number, invalid.entry_id)
            problems += [f"{where}: {problem}" for problem in invalid.problems]
            continue
        problem = _add(found, entry, number)
        if problem:
            problems.append(f"{_where(path, number, entry.id)}: id: {problem}")
    if items and not found:
        raise JournalError(_nothing_valid(path, len(items), problems), hint="correct the entries named above")
    entries = sorted((entry for _, entry in found.values()), key=lambda entry: entry.moment)
    return Journal(path, tuple(entries), tuple(problems))


def _add(found: dict[str, tuple[int, JournalEntry]], entry: JournalEntry, number: int) -> str | None:
    """Put `entry` under its id or, that being taken, a new one; return the problem if there is one."""
    if entry.id not in found:
        found[entry.id] = number, entry
        return None
    first, other = found[entry.id]
    if entry == other:
        return f"the same entry as entry {first}; left out"
    copy = 2
    while f"{entry.id} ({copy})" in found:
        copy += 1
    renamed = replace(entry, id=f"{entry.id} ({copy})")
    found[renamed.id] = number, renamed
    return f"already the id of entry {first}; kept as {renamed.id!r}"


def _where(path: Path, number: int, entry_id: str) -> str:
    return f"{path}: entry {number}" + (f" (id {entry_id!r})" if entry_id else "")


def _nothing_valid(path: Path, count: int, problems: list[str]) -> str:
    listed = problems[:_MAX_LISTED_PROBLEMS]
    if len(problems) > len(listed):
        listed.append(f"and {len(problems) - len(listed)} more")
    head = f"{path}: its only entry is not valid" if count == 1 else f"{path}: none of its {count} entries is valid"
    return "\n".join((head, *(f"  {problem}" for problem in listed)))


def _read(path: Path) -> str:
    try:
        if path.is_dir():
            raise JournalError(f"{path} is a folder, not a journal file", hint="name a JSON file in it")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise JournalError(
                f"{path} has {size} bytes; a journal may have {MAX_FILE_BYTES}", hint="split it into several files"
            )
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES)
    except FileNotFoundError as exc:
        raise JournalError(
            f"there is no journal at {path}", hint="check --journal; data/journal/sample.json shows the form"
        ) from exc
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


def _items(data: Any, path: Path) -> list[Any]:
    items = data.get("entries") if isinstance(data, dict) else data
    if not isinstance(items, list):
        kind = 'an object without a list "entries"' if isinstance(data, dict) else f"a {_JSON_NAMES[type(data)]}"
        raise JournalError(
            f"{path} holds {kind}, not a list of entries", hint="data/journal/sample.json shows the form"
        )
    if len(items) > MAX_ENTRIES:
        raise JournalError(f"{path} holds {len(items)} entries; a journal may hold {MAX_ENTRIES}")
    return items


_JSON_NAMES = {
    str: "string", int: "number", float: "number", bool: "boolean", type(None): "null", list: "list", dict: "object",
}  # fmt: skip


_Model = TypeVar("_Model", bound=BaseModel)


class _InvalidEntryError(Exception):
    """What is wrong with one entry, a line per field."""

    def __init__(self, problems: list[str], entry_id: str = "") -> None:
        super().__init__(*problems)
        self.problems = problems
        self.entry_id = entry_id


def _clean(text: str) -> str:
    """Return `text` that UTF-8 can hold: JSON can name halves of surrogate pairs, and NUL ends a string in SQLite."""
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return whole.replace("\0", "").strip()


# The validators raise ValueError for a wrong type too: pydantic collects ValueErrors and lets TypeErrors through.
def _string(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"is a {_JSON_NAMES[type(value)]}, not a string")  # noqa: TRY004
    return _clean(value)


def _filled(value: Any) -> str:
    text = _string(value)
    if not text:
        raise ValueError("is empty")
    return text


def _identifier(value: Any) -> str:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _filled(value)


def _timestamp(value: Any) -> datetime:
    text = _filled(value)
    try:
        moment = datetime.fromisoformat(text)
        moment.astimezone(UTC)  # the first and last days of the calendar have no UTC time
    except (ValueError, OverflowError) as exc:
        raise ValueError(f"{shorten(text, 40)!r} is not an ISO 8601 date; {_EXAMPLE_TIMESTAMP}") from exc
    return moment


def _strings(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError(f"is a {_JSON_NAMES[type(value)]}, not a list of strings")  # noqa: TRY004
    try:
        cleaned = [_string(item) for item in value]
    except ValueError as exc:
        raise ValueError(f"has an item that {exc}") from exc
    return tuple(text for text in cleaned if text)


def _string_or_strings(value: Any) -> tuple[str, ...]:
    return _strings([value] if isinstance(value, str) else value)


_Title = Annotated[str, BeforeValidator(_string), Field(max_length=MAX_TITLE)]
_Text = Annotated[str, BeforeValidator(_string), Field(max_length=MAX_TEXT)]
_Tags = Annotated[tuple[str, ...], BeforeValidator(_strings), Field(max_length=MAX_TAGS)]
_Lines = Annotated[tuple[str, ...], BeforeValidator(_string_or_strings)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    id: Annotated[str, BeforeValidator(_identifier), Field(max_length=MAX_TITLE)]
    timestamp: Annotated[datetime, BeforeValidator(_timestamp)]
    text: Annotated[str, BeforeValidator(_filled), Field(max_length=MAX_TEXT)]
    title: _Title = ""
    tags: _Tags = ()
    mood: _Title = ""


class _WrappedEntry(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    timestamp: Annotated[datetime, BeforeValidator(_timestamp)]
    id: Annotated[str | None, BeforeValidator(_identifier), Field(max_length=MAX_TITLE)] = None
    label: _Title = ""
    title: _Title = ""
    entry_type: _Title = ""
    text: _Text = ""
    description: _Text = ""
    key_insights: _Lines = ()
    lyra_reflections: _Lines = ()
    tags: _Tags = ()
    mood: _Title = ""


def _entry(item: Any) -> JournalEntry:
    """Return the entry that `item` describes in either form, or raise `_InvalidEntryError`."""
    if not isinstance(item, Mapping):
        raise _InvalidEntryError([f"is a {_JSON_NAMES[type(item)]}, not an object"])
    if "journal_entry" not in item:
        return JournalEntry(**dict(_validated(_Entry, item)))
    wrapped = item["journal_entry"]
    if not isinstance(wrapped, Mapping):
        raise _InvalidEntryError([f"journal_entry: is a {_JSON_NAMES[type(wrapped)]}, not an object"], _known_id(item))
    fields = {"id": item["id"], **wrapped} if "id" in item else wrapped
    return _unwrapped(_validated(_WrappedEntry, fields, prefix="journal_entry."))


def _unwrapped(wrapped: _WrappedEntry) -> JournalEntry:
    insights = "\n".join(f"- {insight}" for insight in wrapped.key_insights)
    parts = (wrapped.text, wrapped.description, insights, *wrapped.lyra_reflections)
    text = "\n\n".join(part for part in parts if part)
    if not text:
        raise _InvalidEntryError(
            ["journal_entry: has no text in description, key_insights or lyra_reflections"], wrapped.id or ""
        )
    title = wrapped.label or wrapped.title
    kind = (wrapped.entry_type,) if wrapped.entry_type and wrapped.entry_type not in wrapped.tags else ()
    return JournalEntry(
        id=wrapped.id or _derived_id(wrapped.timestamp, title, text),
        timestamp=wrapped.timestamp,
        text=text,
        title=title,
        tags=(*wrapped.tags, *kind),
        mood=wrapped.mood,
    )


def _derived_id(timestamp: datetime, title: str, text: str) -> str:
    """Return an id that stays the same as long as the entry does, wherever it stands in the file."""
    digest = hashlib.sha256(f"{timestamp.isoformat()}\0{title}\0{text}".encode()).hexdigest()
    return f"{timestamp.date().isoformat()}-{digest[:12]}"


def _validated(model: type[_Model], fields: Mapping[str, Any], *, prefix: str = "") -> _Model:
    try:
        return model.model_validate(fields)
    except ValidationError as exc:
        lines = [f"{prefix}{error['loc'][0]}: {_problem(error)}" for error in exc.errors(include_url=False)]
        raise _InvalidEntryError(lines, _known_id(fields)) from exc


def _problem(error: Any) -> str:
    if error["type"] == "missing":
        return "is missing"
    if error["type"] in {"string_too_long", "too_long"}:
        unit = "characters" if isinstance(error["input"], str) else "items"
        return f"has more than {error['ctx']['max_length']} {unit}"
    return str(error["ctx"]["error"])


def _known_id(fields: Mapping[str, Any]) -> str:
    try:
        return shorten(_identifier(fields.get("id")), _LABEL_LENGTH)
    except ValueError:
        return ""
