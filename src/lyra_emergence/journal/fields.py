"""The fields of an entry, checked: what a file says becomes a `JournalEntry`, or a line for each field that is wrong.

An entry is either

    {"id": "a", "timestamp": "2025-03-02T19:40:00", "text": "...", "title": "...", "tags": ["garden"], "mood": "calm",
     "publish": true}

of which id, timestamp and text must be there, or the older form, whose fields lie under "journal_entry": timestamp,
label, entry_type, description, key_insights, lyra_reflections, tags, mood, publish. Other keys are ignored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lyra_emergence.journal.entries import LABEL_LENGTH, MAX_TAGS, MAX_TEXT, MAX_TITLE, JournalEntry
from lyra_emergence.journal.text import shorten

__all__ = ["JSON_NAMES", "InvalidEntryError", "check_entry", "parse_timestamp"]

_EXAMPLE_TIMESTAMP = "write it like '2025-03-02' or '2025-03-02T19:40:00Z'"

JSON_NAMES = {
    str: "string", int: "number", float: "number", bool: "boolean", type(None): "null", list: "list", dict: "object",
}  # fmt: skip


_Model = TypeVar("_Model", bound=BaseModel)


class InvalidEntryError(Exception):
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
        raise ValueError(f"is a {JSON_NAMES[type(value)]}, not a string")  # noqa: TRY004
    return _clean(value)


def _filled(value: Any) -> str:
    text = _string(value)
    if not text:
        raise ValueError("is empty")
    return text


def _identifier(value: Any) -> str:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _filled(value)


def parse_timestamp(value: Any) -> datetime:
    """Return the moment that an ISO 8601 text names.

    Raises:
        ValueError: It names none; the text is the problem's, without the field.
    """
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
        raise ValueError(f"is a {JSON_NAMES[type(value)]}, not a list of strings")  # noqa: TRY004
    try:
        cleaned = [_string(item) for item in value]
    except ValueError as exc:
        raise ValueError(f"has an item that {exc}") from exc
    return tuple(text for text in cleaned if text)


def _string_or_strings(value: Any) -> tuple[str, ...]:
    return _strings([value] if isinstance(value, str) else value)


def _flag(value: Any) -> bool:
    if isinstance(value, str) and value.strip().lower() in _FLAGS:  # front matter has no booleans of its own
        return _FLAGS[value.strip().lower()]
    if value is None or isinstance(value, bool):
        return bool(value)
    shown = repr(shorten(value, 20)) if isinstance(value, str) else f"a {JSON_NAMES[type(value)]}"
    raise ValueError(f"is {shown}, not true or false")


_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "": False}
_Flag = Annotated[bool, BeforeValidator(_flag)]
_Title = Annotated[str, BeforeValidator(_string), Field(max_length=MAX_TITLE)]
_Text = Annotated[str, BeforeValidator(_string), Field(max_length=MAX_TEXT)]
_Tags = Annotated[tuple[str, ...], BeforeValidator(_strings), Field(max_length=MAX_TAGS)]
_Lines = Annotated[tuple[str, ...], BeforeValidator(_string_or_strings)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    id: Annotated[str, BeforeValidator(_identifier), Field(max_length=MAX_TITLE)]
    timestamp: Annotated[datetime, BeforeValidator(parse_timestamp)]
    text: Annotated[str, BeforeValidator(_filled), Field(max_length=MAX_TEXT)]
    title: _Title = ""
    tags: _Tags = ()
    mood: _Title = ""
    publish: _Flag = False


class _WrappedEntry(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    timestamp: Annotated[datetime, BeforeValidator(parse_timestamp)]
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
    publish: _Flag = False


def check_entry(item: Any) -> JournalEntry:
    """Return the entry that `item` describes in either form, or raise `InvalidEntryError`."""
    if not isinstance(item, Mapping):
        raise InvalidEntryError([f"is a {JSON_NAMES[type(item)]}, not an object"])
    if "journal_entry" not in item:
        return JournalEntry(**dict(_validated(_Entry, item)))
    wrapped = item["journal_entry"]
    if not isinstance(wrapped, Mapping):
        raise InvalidEntryError([f"journal_entry: is a {JSON_NAMES[type(wrapped)]}, not an object"], _known_id(item))
    fields = {"id": item["id"], **wrapped} if "id" in item else wrapped
    return _unwrapped(_validated(_WrappedEntry, fields, prefix="journal_entry."))


def _unwrapped(wrapped: _WrappedEntry) -> JournalEntry:
    insights = "\n".join(f"- {insight}" for insight in wrapped.key_insights)
    parts = (wrapped.text, wrapped.description, insights, *wrapped.lyra_reflections)
    text = "\n\n".join(part for part in parts if part)
    if not text:
        raise InvalidEntryError(
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
        publish=wrapped.publish,
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
        raise InvalidEntryError(lines, _known_id(fields)) from exc


def _problem(error: Any) -> str:
    if error["type"] == "missing":
        return "is missing"
    if error["type"] in {"string_too_long", "too_long"}:
        unit = "characters" if isinstance(error["input"], str) else "items"
        return f"has more than {error['ctx']['max_length']} {unit}"
    return str(error["ctx"]["error"])


def _known_id(fields: Mapping[str, Any]) -> str:
    try:
        return shorten(_identifier(fields.get("id")), LABEL_LENGTH)
    except ValueError:
        return ""
