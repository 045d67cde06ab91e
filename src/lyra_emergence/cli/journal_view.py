"""Entries, hits and counts of a journal, as lines for a terminal."""

from __future__ import annotations

import textwrap
import time
from typing import TYPE_CHECKING, Any, Final, Self

from lyra_emergence.journal.text import one_line, plain, shorten

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lyra_emergence.cli.console import Console
    from lyra_emergence.journal import Hit, JournalEntry

__all__ = ["EmbeddingProgress", "entry_line", "entry_lines", "hit_as_data", "hit_lines", "stats_lines"]

_NARROWEST: Final = 20
_MOST_TAGS: Final = 10
_SAID_EVERY: Final = 10.0
"""Seconds between lines of progress where no line can be redrawn."""


def entry_line(entry: JournalEntry, console: Console) -> str:
    """Return an entry on one line: date, label, tags."""
    tags = " ".join(f"#{one_line(tag)}" for tag in entry.tags)
    room = max(_NARROWEST, console.width - len(entry.date) - 2)
    label = shorten(entry.label, max(_NARROWEST, room - len(tags) - 2))
    date = console.style(entry.date, "cyan", stream=console.stdout)
    return f"{date}  {shorten(f'{label}  {tags}'.rstrip(), room)}"


def entry_lines(entry: JournalEntry, console: Console) -> Iterator[str]:
    """Yield an entry whole: its fields and its text."""
    yield console.style(entry.label, "bold", stream=console.stdout)
    yield f"{entry.timestamp.isoformat(sep=' ')}   {one_line(entry.id)}"
    tags = ", ".join(one_line(tag) for tag in entry.tags)
    said = [("tags", tags), ("mood", one_line(entry.mood)), ("publish", "yes" if entry.publish else "")]
    for name, value in said:
        if value:
            yield f"{name}: {value}"
    yield ""
    for line in plain(entry.text).split("\n"):
        yield from textwrap.wrap(line, console.width) or [""]


def hit_lines(number: int, hit: Hit, console: Console) -> Iterator[str]:
    """Yield what a search found: which entry, and its passage."""
    dot = "·" if console.can_show("·") else "-"
    label = f"[{number}] {hit.entry.date} {dot} {hit.entry.label}"
    yield console.style(label, "cyan", stream=console.stdout)
    indent = "    "
    yield from textwrap.wrap(one_line(hit.passage), console.width, initial_indent=indent, subsequent_indent=indent)


def hit_as_data(hit: Hit) -> dict[str, Any]:
    """Return a hit as plain data."""
    entry = hit.entry
    return {
        "id": entry.id,
        "date": entry.date,
        "title": entry.title,
        "tags": list(entry.tags),
        "score": hit.score,
        "passage": hit.passage,
    }


def stats_lines(stats: dict[str, Any], console: Console) -> Iterator[str]:
    """Yield the counts of `JournalIndex.stats`."""
    yield f"journal   {stats['journal']}"
    if stats["first"]:
        yield f"entries   {stats['entries']}, {stats['first']} to {stats['last']}"
    else:
        yield "entries   0"
    yield f"words     {stats['words']}"
    yield f"publish   {stats['publish']}"
    tags = ", ".join(f"{one_line(tag)} {count}" for tag, count in list(stats["tags"].items())[:_MOST_TAGS])
    more = len(stats["tags"]) - _MOST_TAGS
    text = f"tags      {tags or 'none'}{f', and {more} more' if more > 0 else ''}"
    yield from textwrap.wrap(text, console.width, subsequent_indent=" " * 10, break_on_hyphens=False)
    yield f"passages  {stats['passages']}, {stats['vectors']} with a vector"
    yield f"model     {stats['embedding_model'] or 'none: words alone'}"
    yield f"index     {stats['index'] or 'in memory'}"
    yield from (f"problem   {problem}" for problem in stats["problems"])


class EmbeddingProgress:
    """Says how many passages have a vector: on a line that is redrawn, or on a new one now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = time.monotonic()
        self._drawn = 0

    def __enter__(self) -> Self:
        return self

    def __call__(self, done: int, total: int) -> None:
        """Show progress: passages done and passages in all."""
        text = f"{done} of {total} passages"
        if self._console.shows_progress:
            self._console.stderr.write(f"\r{text:<{self._drawn}}")
            self._console.stderr.flush()
            self._drawn = len(text)
        elif time.monotonic() - self._last >= _SAID_EVERY:
            self._console.say(text)
            self._last = time.monotonic()

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            self._console.stderr.write("\r" + " " * self._drawn + "\r")
            self._console.stderr.flush()
