"""Your journal: read, checked, written, indexed and searched.

`open_journal` is the way in; nothing here needs torch until a search embeds or reranks.
"""

from lyra_emergence.journal.entries import Journal, JournalEntry
from lyra_emergence.journal.index import Found, JournalIndex
from lyra_emergence.journal.opening import open_journal
from lyra_emergence.journal.reading import read_journal
from lyra_emergence.journal.search import Hit
from lyra_emergence.journal.text import one_line, plain

__all__ = [
    "Found",
    "Hit",
    "Journal",
    "JournalEntry",
    "JournalIndex",
    "one_line",
    "open_journal",
    "plain",
    "read_journal",
]
