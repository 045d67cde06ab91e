"""An index over the passages of a journal: by words, by meaning where there is an embedding model, and by dates.

Each way ranks passages by itself, those of a day that the question means being lifted in each; reciprocal-rank fusion
makes one order of them, and a reranker, if there is one, looks at the first of it. An entry stands for its best
passage. Without an embedding model the words' order stays.
"""

from __future__ import annotations

import copy
import sqlite3
import threading
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Final, TypeVar

from lyra_emergence.errors import JournalError
from lyra_emergence.journal import search
from lyra_emergence.journal.entries import Journal, JournalEntry
from lyra_emergence.journal.filters import Filter
from lyra_emergence.journal.periods import anchor_for, read_question
from lyra_emergence.journal.retrieval import Retrieval
from lyra_emergence.journal.search import Hit
from lyra_emergence.journal.splitting import PLAIN, described
from lyra_emergence.journal.store import Store, is_damage
from lyra_emergence.journal.text import PASSAGE_LENGTH, passages
from lyra_emergence.journal.word_search import closest_part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from lyra_emergence.journal.embeddings import EmbeddingModel
    from lyra_emergence.journal.periods import Asked, Period
    from lyra_emergence.journal.rerank import Reranker
    from lyra_emergence.journal.splitting import Splitter

__all__ = ["Found", "JournalIndex", "index_unusable"]


_T = TypeVar("_T")
_RERANKED: Final = 32
"""Passages that a reranker looks at: it takes some milliseconds for each."""


def index_unusable(path: Path | None, error: Exception) -> JournalError:
    """Return the error for an index that can be neither read nor written."""
    return JournalError(
        f"the journal's index {path or 'in memory'} cannot be used: {error}",
        hint="check free space and permissions; the file may be removed, it is made anew from the journal",
    )


@dataclass(frozen=True, slots=True)
class Found:
    """What a search brought.

    Attributes:
        hits: The entries, best first.
        said: What was understood of the question's dates, and of what there is nothing, a line each.
    """

    hits: tuple[Hit, ...]
    said: tuple[str, ...] = ()


