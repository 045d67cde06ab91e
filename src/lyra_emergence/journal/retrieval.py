"""The passages that a question may be about, by each way that there is, and fused.

Each way ranks passages by itself, those of the days that the question means being lifted in each. In the fusion a
passage's place among the words counts by the square of its share of the question's words, so that one common word in a
question that is worded otherwise does not outweigh the meaning (docs/journal.md has the figures). A passage that has no
vector yet is found by its words: vectors are made as searches go on, for a few seconds each time, the newest passages
first, or all at once by `embed`.
"""

from __future__ import annotations

import time
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from lyra_emergence.journal import search
from lyra_emergence.journal.filters import Filter, Those
from lyra_emergence.journal.fusion import fuse
from lyra_emergence.journal.splitting import described
from lyra_emergence.journal.word_search import ByWords, WordSearch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lyra_emergence.journal.embeddings import EmbeddingModel
    from lyra_emergence.journal.periods import Asked
    from lyra_emergence.journal.store import Store
    from lyra_emergence.journal.vectors import VectorSearch

__all__ = ["POOL", "Retrieval"]

POOL: Final = 64
"""Passages that each way brings."""
_DATE_BONUS: Final = 6.0
"""Added to a BM25 score for a day that is meant: about what two rare words that match are worth."""
_COSINE_BONUS: Final = 0.3
"""The same for a cosine."""
_MIN_COSINE: Final = 0.25
"""Least cosine of a passage that counts as a match: MiniLM gives unrelated ones about 0.0 to 0.2."""
_EMBEDDING_SECONDS: Final = 3.0
_EMBEDDING_BATCH: Final = 32


