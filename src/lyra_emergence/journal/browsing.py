"""Looking into an indexed journal: entries by day and tag, by the beginning of their id, and counts."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from lyra_emergence.journal.filters import Filter

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import date

    from lyra_emergence.journal.entries import JournalEntry
    from lyra_emergence.journal.index import JournalIndex

__all__ = ["entries_beginning", "entries_of", "stats_of"]


def entries_of(
    index: JournalIndex, since: date | None, until: date | None, tags: Iterable[str], limit: int | None
) -> tuple[tuple[JournalEntry, ...], int]:
    """Return the entries of some days that have all of some tags, newest first, and how many there are.

    Args:
        index: The journal.
        since: The first day.
        until: The last.
        tags: The tags, in any case.
        limit: The most entries to return; the count is of all.
    """
    kept = Filter.asked(since, until, tags)
    condition, values = kept.condition()
    where = f"number IN (SELECT entry FROM passages WHERE {condition})"  # noqa: S608  # columns and question marks
    count = index.store.value(f"SELECT count(*) FROM entries WHERE {where}", values)  # noqa: S608
    most = -1 if limit is None else limit
    return index.store.entries(where, values, newest_first=True, limit=most), int(count)


def entries_beginning(index: JournalIndex, name: str, limit: int) -> tuple[JournalEntry, ...]:
    """Return the entry with the id `name`, else those whose id, else whose date, begins with it, `limit` at most."""
    exact = index.store.entries("id = ?", (name,))
    begins = (len(name), name)
    exact = exact or index.store.entries("substr(id, 1, ?) = ?", begins, limit=limit)
    return exact or index.store.entries("substr(timestamp, 1, ?) = ?", begins, limit=limit)


def stats_of(index: JournalIndex) -> dict[str, Any]:
    """Return counts of the journal and of its index, as plain data."""
    store = index.store
    first, last = store.rows("SELECT min(substr(timestamp, 1, 10)), max(substr(timestamp, 1, 10)) FROM entries")[0]
    tags: Counter[str] = Counter()
    words = 0
    for text, listed in store.rows("SELECT text, tags FROM entries"):
        words += len(text.split())
        tags.update(json.loads(listed))
    return {
        "journal": str(index.path),
        "entries": index.count,
        "first": first,
        "last": last,
        "words": words,
        "publish": store.value("SELECT count(*) FROM entries WHERE publish"),
        "tags": dict(tags.most_common()),
        "passages": store.count("passages"),
        "vectors": store.count("vectors"),
        "embedding_model": index.embedding and index.embedding.files.name,
        "index": store.path and str(store.path),
        "problems": json.loads(store.fact("problems") or "[]"),
    }
