"""An index over the passages of a journal: SQLite FTS5, ranked by BM25, in memory.

Ranking: BM25 over title, tags and text (Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and
Beyond", 2009, as FTS5 computes it), plus a bonus for entries of a date that the question names. An entry stands for
its best passage. Weak matches are left out rather than handed to a model that would try to use them: `_MIN_COVERAGE`
and `_MIN_OF_BEST`.

Covered: words in any inflection that the Porter stemmer joins, with or without diacritics. Not covered: synonyms, words
within words (German compounds, languages written without spaces), misspellings, letters that Unicode does not
decompose ("o" does not find "ø").
"""

from __future__ import annotations

import math
import sqlite3
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lyra_emergence.errors import JournalError
from lyra_emergence.journal import search
from lyra_emergence.journal.dates import named_dates
from lyra_emergence.journal.text import PASSAGE_LENGTH, passages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lyra_emergence.journal.dates import NamedDate
    from lyra_emergence.journal.entries import Journal, JournalEntry
    from lyra_emergence.journal.rerank import Reranker
    from lyra_emergence.journal.search import Hit

__all__ = ["JournalIndex"]

_WEIGHTS = (4.0, 2.0, 1.0)  # title, tags, text
_MIN_COVERAGE = 0.15
"""Least share of the question's words that an entry must have, each word counting by its rarity."""
_MIN_OF_BEST = 0.3
"""Least score that words may give an entry, as a share of the best entry's."""
_DATE_BONUS = 6.0
"""Added for a named date: about what two rare words that match are worth, so that "in May" outranks one chance word."""
_MIN_PREFIX = 4
_POOL = 32
"""Passages looked at, and given to the reranker, for each search."""

_CREATE = """
CREATE VIRTUAL TABLE passages USING fts5(title, tags, body, tokenize='porter unicode61 remove_diacritics 2')
"""
_RANK = """
SELECT rowid, -bm25(passages, ?, ?, ?) AS score
FROM passages WHERE passages MATCH ? ORDER BY score DESC, rowid DESC LIMIT ?
"""
_COUNT = "SELECT count(*) FROM passages WHERE passages MATCH ?"
_AMONG = "SELECT rowid FROM passages WHERE passages MATCH ? AND rowid BETWEEN ? AND ?"


@dataclass(frozen=True, slots=True)
class _Passage:
    entry: JournalEntry
    text: str