class JournalIndex:
    """A journal, searchable.

    It may be searched from several threads, one at a time.

    Attributes:
        passage_length: Characters of a passage that is shown, at most.
        store: The tables behind it.

    Args:
        journal: What to index; not needed where `store` holds it already.
        reranker: Reorders what a search finds.
        on_note: Called with each note as it arises.
        passage_length: See the attribute.
        embedding: The embedding model, or None to search by words.
        store: What keeps the index; in memory by default.
        path: The journal's path, where `journal` is not given.
        splitter: How entries become passages.
        refill: Fills a store that was found damaged and is empty now.
        today: Returns the day on which it is asked.
    """

    def __init__(
        self,
        journal: Journal | None = None,
        *,
        reranker: Reranker | None = None,
        on_note: Callable[[str], None] | None = None,
        passage_length: int = PASSAGE_LENGTH,
        embedding: EmbeddingModel | None = None,
        store: Store | None = None,
        path: Path | None = None,
        splitter: Splitter = PLAIN,
        refill: Callable[[Store], None] | None = None,
        today: Callable[[], date] | None = None,
    ) -> None:
        self._path = journal.path if journal is not None else path
        self._reranker = reranker
        self._on_note = on_note
        self._notes: list[str] = []
        self._lock = threading.RLock()
        self.passage_length = passage_length
        self._today = today or (lambda: datetime.now().astimezone().date())
        self._splitter = splitter
        self._refill = refill
        self.store = store or Store()
        if store is None and journal is not None:
            self.store.sync(journal.entries, splitter)
        if journal is not None:
            self.journal = journal
        self._retrieval = Retrieval(self.store, embedding, self.note)

    @cached_property
    def journal(self) -> Journal:
        """What is indexed."""
        import json

        assert self._path is not None
        return Journal(self._path, self.store.entries(), tuple(json.loads(self.store.fact("problems") or "[]")))

    @property
    def entries(self) -> tuple[JournalEntry, ...]:
        """The entries, oldest first."""
        return self.journal.entries

    @property
    def path(self) -> Path:
        """Where the journal lies."""
        assert self._path is not None
        return self._path

    @property
    def count(self) -> int:
        """How many entries there are."""
        return self.store.count("entries")

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about this journal, a line each: problems in the file, how it is reranked."""
        return tuple(self._notes)

    @property
    def embedding(self) -> EmbeddingModel | None:
        """The embedding model that searches use, or None."""
        return self._retrieval.embedding

    def with_passages(self, length: int, *, by_words: bool = False) -> JournalIndex:
        """Return an index that shows at most `length` characters of a passage; it shares all else with this one.

        Args:
            length: Characters.
            by_words: Whether it searches by words alone.
        """
        index = copy.copy(self)
        index.passage_length = length
        if by_words:
            index._retrieval = Retrieval(self.store, None, self.note)  # noqa: SLF001 - its own class
        return index

    def note(self, line: str) -> None:
        """Add a line to `notes` and hand it to `on_note`."""
        self._notes.append(line)
        if self._on_note is not None:
            self._on_note(line)

    def keep_within(self, room: int) -> None:
        """Let the embedding model take no more than `room` bytes of main memory: what the language model leaves."""
        if self.embedding is not None:
            self.embedding.room = room

    def close(self) -> None:
        """Free the index; searching it afterward is an error."""
        self.store.close()

    def search(self, question: str, limit: int = 4) -> tuple[Hit, ...]:
        """Return the entries that match `question` best, best first, `limit` at most; none if nothing matches."""
        return self.find(question, limit).hits

    def find(
        self,
        question: str,
        limit: int = 4,
        *,
        since: date | None = None,
        until: date | None = None,
        tags: Iterable[str] = (),
    ) -> Found:
        """Search as `search` does, and say what was understood.

        Args:
            question: What to look for.
            limit: The most entries to return.
            since: The first day to look at.
            until: The last.
            tags: Tags that an entry must have, all of them, in any case.
        """
        kept = Filter.asked(since, until, tags)
        return self._mended(lambda: self._find(question, limit, kept))

    def _find(self, question: str, limit: int, kept: Filter) -> Found:
        with self._lock:
            asked = read_question(question, anchor_for(self._newest(), self._today()), self._has_entries)
            scored = self._reranked(asked, self._retrieval.candidates(asked, kept))
            hits = self._hits(scored, search.terms(asked.text), limit)
        return Found(hits, tuple(self._said(asked.periods)))

    def latest(self, limit: int = 4) -> tuple[Hit, ...]:
        """Return the newest entries, newest first, `limit` at most, each with the beginning of its text."""
        if limit < 1:
            return ()
        newest = self._mended(lambda: self.store.entries(newest_first=True, limit=limit))
        return tuple(Hit(entry, 0.0, next(iter(passages(entry.text, self.passage_length)), "")) for entry in newest)

    def _mended(self, step: Callable[[], _T]) -> _T:
        """Return what `step` returns; an index that is damaged is built anew for it, once.

        Raises:
            JournalError: The index cannot be used.
        """
        try:
            return step()
        except sqlite3.Error as exc:
            if self._refill is None or not is_damage(exc):
                raise index_unusable(self.store.path, exc) from exc
        self.note("the journal's index was damaged and is built anew")
        try:
            self.store.start_over()
            self._refill(self.store)
            self._retrieval.use_model()
            return step()
        except (sqlite3.Error, OSError) as exc:
            raise index_unusable(self.store.path, exc) from exc

    def add(self, entry: JournalEntry) -> None:
        """Index one more entry; its vector is made by the next search.

        Raises:
            JournalError: The index cannot be written; it is as it was.
        """
        with self._lock:
            try:
                self.store.add(entry, self._splitter)
            except sqlite3.Error as exc:
                raise index_unusable(self.store.path, exc) from exc
            self.__dict__.pop("journal", None)

    def embed(self, seconds: float | None = None, on_progress: Callable[[int, int], None] | None = None) -> int:
        """Make the vectors that passages lack, as `Retrieval.embed` does, and return how many still do."""
        return self._mended(lambda: self._retrieval.embed(seconds, on_progress))

    def _newest(self) -> date | None:
        day = self.store.value("SELECT max(day) FROM passages")
        return None if day is None else date.fromordinal(day)

    def _has_entries(self, first: date, last: date) -> bool:
        statement = "SELECT 1 FROM passages WHERE day BETWEEN ? AND ? LIMIT 1"
        return bool(self.store.rows(statement, (first.toordinal(), last.toordinal())))

    def _said(self, periods: tuple[Period, ...]) -> Iterable[str]:
        for period in periods:
            if period.said:
                none = "" if self._has_entries(period.first, period.last) else "; no entry is of then"
                yield period.said + none

    def _reranked(self, asked: Asked, candidates: list[tuple[int, float]]) -> list[tuple[int, float]]:
        if self._reranker is None or len(candidates) < 2:  # noqa: PLR2004
            return candidates
        rows = [row for row, _ in candidates][:_RERANKED]
        texts = self._texts(rows)
        rows = [row for row in rows if row in texts]
        try:
            scores = self._reranker.score(asked.topic, [described(*texts[row]) for row in rows])
        except Exception as exc:  # noqa: BLE001  # whatever is wrong with a model's files, the search answers
            name, self._reranker = self._reranker.name, None
            kind = "words" if self.embedding is None else "search"
            self.note(f"reranking with {name} failed, so the order is that of the {kind}: {exc}")
            return candidates
        lifted, lift = self._retrieval.lifted(asked, rows), self._reranker.date_lift
        scored = zip(rows, scores, strict=True)
        return self._retrieval.ordered({row: score + lift * (row in lifted) for row, score in scored})

    def _texts(self, rows: list[int]) -> dict[int, tuple[str, str]]:
        """Return title and text of each passage that is there."""
        marks = ",".join("?" * len(rows))
        found = self.store.rows(f"SELECT rowid, title, body FROM words WHERE rowid IN ({marks})", rows)  # noqa: S608
        return {row: (title, body) for row, title, body in found}

    def _hits(self, scored: list[tuple[int, float]], telling: tuple[str, ...], limit: int) -> tuple[Hit, ...]:
        owners = dict(self._retrieval.rows_of("number, entry", [row for row, _ in scored]))
        best: dict[int, tuple[int, float]] = {}
        for row, score in scored:
            if row in owners and (owners[row] in best or len(best) < limit):
                best.setdefault(owners[row], (row, score))
        marks = ",".join("?" * len(best))
        numbers = self.store.rows(f"SELECT number, id FROM entries WHERE number IN ({marks})", list(best))  # noqa: S608
        entries = {entry.id: entry for entry in self.store.entries(f"number IN ({marks})", list(best))}
        owned = {number: entries[name] for number, name in numbers if name in entries}
        texts = self._texts([row for row, _ in best.values()])
        return tuple(
            Hit(owned[number], score, self._shown(texts[row][1], telling))
            for number, (row, score) in best.items()
            if number in owned and row in texts
        )

    def _shown(self, passage: str, telling: tuple[str, ...]) -> str:
        return (
            passage
            if len(passage) <= self.passage_length
            else closest_part(passages(passage, self.passage_length), telling)
        )
