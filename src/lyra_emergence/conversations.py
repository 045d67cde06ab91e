"""Conversations, kept in one SQLite file of the user's data folder that only its owner can read.

A question is written when its answer begins, the answer about every second while it comes and once at its end, each
time in a transaction that is on the disk before it counts as done. So a `kill -9` or a power cut loses a second of an
answer at most. Nothing is deleted: what was taken back or answered anew stays in the file, marked as withdrawn. A file
that is no database (any more) is put aside under another name, and a new one begun. Two processes may write: each waits
for the other.

Where the file cannot be used, a conversation goes on without being kept; `ConversationLog.on_problem` is told once.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Self

from lyra_emergence.chunks import GenerationStats
from lyra_emergence.errors import ConversationError
from lyra_emergence.private_files import private_file
from lyra_emergence.turns import Answer, Source, Turn, citations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

__all__ = ["Conversation", "ConversationLog", "ConversationStore", "open_store", "turn_as_data", "turn_from_data"]

FILE_NAME: Final = "conversations.db"
_VERSION: Final = 1
_WAIT_SECONDS: Final = 5.0
"""How long a write waits for another process."""
_PROGRESS_SECONDS: Final = 1.0
_TITLE_LENGTH: Final = 60
_FIGURES: Final = ("prompt_tokens", "new_tokens", "prefill_seconds", "decode_seconds", "reused_tokens")
_SCHEMA: Final = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS conversations (
    id TEXT PRIMARY KEY, started TEXT NOT NULL, updated TEXT NOT NULL, model TEXT NOT NULL, journal TEXT, system TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS turns (
    id INTEGER PRIMARY KEY, conversation TEXT NOT NULL REFERENCES conversations(id), asked TEXT NOT NULL,
    question TEXT NOT NULL, answer TEXT NOT NULL DEFAULT '', finish_reason TEXT NOT NULL DEFAULT 'interrupted',
    sources TEXT NOT NULL DEFAULT '[]', stats TEXT, notes TEXT NOT NULL DEFAULT '[]',
    withdrawn INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX IF NOT EXISTS turns_of ON turns(conversation, id);
PRAGMA user_version = {_VERSION};
COMMIT;
"""
_ENSURE: Final = "INSERT INTO conversations VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
_ASK: Final = "INSERT INTO turns (conversation, asked, question, sources) VALUES (?, ?, ?, ?)"
_ANSWER: Final = "UPDATE turns SET answer = ?, finish_reason = ?, sources = ?, stats = ?, notes = ? WHERE id = ?"
_WITHDRAW: Final = "UPDATE turns SET withdrawn = 1 WHERE id = ?"
_SUMMARY: Final = """
SELECT c.id, c.started, c.updated, c.model, c.journal, c.system, t.question, t.n FROM conversations c
JOIN (SELECT conversation, question, min(id), count(*) AS n FROM turns
      WHERE answer != '' AND NOT withdrawn GROUP BY conversation) t ON t.conversation = c.id
"""
_LATEST_FIRST: Final = "ORDER BY c.updated DESC, c.rowid DESC"
_TURNS: Final = """
SELECT question, answer, finish_reason, sources, stats, notes FROM turns
WHERE conversation = ? AND answer != '' AND NOT withdrawn ORDER BY id
"""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation that was kept.

    Attributes:
        id: What `--conversation` and `/load` take; its beginning suffices where it is the only one.
        started: When its first question was asked, as ISO 8601, in UTC.
        updated: When it was last written to.
        model: Who answered.
        journal: The journal's path, or None.
        system: Its system message, or None.
        title: The beginning of its first question.
        count: Turns in it.
    """

    id: str
    started: str
    updated: str
    model: str
    journal: str | None
    system: str | None
    title: str
    count: int


def open_store(on_problem: Callable[[str], None]) -> ConversationStore | None:
    """Open the user's conversations; None, with a line to `on_problem`, where that is not possible."""
    try:
        return ConversationStore(private_file(FILE_NAME), on_problem)
    except (OSError, ConversationError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        on_problem(f"conversations are not kept: {reason}")
        return None


class ConversationStore:
    """All conversations.

    Args:
        path: The file, which must be there; an empty one will do.
        on_problem: Called with a line when a damaged file is put aside, or something can no longer be written.
        mend: Put a damaged file aside and begin a new one; otherwise it is an error.

    Raises:
        ConversationError: The file cannot be used, or a newer version of Lyra wrote it.
    """

    def __init__(self, path: Path, on_problem: Callable[[str], None], *, mend: bool = True) -> None:
        self.path = path
        self._on_problem = on_problem
        try:
            self._database = _connect(path)
        except sqlite3.DatabaseError as error:
            # Busy, read-only, full: nothing is wrong with what the file holds.
            if not mend or isinstance(error, sqlite3.OperationalError):
                raise ConversationError(f"{path}: {error}") from error
            self._database = self._begin_anew(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def begin(self, model: str, journal: str | None, system: str | None = None) -> ConversationLog:
        """Return a new conversation, which is written with its first question."""
        now = datetime.now().astimezone()
        identifier = f"{now:%Y-%m-%d}-{secrets.token_hex(2)}"
        return ConversationLog(self._database, identifier, (model, journal, system), self._on_problem)

    def reopen(self, conversation: Conversation) -> ConversationLog:
        """Return a log that goes on with `conversation`."""
        known = (conversation.model, conversation.journal, conversation.system)
        with _said():
            rows = self._database.execute(
                "SELECT id FROM turns WHERE conversation = ? AND answer != '' AND NOT withdrawn ORDER BY id",
                (conversation.id,),
            ).fetchall()
        return ConversationLog(self._database, conversation.id, known, self._on_problem, [row[0] for row in rows])

    def latest(self, count: int = 1) -> list[Conversation]:
        """Return the conversations that were written to last, the last one first."""
        with _said():
            rows = self._database.execute(f"{_SUMMARY} {_LATEST_FIRST} LIMIT ?", (count,)).fetchall()
        return [_conversation(row) for row in rows]

    def find(self, identifier: str) -> Conversation:
        """Return the conversation whose id is, or alone begins with, `identifier`.

        Raises:
            ConversationError: There is none, or more than one.
        """
        escaped = identifier.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")
        with _said():
            rows = self._database.execute(
                f"{_SUMMARY} WHERE c.id LIKE ? ESCAPE '\\' {_LATEST_FIRST}", (f"{escaped}%",)
            ).fetchall()
        exact = [row for row in rows if row[0] == identifier]
        if len(exact or rows) == 1:
            return _conversation((exact or rows)[0])
        if rows:
            raise ConversationError(
                f"{len(rows)} conversations begin with {identifier}", hint=f"write more of it, such as {rows[0][0]}"
            )
        raise ConversationError(f"there is no conversation {identifier}", hint="/load in a chat lists the latest")

    def turns(self, conversation: Conversation) -> list[Turn]:
        """Return the turns of a conversation, without those that were taken back."""
        with _said():
            rows = self._database.execute(_TURNS, (conversation.id,)).fetchall()
        return [_turn(row) for row in rows]

    def _begin_anew(self, error: sqlite3.DatabaseError) -> sqlite3.Connection:
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        try:
            self.path.rename(aside)
            database = _connect(private_file(self.path.name))
        except (OSError, sqlite3.Error) as failure:
            raise ConversationError(f"{self.path}: {error}") from failure
        self._on_problem(f"{self.path} is damaged ({error}): it is now {aside}, and a new file was begun")
        return database


class ConversationLog:
    """One conversation as it goes on; a failure to write is told once and ends the keeping, not the conversation.

    Attributes:
        id: Its id.
        kept: Whether it is still being written.
    """

    def __init__(
        self,
        database: sqlite3.Connection,
        identifier: str,
        known: tuple[str, str | None, str | None],
        on_problem: Callable[[str], None],
        rows: list[int] | None = None,
    ) -> None:
        self.id = identifier
        self.kept = True
        self._database = database
        self._model, self._journal, self._system = known
        self._on_problem = on_problem
        self._rows = rows or []
        self._row: tuple[int, int] | None = None
        self._written = 0.0

    def begin(self, question: str, sources: tuple[Source, ...], at: int) -> None:
        """Keep a question whose answer begins.

        Args:
            question: The question.
            sources: The passages that the model is given.
            at: How many turns stand before it; what stood there and behind is withdrawn once the answer is whole.
        """
        now = _now()
        known = (self.id, now, now, self._model, self._journal, self._system)
        found = _dump([asdict(source) for source in sources])
        row = self._write((_ENSURE, known), (_ASK, (self.id, now, question, found)))
        self._row = (row, at)
        self._written = 0.0  # the first word is kept at once

    def progress(self, text: str) -> None:
        """Keep what has come of the answer, if the last time was a second ago."""
        if self._row is not None and time.monotonic() - self._written >= _PROGRESS_SECONDS and text.strip():
            self._written = time.monotonic()
            self._write(("UPDATE turns SET answer = ? WHERE id = ?", (text.rstrip(), self._row[0])))

    def finish(self, turn: Turn) -> None:
        """Keep the whole turn in place of the question alone."""
        if self._row is None:
            return
        (row, at), self._row = self._row, None
        answer = turn.answer
        found = _dump([asdict(source) for source in answer.sources])
        stats = _dump(_figures(answer.stats)) if answer.stats else None
        values = (answer.text, answer.finish_reason, found, stats, _dump(answer.notes), row)
        gone = [(_WITHDRAW, (other,)) for other in self._rows[at:]]
        self._write((_ANSWER, values), *gone, ("UPDATE conversations SET updated = ? WHERE id = ?", (_now(), self.id)))
        self._rows[at:] = [row]

    def adopt(self, turns: Iterable[Turn]) -> None:
        """Keep turns that come from elsewhere as the beginning of this conversation."""
        for at, turn in enumerate(turns):
            self.begin(turn.question, turn.answer.sources, at)
            self.finish(turn)

    def abandon(self) -> None:
        """Mark a question as withdrawn whose answer failed."""
        if self._row is not None:
            (row, _), self._row = self._row, None
            self._write((_WITHDRAW, (row,)))

    def withdraw(self) -> None:
        """Mark the last turn as taken back."""
        if self._rows:
            self._write((_WITHDRAW, (self._rows.pop(),)))

    def set_system(self, text: str | None) -> None:
        """Keep another system message."""
        self._system = text
        self._write(("UPDATE conversations SET system = ? WHERE id = ?", (text, self.id)))

    def _write(self, *statements: tuple[str, tuple[Any, ...]]) -> int:
        """Run statements in one transaction and return the last row's number; after a failure nothing is kept."""
        row = 0
        if not self.kept:
            return row
        try:
            with self._database:
                for statement, values in statements:
                    row = self._database.execute(statement, values).lastrowid or 0
        except sqlite3.Error as error:
            self.kept = False
            self._on_problem(f"the conversation is no longer kept: {error}")
        return row


def turn_as_data(turn: Turn) -> dict[str, Any]:
    """Return a turn as JSON can hold it; `turn_from_data` reads it."""
    answer = turn.answer
    return {
        "question": turn.question,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "sources": [asdict(source) for source in answer.sources],
        "stats": answer.stats and _figures(answer.stats),
        "notes": list(answer.notes),
    }


def turn_from_data(data: Any) -> Turn:
    """Return the turn that `turn_as_data` wrote.

    Raises:
        ValueError: It has another form.
    """
    try:
        sources = tuple(Source(**source) for source in data["sources"])
        stats = GenerationStats(**data["stats"]) if data["stats"] else None
        texts = [data[name] for name in ("question", "answer", "finish_reason")]
        notes = tuple(map(str, data["notes"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"no turn of a conversation: {error}") from error
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("no turn of a conversation: its question or answer is no text")
    question, text, reason = texts
    known = {source.number for source in sources}
    unknown = tuple(number for number in citations(text) if number not in known)
    return Turn(question, Answer(text, sources, unknown, reason, stats, notes))


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=_WAIT_SECONDS)
    try:
        _set_up(database, path)
    except BaseException:
        database.close()
        raise
    return database


def _set_up(database: sqlite3.Connection, path: Path) -> None:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version > _VERSION:
        raise ConversationError(f"{path} was written by a newer version of Lyra", hint="update Lyra")
    # On the disk before a transaction counts as done; SQLite's journal file gets the permissions of this one.
    database.execute("PRAGMA synchronous = FULL")
    if version < _VERSION:
        database.executescript(_SCHEMA)
    database.execute("SELECT count(*) FROM conversations").fetchone()


@contextmanager
def _said() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise ConversationError(f"the conversations cannot be read: {error}") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _figures(stats: GenerationStats) -> dict[str, Any]:
    return {name: getattr(stats, name) for name in _FIGURES}


def _conversation(row: tuple[Any, ...]) -> Conversation:
    identifier, started, updated, model, journal, system, question, count = row
    title = " ".join(question.split())[:_TITLE_LENGTH]
    return Conversation(identifier, started, updated, model, journal, system, title, count)


def _turn(row: tuple[Any, ...]) -> Turn:
    question, answer, reason, sources, stats, notes = row
    try:
        decoded = [json.loads(text) if text else None for text in (sources, stats, notes)]
        data = dict(zip(("sources", "stats", "notes"), decoded, strict=True))
        return turn_from_data({"question": question, "answer": answer, "finish_reason": reason, **data})
    except ValueError as error:
        raise ConversationError(f"a conversation cannot be read: {error}") from error
