"""The index on disk: what is made anew and what stays, other processes, kills, damage."""

from __future__ import annotations

import gc
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from lyra_emergence.errors import JournalError
from lyra_emergence.journal import JournalEntry, open_journal
from lyra_emergence.journal import opening as opening_module
from lyra_emergence.journal.opening import add_and_index
from lyra_emergence.journal.places import index_path
from lyra_emergence.journal.splitting import PLAIN, Splitter, described, split
from lyra_emergence.journal.store import Store
from lyra_emergence.journal.vectors import pack
from lyra_emergence.journal.writing import new_entry

ROOT = Path(__file__).parents[2]
START = datetime(2025, 3, 1)  # noqa: DTZ001  # a journal's times have an offset only where its writer gave one
INDEXING = """
import sys
from lyra_emergence.journal import open_journal
index = open_journal(sys.argv[1])
print("open", index.count, flush=True)
if sys.argv[2] == "embed":
    index.embed(on_progress=lambda done, total: print(done, flush=True))
"""


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the files that tests write as old enough to be known by their times."""
    monkeypatch.setattr(opening_module, "_SETTLED", 0)


def entries(*texts: str) -> list[JournalEntry]:
    return [JournalEntry(str(day), START + timedelta(days=day), text) for day, text in enumerate(texts)]


def write(path: Path, *texts: str) -> Path:
    items = [{"id": e.id, "timestamp": e.timestamp.isoformat(), "text": e.text} for e in entries(*texts)]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def numbers(store: Store) -> dict[str, int]:
    return dict(
        store.rows("SELECT e.id, min(p.number) FROM entries e JOIN passages p ON p.entry = e.number GROUP BY e.id")
    )


def with_vectors(store: Store, model: str = "m") -> None:
    store.use_model(model)
    waiting = store.pending(10_000)
    vectors = np.eye(len(waiting), 384, dtype=np.float32)
    store.put_vectors(model, [(row[0], *packed) for row, packed in zip(waiting, pack(vectors), strict=True)])


def sound(store: Store) -> None:
    """Assert that the tables agree with each other and with SQLite's own checks."""
    assert store.rows("PRAGMA integrity_check") == [("ok",)]
    store.rows("INSERT INTO words(words) VALUES ('integrity-check')")
    passages = {row for (row,) in store.rows("SELECT number FROM passages")}
    assert {row for (row,) in store.rows("SELECT rowid FROM words")} == passages
    pending = {row for (row,) in store.rows("SELECT passage FROM pending")}
    codes = {row for (row,) in store.rows("SELECT passage FROM codes")}
    assert {row for (row,) in store.rows("SELECT passage FROM vectors")} == codes
    assert (codes | pending, codes & pending) == (passages, set())
    owners = {row for (row,) in store.rows("SELECT entry FROM passages UNION SELECT entry FROM labels")}
    assert owners <= {row for (row,) in store.rows("SELECT number FROM entries")}


def test_only_what_changed_is_made_anew_and_what_is_gone_goes(tmp_path: Path) -> None:
    store = Store(tmp_path / "i.sqlite3")
    one, two, three = entries("Rain.", "Sun.", "Snow.")
    assert store.sync([one, two, three], PLAIN) == 3
    with_vectors(store)
    before = numbers(store)
    assert store.sync([one, replace(two, text="Much sun."), entries("", "", "", "Fog.")[3]], PLAIN) == 2
    after = numbers(store)
    assert after["0"] == before["0"]
    assert after["1"] > before["1"]
    assert set(after) == {"0", "1", "3"}
    assert [body for _, _, body in store.pending(9)] == ["Much sun.", "Fog."]
    sound(store)
    assert store.sync([one, replace(two, text="Much sun."), entries("", "", "", "Fog.")[3]], PLAIN) == 0


@pytest.mark.parametrize(
    "change", [{"title": "T"}, {"tags": ("t",)}, {"mood": "m"}, {"timestamp": START}, {"publish": True}]
)
def test_any_field_that_changes_counts(change: dict[str, object]) -> None:
    store = Store()
    (_, entry) = entries("Rain.", "Sun.")
    store.sync([entry], PLAIN)
    assert store.sync([replace(entry, **change)], PLAIN) == 1  # type: ignore[arg-type]


