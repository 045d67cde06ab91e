"""Conversations on disk: private, whole after a kill, and never in the way of the conversation itself."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lyra_emergence.chat import Answer, ChatSession, Source, Turn
from lyra_emergence.chunks import GenerationStats
from lyra_emergence.conversations import ConversationStore, open_store, turn_as_data, turn_from_data
from lyra_emergence.errors import ConversationError
from lyra_emergence.private_files import data_folder, private_file, write_new

from .test_chat import Script, ask, index, session

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
SOURCE = Source(1, "a", "2025-03-02", "Garden plans", "We planted a lemon tree.", cited=True)
STATS = GenerationStats(30, 6, 0.5, 0.25, reused_tokens=10)
TURN = Turn("Where is the lemon tree?", Answer("By the wall [1]. 日本", (SOURCE,), (), "stop", STATS, ("a note",)))


@pytest.fixture
def problems() -> list[str]:
    return []


@pytest.fixture
def store(problems: list[str]) -> Iterator[ConversationStore]:
    opened = open_store(problems.append)
    assert opened is not None
    with opened:
        yield opened


def keep(store: ConversationStore, *turns: Turn) -> str:
    log = store.begin("m", "j.json")
    for at, turn in enumerate(turns):
        log.begin(turn.question, turn.answer.sources, at)
        log.finish(turn)
    return log.id


def test_a_conversation_comes_back_as_it_was(store: ConversationStore) -> None:
    other = replace(TURN, question="  Why there?\nTell me. ")
    identifier = keep(store, TURN, other)
    (found,) = store.latest()
    assert (found.id, found.model, found.journal, found.system) == (identifier, "m", "j.json", None)
    assert (found.title, found.count) == ("Where is the lemon tree?", 2)
    assert store.turns(found) == [TURN, other]


def test_the_file_and_its_folder_are_private(store: ConversationStore) -> None:
    keep(store, TURN)
    path = data_folder() / "conversations.db"
    assert store.path == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_journal_file_of_a_transaction_is_private_too(store: ConversationStore) -> None:
    database = sqlite3.connect(store.path)
    database.execute("INSERT INTO conversations VALUES ('x', '', '', 'm', NULL, NULL)")
    database.execute("UPDATE conversations SET model = 'n'")
    journal = store.path.with_name("conversations.db-journal")
    assert stat.S_IMODE(journal.stat().st_mode) == 0o600
    database.rollback()
    database.close()


def test_a_conversation_without_an_answer_is_none(store: ConversationStore) -> None:
    log = store.begin("m", None)
    log.begin("Anyone?", (), 0)
    assert store.latest() == []


def test_what_is_taken_back_or_answered_anew_is_withdrawn_and_not_deleted(store: ConversationStore) -> None:
    script = Script([["One."], ["Two."], ["Three."], ["Four."]])
    chat = session(script, log=store.begin("m", None))
    ask(chat, "First?")
    ask(chat, "Second?")
    chat.undo()
    ask(chat, "Third?")
    (*_, last) = chat.again()
    assert last.answer is not None
    (found,) = store.latest()
    assert [(turn.question, turn.answer.text) for turn in store.turns(found)] == [
        ("First?", "One."),
        ("Third?", "Four."),
    ]
    with sqlite3.connect(store.path) as database:
        kept = database.execute("SELECT answer, withdrawn FROM turns ORDER BY id").fetchall()
    database.close()
    assert kept == [("One.", 0), ("Two.", 1), ("Three.", 1), ("Four.", 0)]


def test_an_answer_that_fails_leaves_the_old_one(store: ConversationStore) -> None:
    chat = session(Script([["One."], ["Tw", MemoryError("no room")]]), log=store.begin("m", None))
    ask(chat, "First?")
    with pytest.raises(MemoryError):
        list(chat.again())
    (found,) = store.latest()
    assert [turn.answer.text for turn in store.turns(found)] == ["One."]
    assert [turn.answer.text for turn in chat.turns] == ["One."]


def test_going_on_with_a_conversation(store: ConversationStore) -> None:
    keep(store, TURN)
    (found,) = store.latest()
    script = Script([["Yes."], ["No."]])
    chat = session(script, log=store.reopen(found), turns=store.turns(found))
    ask(chat, "Certain?")
    assert "<|user|>Where is the lemon tree?<|end|><|assistant|>By the wall. 日本" in script.prompts[0]
    list(chat.again())
    (found,) = store.latest()
    assert [turn.answer.text for turn in store.turns(found)] == ["By the wall [1]. 日本", "No."]


def test_a_system_message_is_kept(store: ConversationStore) -> None:
    script = Script([["One."], ["Two."]])
    chat = session(script, log=store.begin("m", None))
    ask(chat, "First?")
    chat.system = "Be brief."
    ask(chat, "Second?")
    assert script.prompts[1].startswith("<|system|>Be brief.<|end|>")
    assert store.latest()[0].system == "Be brief."


def test_clearing_begins_another_one(store: ConversationStore) -> None:
    chat = session(Script([["One."], ["Two."]]), log=store.begin("m", None))
    ask(chat, "First?")
    chat.clear(store.begin("m", None))
    ask(chat, "Second?")
    assert [found.title for found in store.latest(5)] == ["Second?", "First?"]


def test_a_conversation_is_found_by_the_beginning_of_its_id(store: ConversationStore) -> None:
    first, second = keep(store, TURN), keep(store, TURN)
    assert store.find(first).id == first
    assert store.find(second[:-1] if second[:-1] != first[:-1] else second).id == second
    with pytest.raises(ConversationError, match=r"^2 conversations begin with 20$"):
        store.find("20")
    for wrong in ["no-such", "%", "_" * len(first)]:
        with pytest.raises(ConversationError, match=r"^there is no conversation "):
            store.find(wrong)


def test_a_kill_in_the_middle_of_an_answer_keeps_what_came(store: ConversationStore) -> None:
    keep(store, TURN)
    code = """
