"""Passages by words: BM25 over title, tags and text.

Ranking: BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009, as FTS5 computes
it). Weak matches are left out rather than handed to a model that would try to use them: `_MIN_COVERAGE` and
`_MIN_OF_BEST`.

Covered: words in any inflection that the Porter stemmer joins, with or without diacritics. Not covered: synonyms, words
within words (German compounds, languages written without spaces), misspellings, letters that Unicode does not
decompose ("o" does not find "ø").
"""

from __future__ import annotations

import math
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lyra_emergence.journal import search

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lyra_emergence.journal.filters import Filter
    from lyra_emergence.journal.store import Store

__all__ = ["ByWords", "WordSearch", "closest_part"]

_WEIGHTS: Final = (4.0, 2.0, 1.0)  # title, tags, text
_MIN_COVERAGE: Final = 0.15
"""Least share of the question's words that an entry must have, each word counting by its rarity."""
_MIN_OF_BEST: Final = 0.3
"""Least score that words may give an entry, as a share of the best entry's."""
_MIN_PREFIX: Final = 4
_MOST_RANKED: Final = 12_000
"""Passages that are ranked, about: each takes some microseconds."""

# CROSS JOIN keeps SQLite from looking for each passage of the period in the full-text index, which takes seconds.
_RANK: Final = """
SELECT number, score, lifted FROM (
    SELECT words.rowid AS number, -bm25(words, ?, ?, ?) AS score, 0 AS lifted FROM words WHERE words MATCH ?
) ORDER BY score DESC, number DESC LIMIT ?
"""
_RANK_WITHIN: Final = """
SELECT number, score, lifted FROM (
    SELECT words.rowid AS number, -bm25(words, ?, ?, ?) AS score, ({lifted}) AS lifted
    FROM words CROSS JOIN passages ON passages.number = words.rowid WHERE words MATCH ? AND {kept}
) ORDER BY score + ? * lifted DESC, number DESC LIMIT ?
"""
_COUNT: Final = "SELECT count(*) FROM words WHERE words MATCH ?"


@dataclass(frozen=True, slots=True)
class ByWords:
    """How well a passage matches a question's words.

    Attributes:
        score: BM25, lifted where the passage is of a day that the question means.
        coverage: The share of the question's words in it, each counting by its rarity, 0 to 1.
    """

    score: float
    coverage: float


class WordSearch:
    """Ranks the passages of a store by words."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def rank(
        self, telling: tuple[str, ...], limit: int, kept: Filter, meant: Filter | None = None, bonus: float = 0.0
    ) -> dict[int, ByWords]:
        """Return the passages that match the words `telling` best; `limit` at most.

        Args:
            telling: The words.
            limit: The most passages to return.
            kept: The only passages to look at.
            meant: Passages of the days that the question means; their scores are lifted.
            bonus: By how much.
        """
        total = self._store.count("passages")
        known = [(expression, count) for expression, count in map(self._known, telling) if count]
        if not known:
            return {}
        ranked = self._ranked(_expression(known), limit, kept, meant, bonus)
        covered = self._coverage(known, total, unknown=len(telling) - len(known), rows=[row for row, *_ in ranked])
        least = _MIN_OF_BEST * max((score for _, score, _ in ranked), default=0.0)
        return {
            row: ByWords(score + bonus * lifted, covered[row])
            for row, score, lifted in ranked
            if covered[row] >= _MIN_COVERAGE and score >= least
        }

    def _ranked(
        self, expression: str, limit: int, kept: Filter, meant: Filter | None, bonus: float
    ) -> list[tuple[int, float, int]]:
        if not kept.restricts and meant is None:
            return self._store.rows(_RANK, (*_WEIGHTS, expression, limit))
        keeps, kept_values = kept.condition()
        lifts, lifted_values = meant.condition() if meant is not None else ("0", [])
        statement = _RANK_WITHIN.format(lifted=lifts, kept=keeps)
        values = (*_WEIGHTS, *lifted_values, expression, *kept_values, bonus, limit)
        return self._store.rows(statement, values)

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
        return int(self._store.value(_COUNT, (expression,)))

    def _coverage(
        self, known: list[tuple[str, int]], passages: int, *, unknown: int, rows: Iterable[int]
    ) -> dict[int, float]:
        """Return for each row the share of the question's words in it, by weight log(1 + passages / occurrences).

        Words that the journal does not have weigh as much as those that occur once.
        """
        covered = dict.fromkeys(rows, 0.0)
        if not covered:
            return {}
        total = unknown * math.log1p(passages)
        marks = ",".join("?" * len(covered))
        among = f"SELECT rowid FROM words WHERE words MATCH ? AND rowid IN ({marks})"  # noqa: S608  # question marks alone
        for expression, count in known:
            weight = math.log1p(passages / count)
            total += weight
            for (row,) in self._store.rows(among, (expression, *covered)):
                covered[row] += weight
        return {row: weight / total for row, weight in covered.items()}


def _expression(known: list[tuple[str, int]]) -> str:
    """Return the full-text expression for passages with any of the words.

    In a large journal its most common words do not bring a passage by themselves, though they count where a rarer one
    does: with those alone half of the passages would be ranked.
    """
    bringing, counting, passages = list[str](), list[str](), 0
    for expression, count in sorted(known, key=lambda item: item[1]):
        passages += count
        (bringing if passages <= _MOST_RANKED or not bringing else counting).append(expression)
    any_of = " OR ".join(bringing)
    return f"({any_of}) AND ({' OR '.join((any_of, *counting))})" if counting else any_of


def closest_part(parts: tuple[str, ...], telling: tuple[str, ...]) -> str:
    """Return the part of a passage that matches the words `telling` best; the first one where none does."""
    if len(parts) < 2 or not telling:  # noqa: PLR2004
        return parts[0] if parts else ""
    database = sqlite3.connect(":memory:")
    try:
        database.execute("CREATE VIRTUAL TABLE parts USING fts5(body, tokenize='porter unicode61 remove_diacritics 2')")
        database.executemany("INSERT INTO parts(rowid, body) VALUES (?, ?)", enumerate(parts))
        found = database.execute(
            "SELECT rowid FROM parts WHERE parts MATCH ? ORDER BY bm25(parts), rowid LIMIT 1",
            (" OR ".join(search.quoted(term) for term in telling),),
        ).fetchone()
    finally:
        database.close()
    return parts[found[0] if found else 0]