def test_another_splitter_or_model_makes_anew() -> None:
    store = Store()
    store.sync(entries("Rain.", "Sun."), PLAIN)
    with_vectors(store)
    store.use_model("m")
    assert store.count("pending") == 0
    store.use_model("other")
    assert (store.count("pending"), store.count("vectors"), store.count("codes")) == (2, 0, 0)
    with_vectors(store, "other")
    assert store.sync(entries("Rain.", "Sun."), Splitter("new", None, (PLAIN.name,))) == 0
    assert store.sync(entries("Rain.", "Sun."), Splitter("new")) == 2
    assert store.count("pending") == 2


def test_vectors_of_another_model_or_of_passages_that_are_gone_are_not_kept() -> None:
    store = Store()
    store.sync(entries("Rain.", "Sun."), PLAIN)
    store.use_model("m")
    waiting = store.pending(9)
    store.sync(entries("Rain."), PLAIN)
    rows = [(row[0], *packed) for row, packed in zip(waiting, pack(np.eye(2, 384, dtype=np.float32)), strict=True)]
    store.put_vectors("other", rows)
    assert store.count("vectors") == 0
    store.put_vectors("m", rows)
    assert (store.count("vectors"), store.count("pending")) == (1, 0)
    sound(store)


def test_an_error_in_the_middle_undoes_all() -> None:
    store = Store()
    store.sync(entries("Rain."), PLAIN)

    class FailingError(Exception):
        pass

    def failing() -> list[JournalEntry]:
        with store.changing():
            store.add(entries("", "Sun.")[1], PLAIN)
            raise FailingError

    with pytest.raises(FailingError):
        failing()
    assert set(numbers(store)) == {"0"}
    sound(store)


def test_the_index_is_private_and_of_one_file_when_closed(tmp_path: Path) -> None:
    path = write(tmp_path / "j.jsonl", "Rain.")
    open_journal(path).close()
    place = index_path(path)
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    assert [found.name for found in place.parent.iterdir()] == [place.name]


def test_a_journal_that_did_not_change_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "j.jsonl", "Rain.")
    with path.open("a") as file:
        file.write("{oops\n")
    first = open_journal(path)

    def unexpected(path: Path) -> None:
        raise AssertionError(path)

    monkeypatch.setattr(opening_module, "read_journal", unexpected)
    again = open_journal(path)
    assert again.entries == first.entries
    assert again.notes == first.notes
    assert len(again.journal.problems) == 1
    monkeypatch.undo()
    write(path, "Rain.", "Sun.")
    assert [entry.text for entry in open_journal(path).entries] == ["Rain.", "Sun."]