import sys, time
from lyra_emergence.conversations import open_store
store = open_store(print)
log = store.begin("m", None)
log.begin("A long one?", (), 0)
text = ""
while True:
    text += "word "
    log.progress(text)
    print(len(text), flush=True)
    time.sleep(0.01)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stdout is not None
        began = time.monotonic()
        for _ in child.stdout:
            if time.monotonic() - began > 1.5:
                break
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    found = store.latest(5)
    assert [one.title for one in found] == ["A long one?", "Where is the lemon tree?"]
    (turn,) = store.turns(found[0])
    assert turn.answer.text.startswith("word word")
    assert turn.answer.finish_reason == "interrupted"


def test_a_kill_at_any_moment_leaves_a_whole_file(store: ConversationStore) -> None:
    code = """
import sys
from lyra_emergence.conversations import open_store
from lyra_emergence.chat import Turn, Answer
store = open_store(print)
print("ready", flush=True)
while True:
    log = store.begin("m", None)
    for at in range(3):
        log.begin(f"Question {at}?", (), at)
        log.finish(Turn(f"Question {at}?", Answer(f"Answer {at}.", (), (), "stop", None)))
"""
    for round_ in range(8):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            time.sleep(0.02 + 0.013 * round_)
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
    database = sqlite3.connect(store.path)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
    found = store.latest(10_000)
    assert found
    for one in found:
        answers = [turn.answer.text for turn in store.turns(one)]
        assert answers == [f"Answer {at}." for at in range(len(answers))]
    keep(store, TURN)
    assert store.turns(store.latest()[0]) == [TURN]


def test_two_processes_may_write(store: ConversationStore, problems: list[str]) -> None:
    other = ConversationStore(store.path, problems.append)
    for _ in range(5):
        keep(store, TURN)
        keep(other, TURN)
    other.close()
    assert len(store.latest(100)) == 10
    assert problems == []


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_damaged_file_is_put_aside_and_a_new_one_begun(problems: list[str], content: bytes) -> None:
    path = private_file("conversations.db")
    path.write_bytes(content)
    store = open_store(problems.append)
    assert store is not None
    with store:
        keep(store, TURN)
        assert len(store.latest(5)) == 1
    (aside,) = path.parent.glob("conversations.db.damaged-*")
    assert aside.read_bytes() == content
    assert problems[0].startswith(f"{path} is damaged (file is not a database): it is now {aside}, and a new file")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_of_a_newer_version_is_left_alone(problems: list[str]) -> None:
    path = private_file("conversations.db")
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 2")
    database.close()
    before = path.read_bytes()
    assert open_store(problems.append) is None
    assert problems == [f"conversations are not kept: {path} was written by a newer version of Lyra"]
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_said(home: Path, problems: list[str]) -> None:
    (home / ".local").mkdir()
    (home / ".local" / "share").write_text("a file")
    assert open_store(problems.append) is None
    assert problems == ["conversations are not kept: Not a directory"]


def test_a_failure_to_write_is_told_once_and_the_conversation_goes_on(
    store: ConversationStore, problems: list[str]
) -> None:
    chat = session(Script([["One."], ["Two."]]), log=store.begin("m", None))
    ask(chat, "First?")
    with sqlite3.connect(store.path) as database:
        database.execute("DROP TABLE turns")
    database.close()
    ask(chat, "Second?")
    chat.undo()
    assert problems == ["the conversation is no longer kept: no such table: turns"]
    assert [turn.question for turn in chat.turns] == ["First?"]


def test_a_turn_as_json() -> None:
    assert turn_from_data(turn_as_data(TURN)) == TURN
    for wrong in [None, {}, {**turn_as_data(TURN), "sources": [{"a": 1}]}, {**turn_as_data(TURN), "answer": 3}]:
        with pytest.raises(ValueError, match=r"^no turn of a conversation: "):
            turn_from_data(wrong)


def test_answering_again_needs_a_question_and_keeps_the_old_answer_until_a_word_is_there() -> None:
    chat = session(Script([["One."], ["  ", "Two."], ["  ", "Three."]]), index("Heron."))
    with pytest.raises(Exception, match=r"^there is no question to answer again$"):
        chat.again()
    ask(chat, "First?")
    chat.again().close()
    stream = chat.again()
    assert [turn.answer.text for turn in chat.turns] == ["One."]
    assert next(stream).text == "Two."
    stream.close()
    assert [turn.answer.text for turn in chat.turns] == ["Two."]


def test_a_new_file_is_private_and_never_replaces_another(tmp_path: Path) -> None:
    write_new(tmp_path / "a", "text")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", "other")
    assert (tmp_path / "a").read_text() == "text"


def test_a_session_that_keeps_nothing_writes_nothing(home: Path) -> None:
    assert isinstance(session(Script([["One."]])), ChatSession)
    ask(session(Script([["One."]])), "First?")
    assert not (home / ".local").exists()