class JournalIndex:
    """A journal, searchable.

    It may be searched from several threads, one at a time.

    Attributes:
        journal: What is indexed.

    Args:
        journal: What to index.
        reranker: Reorders what a search finds.
        on_note: Called with each note as it arises.
        passage_length: Characters of a passage at most.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        reranker: Reranker | None = None,
        on_note: Callable[[str], None] | None = None,
        passage_length: int = PASSAGE_LENGTH,
    ) -> None:
        self.journal = journal
        self._reranker = reranker
        self._on_note = on_note
        self._notes: list[str] = []
        self._lock = threading.Lock()
        # Oldest first, so that a higher row is a newer entry and ties in a ranking fall to the newer one.
        self._passages = [_Passage(e, text) for e in journal.entries for text in passages(e.text, passage_length)]
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        try:
            self._database.execute(_CREATE)
        except sqlite3.OperationalError as exc:
            raise JournalError(
                f"this Python's SQLite {sqlite3.sqlite_version} has no full-text search: {exc}",
                hint="use a Python whose SQLite has FTS5, such as the one that uv installs",
            ) from exc
        with self._database:
            self._database.executemany(
                "INSERT INTO passages(rowid, title, tags, body) VALUES (?, ?, ?, ?)", self._rows()
            )

    @property
    def entries(self) -> tuple[JournalEntry, ...]:
        """The entries, oldest first."""
        return self.journal.entries

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about this journal, a line each: problems in the file, how it is reranked."""
        return tuple(self._notes)

    def with_passages(self, length: int) -> JournalIndex:
        """Return an index of the same journal whose passages have `length` characters at most, for a smaller reader."""
        index = JournalIndex(self.journal, reranker=self._reranker, on_note=self._on_note, passage_length=length)
        index._notes = list(self._notes)
        return index

    def note(self, line: str) -> None:
        """Add a line to `notes` and hand it to `on_note`."""
        self._notes.append(line)
        if self._on_note is not None:
            self._on_note(line)

    def close(self) -> None:
        """Free the index; searching it afterward is an error."""
        self._database.close()

    def search(self, question: str, limit: int = 4) -> tuple[Hit, ...]:
        """Return the entries that match `question` best, best first, `limit` at most; none if nothing matches."""
        with self._lock:
            scored = self._reranked(question, self._candidates(question))
        best: dict[str, Hit] = {}
        for row, score in scored:
            passage = self._passages[row]
            best.setdefault(passage.entry.id, search.Hit(passage.entry, score, passage.text))
        return tuple(best.values())[:limit]

    def latest(self, limit: int = 4) -> tuple[Hit, ...]:
        """Return the newest entries, newest first, `limit` at most, each with the beginning of its text."""
        first: dict[str, Hit] = {}
        for passage in self._passages:
            first.setdefault(passage.entry.id, search.Hit(passage.entry, 0.0, passage.text))
        return tuple(first.values())[: -limit - 1 : -1] if limit > 0 else ()

    def _rows(self) -> Iterable[tuple[int, str, str, str]]:
        for row, passage in enumerate(self._passages):
            yield row, passage.entry.title, " ".join((*passage.entry.tags, passage.entry.mood)), passage.text

    def _candidates(self, question: str) -> list[tuple[int, float]]:
        """Return the rows worth considering with their scores, best first."""
        scores = self._by_words(search.terms(question))
        for row in self._by_date(named_dates(question)):
            scores[row] = scores.get(row, 0.0) + _DATE_BONUS
        return sorted(scores.items(), key=lambda item: (-item[1], -item[0]))

    def _by_words(self, telling: tuple[str, ...]) -> dict[int, float]:
        known = [(expression, count) for expression, count in map(self._known, telling) if count]
        if not known:
            return {}
        any_of = " OR ".join(expression for expression, _ in known)
        scores: dict[int, float] = dict(self._database.execute(_RANK, (*_WEIGHTS, any_of, _POOL)).fetchall())
        covered = self._coverage(known, unknown=len(telling) - len(known), rows=scores)
        least = _MIN_OF_BEST * max(scores.values(), default=0.0)
        return {row: score for row, score in scores.items() if covered[row] >= _MIN_COVERAGE and score >= least}

    def _known(self, term: str) -> tuple[str, int]:
        """Return the expression for `term` and the count of passages that match it.

        A word that the journal does not have stands for the words that begin with it: "roof" for "roofer".
        """
        expression = search.quoted(term)
        count = self._count(expression)
        if count or len(term) < _MIN_PREFIX:
            return expression, count
        prefix = search.beginning_with(term)
        return prefix, self._count(prefix)

    def _count(self, expression: str) -> int:
        (count,) = self._database.execute(_COUNT, (expression,)).fetchone()
        return int(count)

    def _coverage(self, known: list[tuple[str, int]], *, unknown: int, rows: Iterable[int]) -> dict[int, float]:
        """Return for each row the share of the question's words in it, by weight log(1 + passages / occurrences).

        Words that the journal does not have weigh as much as those that occur once.
        """
        covered = dict.fromkeys(rows, 0.0)
        total = unknown * math.log1p(len(self._passages))
        for expression, count in known:
            weight = math.log1p(len(self._passages) / count)
            total += weight
            for (row,) in self._database.execute(_AMONG, (expression, min(covered), max(covered))):
                if row in covered:
                    covered[row] += weight
        return {row: weight / total for row, weight in covered.items()}

    def _by_date(self, dates: tuple[NamedDate, ...]) -> list[int]:
        if not dates:
            return []
        rows = (
            row
            for row in reversed(range(len(self._passages)))
            if any(named.covers(self._passages[row].entry.timestamp) for named in dates)
        )
        return [row for row, _ in zip(rows, range(_POOL), strict=False)]

    def _reranked(self, question: str, candidates: list[tuple[int, float]]) -> list[tuple[int, float]]:
        if self._reranker is None or len(candidates) < 2:  # noqa: PLR2004
            return candidates
        texts = [self._described(row) for row, _ in candidates]
        try:
            scores = self._reranker.score(question, texts)
        except Exception as exc:  # noqa: BLE001  # whatever is wrong with a model's files, the search answers
            name, self._reranker = self._reranker.name, None
            self.note(f"reranking with {name} failed, so the order is that of the words: {exc}")
            return candidates
        reordered = zip((row for row, _ in candidates), scores, strict=True)
        return sorted(reordered, key=lambda item: (-item[1], -item[0]))

    def _described(self, row: int) -> str:
        passage = self._passages[row]
        return f"{passage.entry.title}. {passage.text}" if passage.entry.title else passage.text
