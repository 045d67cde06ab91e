"""Markdown files with front matter: one entry a file, read and written.

    ---
    id: 2025-03-02-garden-plans
    date: 2025-03-02T19:40:00
    title: Garden plans
    tags: [garden, home]
    mood: hopeful
    publish: true
    ---

    Drew the plan for the garden on the back of an envelope.

All of it but the text may be missing: the date is then the one that the file's name begins with, the title the text's
first heading, the id the file's name. Of YAML, front matter may use what notes use: plain and quoted values, lists in
brackets or as lines with a dash, comments. Keys of other programs, with whatever is indented below them, are ignored.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lyra_emergence.journal.entries import JournalEntry

__all__ = ["FrontMatterError", "read_markdown", "write_markdown"]

_KEY = re.compile(r"(?P<key>[A-Za-z_][\w-]*)\s*:(?:\s+(?P<value>.*)|\s*)\Z")
_ITEM = re.compile(r"\s*-\s+(?P<value>.*)\Z")
_COMMENT = re.compile(r"(?:^|\s)#.*\Z")
_HEADING = re.compile(r"\s*#[ \t]+(?P<title>[^\n]*?)[ \t#]*(?:\n|\Z)")
_DATED = re.compile(r"(?P<date>[0-9]{4}-[0-9]{2}-[0-9]{2})(?![0-9])")
_INLINE = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[^,]*)\s*(?:,|\Z)""")
_LISTS = frozenset({"tags"})
_FENCE = "---"


class FrontMatterError(ValueError):
    """Front matter that cannot be read; the text names the line."""


def read_markdown(text: str, name: str) -> dict[str, Any]:
    """Return the fields of an entry, unchecked, from a file's text.

    Args:
        text: The file's text.
        name: Its path within the journal without the suffix, which is the id where the front matter has none.

    Raises:
        FrontMatterError: A line of the front matter is neither a key nor a part of one, or the front matter has no end.
    """
    fields, body = _split(text)
    dated = _DATED.match(name.rpartition("/")[2])
    if "date" in fields:
        fields["timestamp"] = fields.pop("date")
    elif "timestamp" not in fields and dated is not None:
        fields["timestamp"] = dated["date"]
    if not fields.get("title"):
        fields["title"], body = _heading(body)
    return {"id": name, **{key: value for key, value in fields.items() if value != ""}, "text": body.strip()}


def write_markdown(entry: JournalEntry) -> str:
    """Return the text of a file that `read_markdown` reads back as `entry`."""
    fields: dict[str, Any] = {"id": entry.id, "date": entry.timestamp.isoformat(), "title": entry.title}
    fields |= {"tags": list(entry.tags), "mood": entry.mood, "publish": entry.publish}
    lines = [f"{key}: {_written(key, value)}" for key, value in fields.items() if value]
    return "\n".join((_FENCE, *lines, _FENCE, "", entry.text, ""))


def _written(key: str, value: Any) -> str:
    # JSON's strings and lists are YAML's too, and so is a bare date.
    return str(value) if key == "date" else json.dumps(value, ensure_ascii=False)


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Return the front matter's fields and the text behind it."""
    lines = re.split(r"\r\n|\n|\r", text)
    if lines[0].rstrip() != _FENCE:
        return {}, text
    for number, line in enumerate(lines[1:], start=1):
        if line.rstrip() in {_FENCE, "..."}:
            return dict(_fields(lines[1:number])), "\n".join(lines[number + 1 :])
    raise FrontMatterError("line 1: the front matter has no end; write '---' on a line of its own behind it")


def _fields(lines: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield keys and values of front matter whose first line is line 2 of its file."""
    key, value, items = "", "", list[str]()
    for number, line in enumerate(lines, start=2):
        item = _ITEM.match(line)
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if key and item is not None:
            items.append(_scalar(item["value"]))
        elif line[0] in " \t" and key:
            continue  # what another program nests below a key of its own
        else:
            yield from _finished(key, value, items)
            match = _KEY.match(line)
            if match is None:
                raise FrontMatterError(f"line {number}: {line.strip()[:40]!r} is not 'key: value'")
            key, value, items = match["key"].lower(), (match["value"] or "").strip(), []
    yield from _finished(key, value, items)


def _finished(key: str, value: str, items: list[str]) -> Iterator[tuple[str, Any]]:
    if items:
        yield key, items
    elif key in _LISTS:
        yield key, _listed(value)
    elif key:
        yield key, _scalar(value)


def _listed(value: str) -> list[str]:
    """Return the items of "[a, b]" or "a, b"."""
    value = _COMMENT.sub("", value).strip() if not value.startswith("[") else value[: value.rfind("]") + 1]
    inner = value[1:-1] if value.startswith("[") else value
    return [item for match in _INLINE.finditer(inner) if (item := _scalar(match[1]))]


def _scalar(value: str) -> str:
    value = value.strip()
    for quote, pattern in (('"', r'"(?:[^"\\]|\\.)*"'), ("'", r"'(?:[^']|'')*'")):
        if value.startswith(quote) and (match := re.match(pattern, value)) is not None:
            return _unquoted(match[0])
    return _COMMENT.sub("", value).strip()


def _unquoted(value: str) -> str:
    if value[0] == "'":
        return value[1:-1].replace("''", "'")
    try:
        return str(json.loads(value))
    except ValueError:  # an escape of YAML's own
        return value[1:-1]


def _heading(body: str) -> tuple[str, str]:
    """Return the heading that `body` begins with, or "", and the text below it; a heading alone is the text."""
    match = _HEADING.match(body)
    if match is None or not body[match.end() :].strip():
        return "", body
    return match["title"].strip(), body[match.end() :]
