"""Your journal: read, checked, indexed and searched.

`open_journal` is the way in; nothing here needs torch until a search reranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lyra_emergence.journal.entries import Journal, JournalEntry, read_journal
from lyra_emergence.journal.index import JournalIndex
from lyra_emergence.journal.search import Hit
from lyra_emergence.journal.text import one_line, plain

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Hit", "Journal", "JournalEntry", "JournalIndex", "one_line", "open_journal", "plain", "read_journal"]


def open_journal(
    path: str | Path, *, rerank: bool = False, on_note: Callable[[str], None] | None = None
) -> JournalIndex:
    """Read the journal at `path` and index it.

    Args:
        path: The journal file.
        rerank: Reorder what a search finds with a model on this machine; `notes` says which, or that there is none.
        on_note: Called with each note as it arises.

    Raises:
        JournalError: The file cannot be read, or it has entries and none is valid.
    """
    from lyra_emergence.journal.rerank import find_reranker

    journal = read_journal(Path(path))
    reranker, reason = find_reranker() if rerank else (None, "")
    index = JournalIndex(journal, reranker=reranker, on_note=on_note)
    for line in (*journal.problems, reason):
        if line:
            index.note(line)
    if not journal.entries:
        index.note(f"{path}: the journal holds no entries yet")
    return index