def test_a_file_written_just_now_is_not_trusted_by_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening_module, "_SETTLED", 2 * 10**9)
    path = write(tmp_path / "j.jsonl", "Rain.")
    times = path.stat()
    open_journal(path)
    path.write_text(path.read_text().replace("Rain", "Snow"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [entry.text for entry in open_journal(path).entries] == ["Snow."]


@pytest.mark.parametrize("name", ["j.json", "j.jsonl", "notes"])
def test_adding_through_the_index_needs_no_second_reading(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    opening_module.append(path, (new_entry("Rain.", START),))
    index = open_journal(path)
    add_and_index(index, path, (new_entry("Heron on the jetty.", START),))
    assert index.search("heron")[0].entry.text == "Heron on the jetty."
    assert index.count == len(index.entries) == 2

    def unexpected(path: Path) -> None:
        raise AssertionError(path)

    monkeypatch.setattr(opening_module, "read_journal", unexpected)
    assert open_journal(path).count == 2


def test_adding_after_another_program_changed_the_journal_has_it_read(tmp_path: Path) -> None:
    path = write(tmp_path / "j.jsonl", "Rain.")
    index = open_journal(path)
    write(path, "Rain.", "Sun.")
    add_and_index(index, path, (new_entry("Fog.", START),))
    assert sorted(entry.text for entry in open_journal(path).entries) == ["Fog.", "Rain.", "Sun."]


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: place.write_bytes(b"not a database at all" * 100),
        lambda place: place.write_bytes(b""),
        lambda place: os.truncate(place, place.stat().st_size // 2 // 4096 * 4096),
        lambda place: place.write_bytes(place.read_bytes()[:100] + b"\xff" * (place.stat().st_size - 100)),
    ],
)
def test_a_damaged_index_is_built_anew_when_it_is_opened_or_searched(tmp_path: Path, damage: object) -> None:
    path = write(tmp_path / "j.jsonl", *(f"Heron {number}. " + "Rain again. " * 30 for number in range(200)))
    open_journal(path).close()
    damage(index_path(path))  # type: ignore[operator]
    index = open_journal(path)
    assert len(index.find("heron 7", since=date(2025, 3, 1)).hits) == 4
    assert index.count == 200
    sound(index.store)


def test_damage_under_an_open_index_is_mended_in_the_middle(tmp_path: Path) -> None:
    path = write(tmp_path / "j.jsonl", *(f"Heron {number}. " + "Rain again. " * 30 for number in range(200)))
    open_journal(path).close()
    index = open_journal(path)
    place = index_path(path)
    size = place.stat().st_size
    with place.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    index.store.rows("PRAGMA shrink_memory")
    assert index.search("heron")
    assert index.latest(1)[0].entry.id == "199"
    assert "the journal's index was damaged and is built anew" in index.notes
    sound(index.store)


def test_an_index_of_another_version_is_built_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "j.jsonl", "Rain.")
    open_journal(path).close()
    with sqlite3.connect(index_path(path)) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    index = open_journal(path)
    assert index.notes[0] == "the journal's index was damaged or of another version, and is built anew"
    assert index.search("rain")


def test_without_a_place_for_it_the_index_is_kept_in_memory(tmp_path: Path, home: Path) -> None:
    path = write(tmp_path / "j.jsonl", "Rain.")
    blocked = home / ".local" / "share" / "lyra-emergence"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the folder would be")
    index = open_journal(path)
    assert index.store.path is None
    assert index.notes[0].startswith(f"the journal's index cannot be kept in {blocked / 'indexes'} (")
    assert index.search("rain")


def test_a_full_disk_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    path = write(tmp_path / "j.jsonl", "Rain.")
    index = open_journal(path)
    index.store.rows("PRAGMA max_page_count = 1")
    entry = new_entry("More " * 100_000, START)
    with pytest.raises(JournalError) as caught:
        index.add(entry)
    assert "cannot be used: database or disk is full" in str(caught.value)
    assert set(numbers(index.store)) == {"0"}
    # What is in the journal is added, whatever the index says.
    add_and_index(index, path, (entry,))
    assert index.notes[-1].startswith("the journal has it, but its index could not be brought up to date (")
    assert open_journal(path).count == 2


def indexing(path: Path, how: str = "words") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", INDEXING, str(path), how],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_index_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "j.jsonl", *(f"Heron {number}." for number in range(100)))
    processes = [indexing(path) for _ in range(2)]
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert out.startswith("open 100\n")
    index = open_journal(path)
    sound(index.store)
    assert index.count == 100


def test_a_kill_at_any_moment_leaves_a_sound_index_that_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path / "j.jsonl", *(f"Heron {number}. " + "Rain. " * 40 for number in range(3000)))
    for wait in (0.0, 0.1, 0.2, 0.3):
        process = indexing(path)
        end = time.monotonic() + 30
        # Killed while the file is made, while the words are written, and later.
        while not index_path(path).exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        if index_path(path).exists():
            store = Store(index_path(path))
            assert store.count("entries") in {0, 3000}
            sound(store)
            store.close()
    index = open_journal(path)
    assert index.count == 3000
    sound(index.store)


def test_a_kill_while_embedding_keeps_what_was_embedded(tmp_path: Path) -> None:
    path = write(tmp_path / "j.jsonl", *(f"Heron {number}." for number in range(4000)))
    process = indexing(path, "embed")
    assert process.stdout is not None
    if process.stdout.readline() != "open 4000\n" or not process.stdout.readline():
        process.communicate(timeout=60)
        pytest.skip("there is no embedding model")
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    store = Store(index_path(path))
    assert store.count("vectors") >= 64
    assert store.count("vectors") % 32 == 0
    sound(store)


def test_entries_are_split_within_the_tokens_of_the_model() -> None:
    class Counter:
        limit = 20

        def count(self, text: str) -> int:
            return len(text.split()) + 2

    text = "One two three four five six. " * 60 + "word " * 100 + "日" * 700
    entry = JournalEntry("a", START, text, "A title")
    parts = split(entry, Counter())
    assert all(len(described("A title", part).split()) + 2 <= 20 for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert split(JournalEntry("a", START, "Short."), Counter()) == ("Short.",)


def test_an_index_that_nobody_closed_is_closed_with_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "index.db")
    database = store._database
    del store
    gc.collect()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        database.execute("SELECT 1")