class Retrieval:
    """Finds passages of a store.

    Attributes:
        embedding: The embedding model, or None: by words alone.

    Args:
        store: The passages.
        embedding: The embedding model; dropped with a note where it cannot be used.
        note: Called with what the user should know.
    """

    def __init__(self, store: Store, embedding: EmbeddingModel | None, note: Callable[[str], None]) -> None:
        self.embedding = embedding
        self._store = store
        self._note = note
        self._said_missing = False
        self._words = WordSearch(store)
        self.use_model()

    def use_model(self) -> None:
        """Have the store keep vectors of the model; called again after the store was made anew."""
        if self.embedding is not None:
            self._store.use_model(self.embedding.files.identity)

    def candidates(self, asked: Asked, kept: Filter) -> list[tuple[int, float]]:
        """Return the passages worth considering with their scores, best first."""
        telling = search.terms(asked.text)
        meant = self.meant(asked, kept)
        by_words = self.by_words(telling, kept, meant)
        by_meaning = self.by_meaning(asked.topic, kept, meant) if telling else {}
        if not by_meaning:
            lifted = dict.fromkeys(self._dated(meant), _DATE_BONUS)
            return self.ordered(lifted | {row: found.score for row, found in by_words.items()})
        words = [(row, by_words[row].coverage ** 2) for row, _ in self.ordered(_scores(by_words))]
        meanings = [(row, 1.0) for row, _ in self.ordered(by_meaning)]
        return self.ordered(fuse((words, meanings)))

    def meant(self, asked: Asked, kept: Filter) -> Filter | None:
        """Return the filter for the days that the question means, or None where it names none."""
        return kept.within(asked.periods) if asked.periods else None

    def lifted(self, asked: Asked, rows: Iterable[int]) -> set[int]:
        """Return which of the passages are of a day that the question means."""
        spans = [(period.first.toordinal(), period.last.toordinal()) for period in asked.periods]
        days = dict(self.rows_of("number, day", rows))
        return {row for row, day in days.items() if any(first <= day <= last for first, last in spans)}

    def ordered(self, scores: dict[int, float]) -> list[tuple[int, float]]:
        """Return rows by score; where two are equal, the newer comes first."""
        moments = dict(self.rows_of("number, moment", scores))
        known = [(row, score) for row, score in scores.items() if row in moments]
        return sorted(known, key=lambda item: (-item[1], -moments[item[0]], -item[0]))

    def rows_of(self, columns: str, rows: Iterable[int]) -> list[Any]:
        """Return columns of the passages with these numbers, in any order."""
        wanted = list(rows)
        marks = ",".join("?" * len(wanted))
        return self._store.rows(f"SELECT {columns} FROM passages WHERE number IN ({marks})", wanted)  # noqa: S608

    def _dated(self, meant: Filter | None) -> list[int]:
        """Return the newest passages of the days that are meant."""
        if meant is None:
            return []
        condition, values = meant.condition()
        statement = f"SELECT number FROM passages WHERE {condition} ORDER BY moment DESC, number DESC LIMIT ?"  # noqa: S608
        return [row for (row,) in self._store.rows(statement, (*values, POOL))]

    def by_words(self, telling: tuple[str, ...], kept: Filter, meant: Filter | None) -> dict[int, ByWords]:
        """Return passages that have some of the words."""
        return self._words.rank(telling, POOL, kept, meant, _DATE_BONUS)

    def by_meaning(self, text: str, kept: Filter, meant: Filter | None) -> dict[int, float]:
        """Return passages with their cosines; none where there is no model that can be used."""
        left = self.embed(_EMBEDDING_SECONDS)
        vectors = self._embedded([text]) if self.embedding is not None else None
        if vectors is None:
            return {}
        self._mention_missing(left)
        found = dict(self._vectors.nearest(vectors[0], POOL, self._those(kept)))
        found = {row: cosine for row, cosine in found.items() if cosine >= _MIN_COSINE}
        if meant is None:
            return found
        within = self._vectors.nearest(vectors[0], POOL, self._those(meant))
        dated = dict.fromkeys(self._dated(meant), _COSINE_BONUS)
        return found | dated | {row: cosine + _COSINE_BONUS for row, cosine in within}

    def _those(self, kept: Filter) -> Those:
        """Return the passages that a filter keeps, as the vectors are asked for them."""
        tagged = None
        if kept.tags:
            condition, values = Filter(tags=kept.tags).condition()
            rows = self._store.rows(f"SELECT number FROM passages WHERE {condition}", values)  # noqa: S608
            tagged = [row for (row,) in rows]
        return Those(kept.days, tagged)

    def _mention_missing(self, left: int) -> None:
        if left and not self._said_missing:
            self._said_missing = True
            total = self._store.count("passages")
            self._note(
                f"{total - left} of {total} passages have a vector so far, the others are found by words; "
                "lyra.py journal index makes the rest"
            )

    def embed(self, seconds: float | None = None, on_progress: Callable[[int, int], None] | None = None) -> int:
        """Make the vectors that passages lack and return how many still do.

        Args:
            seconds: When to stop, after the batch that is being made; None for when all are made.
            on_progress: Called after each batch with passages done and passages in all.
        """
        end = time.monotonic() + (float("inf") if seconds is None else seconds)
        while self.embedding is not None and time.monotonic() < end:
            batch = self._store.pending(_EMBEDDING_BATCH)
            if not batch or not self._embed_batch(batch):
                break
            if on_progress is not None:
                total = self._store.count("passages")
                on_progress(total - self._store.count("pending"), total)
        return self._store.count("pending")

    def _embed_batch(self, batch: list[tuple[int, str, str]]) -> bool:
        vectors = self._embedded([described(title, text) for _, title, text in batch])
        if vectors is None or self.embedding is None:
            return False
        from lyra_emergence.journal.vectors import pack

        rows = ((number, code, vector) for (number, *_), (code, vector) in zip(batch, pack(vectors), strict=True))
        self._store.put_vectors(self.embedding.files.identity, rows)
        return True

    def _embedded(self, texts: list[str]) -> Any:
        """Return the vectors of `texts`, (texts, dimension), or None where the model cannot be used."""
        if self.embedding is None:
            return None
        try:
            return self.embedding.sentences(texts)
        except Exception as exc:  # noqa: BLE001  # whatever is wrong with a model's files, the search answers
            name, self.embedding = self.embedding.files.name, None
            self._note(f"the search goes by words alone, without {name}: {exc}")
            return None

    @cached_property
    def _vectors(self) -> VectorSearch:
        from lyra_emergence.journal.vectors import VectorSearch

        return VectorSearch(self._store)


def _scores(by_words: dict[int, ByWords]) -> dict[int, float]:
    return {row: found.score for row, found in by_words.items()}
