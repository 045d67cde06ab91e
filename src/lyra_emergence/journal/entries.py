"""An entry of a journal, the journal, and the bounds of both."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC
from typing import TYPE_CHECKING

from lyra_emergence.journal.text import one_line, shorten

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

__all__ = [
    "LABEL_LENGTH",
    "MAX_ENTRIES",
    "MAX_FILE_BYTES",
    "MAX_TAGS",
    "MAX_TEXT",
    "MAX_TITLE",
    "Journal",
    "JournalEntry",
]

# Bounds against a wrong file, such as a disk image named .json: far above any journal, below any machine's memory.
MAX_FILE_BYTES = 256 * 2**20
MAX_ENTRIES = 1_000_000
MAX_TEXT = 2_000_000
MAX_TITLE = 1_000
MAX_TAGS = 100
LABEL_LENGTH = 60
"""Characters of a label at most."""


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
        publish: Whether its writer marked it to be exported.
    """

    id: str
    timestamp: datetime
    text: str
    title: str = ""
    tags: tuple[str, ...] = ()
    mood: str = ""
    publish: bool = False

    @property
    def date(self) -> str:
        """The day as its writer saw it, such as "2025-03-02"."""
        return self.timestamp.date().isoformat()

    @property
    def label(self) -> str:
        """The title, or the first words of the text, on one line without control characters."""
        return shorten(one_line(self.title) or one_line(self.text), LABEL_LENGTH)

    @property
    def moment(self) -> datetime:
        """The timestamp with an offset, to compare entries by: UTC where the file has none."""
        return self.timestamp if self.timestamp.tzinfo else self.timestamp.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Journal:
    """The valid entries of a file or folder, oldest first, and what is wrong with the rest.

    Attributes:
        path: The file or folder.
        entries: The valid entries by time.
        problems: One line per problem, naming the file, the entry (its place from 1 and its id) and the field.
    """

    path: Path
    entries: tuple[JournalEntry, ...]
    problems: tuple[str, ...] = ()
