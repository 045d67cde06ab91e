"""One SQLite file: the entries of a journal, their passages for full-text search (FTS5), and the passages' vectors.

Everything in it can be made anew from the journal, so a file that is damaged, or of another version, is dropped and
built again. Changes are made in transactions in write-ahead mode: a process that is killed in the middle leaves what
was there before, a reader sees the one or the other, and a second writer waits. What an entry and the splitter's name
hash to says whether its passages are still good; the splitter is named after its version and the embedding model.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from lyra_emergence.errors import JournalError
from lyra_emergence.journal.entries import JournalEntry
from lyra_emergence.journal.places import PRIVATE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from lyra_emergence.journal.splitting import Splitter

__all__ = ["IN_MEMORY", "Store", "drop", "is_damage"]

IN_MEMORY: Final = None
VERSION: Final = 1
"""Of the tables below; a file of another version is built anew."""
_PATIENCE: Final = 60.0
"""Seconds to wait for another process that writes: the words of 100,000 entries take it a quarter of them."""
_APPLICATION: Final = 0x4C797261  # "Lyra"

_SCHEMA: Final = f"""
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {VERSION};
CREATE TABLE facts(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE entries(
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, timestamp TEXT NOT NULL, moment REAL NOT NULL,
    title TEXT NOT NULL, tags TEXT NOT NULL, mood TEXT NOT NULL, publish INTEGER NOT NULL, text TEXT NOT NULL,
    digest BLOB NOT NULL
);
CREATE INDEX entries_by_moment ON entries(moment, number);
CREATE TABLE labels(tag TEXT NOT NULL, entry INTEGER NOT NULL, PRIMARY KEY(tag, entry)) WITHOUT ROWID;
CREATE TABLE passages(
    number INTEGER PRIMARY KEY AUTOINCREMENT, entry INTEGER NOT NULL, day INTEGER NOT NULL, moment REAL NOT NULL
);
CREATE INDEX passages_by_entry ON passages(entry);
CREATE INDEX passages_by_day ON passages(day);
CREATE VIRTUAL TABLE words USING fts5(title, tags, body, tokenize='porter unicode61 remove_diacritics 2');
CREATE TABLE pending(passage INTEGER PRIMARY KEY);
CREATE TABLE codes(number INTEGER PRIMARY KEY AUTOINCREMENT, passage INTEGER NOT NULL UNIQUE, day INTEGER NOT NULL,
    code BLOB NOT NULL);
CREATE TABLE vectors(passage INTEGER PRIMARY KEY, vector BLOB NOT NULL);
"""
_FORGET: Final = (
    "DELETE FROM words WHERE rowid IN (SELECT number FROM passages WHERE entry = ?)",
    "DELETE FROM vectors WHERE passage IN (SELECT number FROM passages WHERE entry = ?)",
    "DELETE FROM codes WHERE passage IN (SELECT number FROM passages WHERE entry = ?)",
    "DELETE FROM pending WHERE passage IN (SELECT number FROM passages WHERE entry = ?)",
    "DELETE FROM passages WHERE entry = ?",
    "DELETE FROM labels WHERE entry = ?",
    "DELETE FROM entries WHERE number = ?",
)
_COLUMNS: Final = "id, timestamp, text, title, tags, mood, publish"


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether `error` says that the file is damaged, or no index of this version, and not that it is in use."""
    if isinstance(error, sqlite3.OperationalError) and str(error).startswith(("no such table", "no such column")):
        return True
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT}


