"""Opening a journal: read where it changed, indexed where that changed, with the models that are on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lyra_emergence.errors import JournalError
from lyra_emergence.journal.embeddings import EmbeddingModel, TokenCount, find_embedding_files
from lyra_emergence.journal.index import JournalIndex, index_unusable
from lyra_emergence.journal.places import exclusive, index_path
from lyra_emergence.journal.reading import journal_files, read_journal
from lyra_emergence.journal.splitting import PLAIN, SPLITTER, Splitter
from lyra_emergence.journal.store import Store, drop, is_damage
from lyra_emergence.journal.writing import append, naming_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lyra_emergence.journal.embeddings import EmbeddingFiles
    from lyra_emergence.journal.entries import JournalEntry

__all__ = ["add_and_index", "open_journal"]

_SETTLED: Final = 2 * 10**9
"""Nanoseconds after which a file that was written is known by its time: some file systems count in whole seconds."""


def open_journal(
    path: str | Path,
    *,
    rerank: bool = False,
    on_note: Callable[[str], None] | None = None,
    embedding_model: str | None = None,
    rerank_model: str | None = None,
) -> JournalIndex:
    """Open the journal at `path`: a journal that did not change since the last time is not read again.

    The index is kept in the user's data folder. No model is loaded yet.

    Args:
        path: The journal, a file or a folder.
        rerank: Reorder what a search finds with a model on this machine; `notes` says which, or that there is none.
        on_note: Called with each note as it arises.
        embedding_model: Hub id or folder of the embedding model to use if it is on this machine.
        rerank_model: The same of the cross-encoder.

    Raises:
        JournalError: The journal cannot be read, or it has entries and none is valid; or the index cannot be used.
    """
    from lyra_emergence.journal.rerank import find_reranker

    path = Path(path)
    files, reason = find_embedding_files(embedding_model)
    embedding = EmbeddingModel(files) if files is not None else None
    reranker, line = find_reranker(rerank_model, embedding) if rerank else (None, "")
    if not rerank and files is None:
        line = f"the search goes by words alone: {reason}"
    source = _Source(path, _counted(files))
    store, said = source.open()
    index = JournalIndex(
        reranker=reranker,
        on_note=on_note,
        embedding=embedding,
        store=store,
        path=path,
        splitter=source.splitter(store),
        refill=source.fill,
    )
    empty = "" if store.count("entries") else f"{path}: the journal holds no entries yet"
    for note in (said, *json.loads(store.fact("problems") or "[]"), line, empty):
        if note:
            index.note(note)
    return index


def add_and_index(index: JournalIndex, path: Path, entries: Sequence[JournalEntry]) -> list[Path]:
    """Add entries to the journal at `path` and to its index, and return the file of each.

    Raises:
        JournalError: The journal cannot be read or written, or is a single Markdown file; nothing has changed then.
    """
    with exclusive(path), naming_errors(path):
        known = _fingerprint(path)[0] == index.store.fact("fingerprint")
        files = append(path, entries)
        try:
            with index.store.changing():
                for entry in entries:
                    index.add(entry)
                # Only what the index knew before does it know whole now; else the next opening reads the journal.
                index.store.keep(fingerprint=_fingerprint(path)[0] if known else "")
        except (sqlite3.Error, JournalError) as exc:
            index.note(
                f"the journal has it, but its index could not be brought up to date ({exc}); the next search will"
            )
    return files


@dataclass(frozen=True, slots=True)
class _Source:
    """A journal on disk that fills an index.

    Attributes:
        path: The file or folder.
        counted: The splitter of the embedding model at hand, or None.
    """

    path: Path
    counted: Splitter | None

    def splitter(self, store: Store) -> Splitter:
        """Return how to split; without a model, what one's splitter made before is as good."""
        if self.counted is not None:
            return self.counted
        before = store.fact("splitter")
        return Splitter(SPLITTER, None, (before,)) if before and before.startswith(SPLITTER) else PLAIN

    def open(self) -> tuple[Store, str]:
        """Return the journal's index, filled, and a line on it or ""."""
        place = index_path(self.path)
        said = ""
        try:
            try:
                return self._filled(Store(place)), said
            except sqlite3.DatabaseError as exc:
                if not is_damage(exc):
                    raise
            said = "the journal's index was damaged or of another version, and is built anew"
            drop(place)
            return self._filled(Store(place)), said
        except (sqlite3.OperationalError, OSError) as exc:
            said = f"the journal's index cannot be kept in {place.parent} ({exc}), and is built anew each time"
            return self._filled(Store()), said
        except sqlite3.Error as exc:
            raise index_unusable(place, exc) from exc

    def _filled(self, store: Store) -> Store:
        try:
            self.fill(store)
        except BaseException:
            store.close()
            raise
        return store

    def fill(self, store: Store) -> None:
        """Bring an index up to date with the journal."""
        mark, settled = _fingerprint(self.path)
        splitter = self.splitter(store)
        if store.fact("fingerprint") == mark and store.fact("splitter") in splitter.names:
            return
        journal = read_journal(self.path)
        with store.changing():
            store.sync(journal.entries, splitter)
            name = store.fact("splitter") if store.fact("splitter") in splitter.names else splitter.name
            store.keep(fingerprint=mark if settled else "", splitter=name, problems=json.dumps(journal.problems))


def _counted(files: EmbeddingFiles | None) -> Splitter | None:
    if files is None:
        return None
    counter = TokenCount(files.directory)
    return Splitter(f"{SPLITTER}/{counter.limit} {files.identity}", counter)


def _fingerprint(path: Path) -> tuple[str, bool]:
    """Return what tells a journal from a changed one unread, and whether its files are old enough for that."""
    files = journal_files(path) if path.is_dir() else (path,)
    digest, newest = hashlib.sha256(), 0
    for file in files:
        try:
            status = os.stat(file)  # noqa: PTH116  # a path object costs as much as the call
        except OSError:
            return "", False
        newest = max(newest, status.st_mtime_ns)
        said = f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}\n"
        digest.update(said.encode("utf-8", "surrogateescape"))
    return digest.hexdigest(), time.time_ns() - newest > _SETTLED
