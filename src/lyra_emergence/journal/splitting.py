"""Splitting entries into the passages that are indexed: at sentences, within what the embedding model reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from lyra_emergence.journal.text import PASSAGE_LENGTH, passages, shorten

if TYPE_CHECKING:
    from collections.abc import Callable

    from lyra_emergence.journal.entries import JournalEntry

__all__ = ["PLAIN", "SPLITTER", "Splitter", "TokenCounter", "described", "split"]

SPLITTER: Final = f"2/{PASSAGE_LENGTH}"
"""Version of what `split` does; an index whose passages another version made is built anew."""
_TITLE_LENGTH: Final = 120
"""Characters of the title that are embedded with each passage."""


class TokenCounter(Protocol):
    """What an embedding model says of lengths."""

    @property
    def limit(self) -> int:
        """Tokens that the model reads of a text, its special tokens included."""

    def count(self, text: str) -> int:
        """Return the tokens of `text`, special tokens included."""


@dataclass(frozen=True, slots=True)
class Splitter:
    """A way to split entries, and what passages made in this way are known by.

    Attributes:
        name: What it is called; part of each entry's hash.
        counter: The embedding model's measure, or None.
        also: Names of other ways whose passages are as good.
    """

    name: str
    counter: TokenCounter | None = None
    also: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names whose passages may stay."""
        return (self.name, *self.also)

    def __call__(self, entry: JournalEntry) -> tuple[str, ...]:
        """Return the passages of an entry."""
        return split(entry, self.counter)


def described(title: str, text: str) -> str:
    """Return a passage as models read it: behind its entry's title."""
    return f"{shorten(title, _TITLE_LENGTH)}. {text}" if title else text


def split(entry: JournalEntry, counter: TokenCounter | None) -> tuple[str, ...]:
    """Return the passages of an entry, in order, each of at most `PASSAGE_LENGTH` characters.

    With a `counter`, each fits its limit together with the title. An entry always has one passage at least.
    """
    whole = passages(entry.text)
    if counter is None:
        return whole
    return tuple(part for passage in whole for part in _fitting(passage, entry.title, counter.limit, counter.count))


def _fitting(passage: str, title: str, limit: int, count: Callable[[str], int]) -> tuple[str, ...]:
    # A token has a character at least, so that most short passages need no count.
    if len(described(title, passage)) + 2 <= limit:
        return (passage,)
    tokens = count(described(title, passage))
    if tokens <= limit or len(passage) == 1:
        return (passage,)
    shorter = max(1, min(len(passage) * limit // tokens, len(passage) - 1) * 9 // 10)
    return tuple(part for piece in passages(passage, shorter) for part in _fitting(piece, title, limit, count))


PLAIN: Final = Splitter(SPLITTER)
"""By characters alone."""