class Store:
    """The tables of an index, in a file or, where `path` is None, in memory.

    It may be used from several threads; each call is one step.

    Attributes:
        path: The file, or None.

    Raises:
        JournalError: This Python's SQLite has no full-text search.
        sqlite3.Error: The file cannot be opened, or is damaged.
    """

    def __init__(self, path: Path | None = IN_MEMORY) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._open()

    def _open(self) -> None:
        if self.path is not None:
            _make_private(self.path)
        self._database = sqlite3.connect(
            self.path or ":memory:", timeout=_PATIENCE, isolation_level=None, check_same_thread=False
        )
        try:
            self._prepare()
        except BaseException:
            self._database.close()
            raise
        # Who forgets to close it leaves no open file behind; Python 3.13 and later warn of one.
        self._end = weakref.finalize(self, self._database.close)

    def start_over(self) -> None:
        """Drop the file and begin an empty one."""
        with self._lock:
            self._end()
            if self.path is not None:
                drop(self.path)
            self._open()

    def _prepare(self) -> None:
        if self.path is not None:
            self._write_ahead()
            # In write-ahead mode this loses the last transactions in a power cut and never the file's consistency.
            self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute("PRAGMA cache_size = -16384")  # KiB
        if not self._made():  # asked again within the transaction: another process may have been faster
            with self.changing():
                if not self._made():
                    self._create()

    def _write_ahead(self) -> None:
        """Set the mode; SQLite does not wait by itself for another process that is doing so."""
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                self._database.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as exc:
                if is_damage(exc) or time.monotonic() > end:
                    raise
                time.sleep(0.02)
            else:
                return

    def _made(self) -> bool:
        version, application = (self.value(f"PRAGMA {name}") for name in ("user_version", "application_id"))
        if (version, application) == (VERSION, _APPLICATION):
            return True
        if version or application or self.rows("SELECT 1 FROM sqlite_master"):
            raise _other_version()
        return False

    def _create(self) -> None:
        try:
            for statement in _SCHEMA.split(";"):
                self._database.execute(statement)
        except sqlite3.OperationalError as exc:
            if "fts5" not in str(exc):
                raise
            raise JournalError(
                f"this Python's SQLite {sqlite3.sqlite_version} has no full-text search: {exc}",
                hint="use a Python whose SQLite has FTS5, such as the one that uv installs",
            ) from exc

    def close(self) -> None:
        """Close the file; using the store afterward is an error."""
        with self._lock:
            self._end()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Make the changes of the block one transaction, which an error undoes; other writers wait for its end."""
        with self._lock:
            if self._database.in_transaction:
                yield
                return
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                with suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return all rows that `statement` selects."""
        with self._lock:
            return self._database.execute(statement, values).fetchall()

    def value(self, statement: str, values: Sequence[Any] = ()) -> Any:
        """Return the first value of the first row, or None where there is no row."""
        found = self.rows(statement, values)
        return found[0][0] if found else None

    def fact(self, name: str) -> Any:
        """Return what is kept under `name`, or None."""
        return self.value("SELECT value FROM facts WHERE name = ?", (name,))

    def keep(self, **facts: Any) -> None:
        """Keep values under their names."""
        with self.changing():
            self._database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())

    def count(self, table: str) -> int:
        """Return the number of rows of a table."""
        return int(self.value(f"SELECT count(*) FROM {table}"))  # noqa: S608  # one of the names above

    def sync(self, entries: Iterable[JournalEntry], splitter: Splitter) -> int:
        """Make the index that of `entries`, all of the journal's, and return how many of them were new or changed.

        What changed is replaced, what is gone goes, and what stayed the same keeps its passages and vectors.
        """
        with self.changing():
            known = {name: (number, digest) for name, number, digest in self._known()}
            new = []
            for entry in entries:
                number, digest = known.pop(entry.id, (0, b""))
                if not any(digest == _digest(entry, name) for name in splitter.names):
                    new.append((number, entry))
            for number in [number for number, _ in known.values()] + [number for number, _ in new if number]:
                self._forget(number)
            for _, entry in new:
                self._insert(entry, splitter)
            return len(new)

    def add(self, entry: JournalEntry, splitter: Splitter) -> None:
        """Add one entry, in place of one with its id."""
        with self.changing():
            number = self.value("SELECT number FROM entries WHERE id = ?", (entry.id,))
            if number is not None:
                self._forget(number)
            self._insert(entry, splitter)

    def _known(self) -> list[tuple[Any, ...]]:
        return self.rows("SELECT id, number, digest FROM entries")

    def _forget(self, number: int) -> None:
        for statement in _FORGET:
            self._database.execute(statement, (number,))

    def _insert(self, entry: JournalEntry, splitter: Splitter) -> None:
        execute = self._database.execute
        moment, day = entry.moment.timestamp(), entry.timestamp.toordinal()
        number = execute(
            "INSERT INTO entries(id, timestamp, moment, title, tags, mood, publish, text, digest) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*_columns(entry), _digest(entry, splitter.name)),
        ).lastrowid
        for tag in {tag.casefold() for tag in entry.tags}:
            execute("INSERT INTO labels VALUES (?, ?)", (tag, number))
        labels = " ".join((*entry.tags, entry.mood))
        for text in splitter(entry):
            row = execute("INSERT INTO passages(entry, day, moment) VALUES (?, ?, ?)", (number, day, moment)).lastrowid
            execute("INSERT INTO words(rowid, title, tags, body) VALUES (?, ?, ?, ?)", (row, entry.title, labels, text))
            execute("INSERT INTO pending VALUES (?)", (row,))

    def use_model(self, name: str) -> None:
        """Keep vectors of the embedding model called `name` from now on, and drop those of another."""
        if self.fact("model") == name:
            return
        with self.changing():
            for table in ("codes", "vectors", "pending"):
                self._database.execute(f"DELETE FROM {table}")  # noqa: S608
            self._database.execute("INSERT INTO pending SELECT number FROM passages")
            self.keep(model=name)

    def pending(self, limit: int) -> list[tuple[int, str, str]]:
        """Return (number, title, text) of passages that have no vector yet, newest first, `limit` at most."""
        found = self.rows(
            "SELECT rowid, title, body FROM words "
            "WHERE rowid IN (SELECT passage FROM pending ORDER BY passage DESC LIMIT ?)",
            (limit,),
        )
        return [(int(number), title, body) for number, title, body in found]

    def put_vectors(self, model: str, rows: Iterable[tuple[int, bytes, bytes]]) -> None:
        """Keep (passage, code, vector) for each; passages that are gone by now, or another model's, are passed over."""
        with self.changing():
            if self.fact("model") != model:
                return
            for passage, code, vector in rows:
                day = self.value(
                    "SELECT p.day FROM passages p JOIN pending ON passage = p.number WHERE p.number = ?", (passage,)
                )
                if day is None:
                    continue
                self._database.execute("INSERT INTO codes(passage, day, code) VALUES (?, ?, ?)", (passage, day, code))
                self._database.execute("INSERT INTO vectors VALUES (?, ?)", (passage, vector))
                self._database.execute("DELETE FROM pending WHERE passage = ?", (passage,))

    def entries(
        self, where: str = "1", values: Sequence[Any] = (), *, newest_first: bool = False, limit: int = -1
    ) -> tuple[JournalEntry, ...]:
        """Return the entries that an SQL condition holds for, oldest first unless `newest_first`."""
        order = "DESC" if newest_first else "ASC"
        statement = f"SELECT {_COLUMNS} FROM entries WHERE {where} ORDER BY moment {order}, number {order} LIMIT ?"  # noqa: S608
        return tuple(_entry(row) for row in self.rows(statement, (*values, limit)))


def drop(path: Path) -> None:
    """Remove an index's files; a process that has them open keeps what it has."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _other_version() -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError("not an index of this version")
    error.sqlite_errorcode = sqlite3.SQLITE_FORMAT
    return error


def _make_private(path: Path) -> None:
    """Make the file so that nobody else can read it; SQLite's files beside it take its permissions."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, PRIVATE))


def _columns(entry: JournalEntry) -> tuple[Any, ...]:
    moment, tags = entry.moment.timestamp(), json.dumps(entry.tags)
    return entry.id, entry.timestamp.isoformat(), moment, entry.title, tags, entry.mood, entry.publish, entry.text


def _digest(entry: JournalEntry, splitter: str) -> bytes:
    said = (splitter, entry.timestamp.isoformat(), entry.title, entry.tags, entry.mood, entry.publish, entry.text)
    return hashlib.sha256(json.dumps(said).encode()).digest()


def _entry(row: tuple[Any, ...]) -> JournalEntry:
    name, timestamp, text, title, tags, mood, publish = row
    moment = datetime.fromisoformat(timestamp)
    return JournalEntry(name, moment, text, title, tuple(json.loads(tags)), mood, bool(publish))
