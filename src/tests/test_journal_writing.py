"""Adding to a journal, importing and exporting, with real files and processes that are killed."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from lyra_emergence.errors import JournalError
from lyra_emergence.journal import JournalEntry, read_journal
from lyra_emergence.journal.writing import add_entry, export_entries, import_journal, new_entry

ROOT = Path(__file__).parents[2]
DAY = datetime(2025, 3, 2, 19, 40)  # noqa: DTZ001  # a journal's times have an offset only where its writer gave one
ADDING = """
import sys
from datetime import datetime
from pathlib import Path
from lyra_emergence.journal.writing import add_entry, new_entry
for number in range(int(sys.argv[3])):
    add_entry(Path(sys.argv[1]), new_entry(f"{sys.argv[2]} {number} " + "and more of it. " * 200, datetime(2025, 3, 2)))
    print(number, flush=True)
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def texts(path: Path) -> list[str]:
    return [entry.text for entry in read_journal(path).entries]


def adding(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ADDING, str(path), name, str(count)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_new_entry_has_an_id_of_day_words_and_content() -> None:
    entry = new_entry("Planted the garlic, all of it.", DAY, tags=["garden"], publish=True)
    assert entry.id.startswith("2025-03-02-planted-the-garlic-all-of-it-")
    assert (entry.tags, entry.publish, entry.timestamp) == (("garden",), True, DAY)
    assert new_entry("Planted the garlic, all of it.", DAY, tags=["garden"]).id == entry.id
    assert new_entry("日本", DAY).id.startswith("2025-03-02-日本-")
    assert new_entry("...", DAY).id.startswith("2025-03-02-")
    with pytest.raises(JournalError, match=r"the entry's text: is empty"):
        new_entry("  ", DAY)


@pytest.mark.parametrize("name", ["j.json", "j.jsonl"])
def test_the_first_entry_makes_a_private_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "deep" / name
    assert add_entry(path, new_entry("Rain.", DAY)) == path
    assert texts(path) == ["Rain."]
    assert mode(path) == 0o600
    assert [found.name for found in path.parent.iterdir()] == [name]


def test_a_json_file_keeps_its_text_and_gets_a_backup(tmp_path: Path) -> None:
    path = tmp_path / "j.json"
    old = '[\n    {"id": "a", "timestamp": "2025-03-01",\t"text": "Sun.", "of_mine": 1.50}\n]\n\n'
    path.write_text(old)
    path.chmod(0o644)
    add_entry(path, new_entry("Rain.", DAY, title="Wet"))
    new = path.read_text()
    assert new.startswith(old[: old.rindex("]")].rstrip() + ",\n")
    assert new.endswith("}\n]\n\n")
    assert texts(path) == ["Sun.", "Rain."]
    backup = tmp_path / "j.json.bak"
    assert backup.read_text() == old
    assert (mode(path), mode(backup)) == (0o600, 0o600)
    add_entry(path, new_entry("Snow.", DAY))
    assert backup.read_text() == new
    assert texts(path) == ["Sun.", "Rain.", "Snow."]


@pytest.mark.parametrize(
    "old",
    [
        '{"entries": [], "title": "mine]"}',
        '{"x": [1, {"entries": [2]}], "entries": [{"id": "a", "timestamp": "2025-03-01", "text": "]}"}], "y": "]"}',
        '  {"entries": 7, "entries": [ ] }  ',
        "[]",
        "",
        "\ufeff[\n]",
    ],
)
def test_entries_go_to_the_end_of_the_list_wherever_it_stands(tmp_path: Path, old: str) -> None:
    path = tmp_path / "j.json"
    path.write_text(old, encoding="utf-8")
    before = texts(path) if old.strip() else []
    add_entry(path, new_entry("Rain.", DAY))
    assert texts(path) == [*before, "Rain."]
    data = json.loads(path.read_text())
    if isinstance(data, dict):
        whole = json.loads(old)
        assert {key: value for key, value in data.items() if key != "entries"} == {
            key: value for key, value in whole.items() if key != "entries"
        }


def test_json_lines_without_an_end_of_line(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text('{"id": "a", "timestamp": "2025-03-01", "text": "Sun."}\n{"torn')
    add_entry(path, new_entry("Rain.", DAY))
    journal = read_journal(path)
    assert [entry.text for entry in journal.entries] == ["Sun.", "Rain."]
    assert len(journal.problems) == 1


def test_a_folder_gets_a_file_for_each_entry(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    first = add_entry(folder, new_entry("Rain.", DAY, title="Wet day"))
    second = add_entry(folder, new_entry("More rain.", DAY, title="Wet day"))
    assert [path.name for path in (first, second)] == ["2025-03-02-wet-day.md", "2025-03-02-wet-day-2.md"]
    assert sorted(texts(folder)) == ["More rain.", "Rain."]
    assert mode(first) == 0o600


def test_a_broken_journal_is_not_written_to(tmp_path: Path) -> None:
    for name, text in (("j.json", "[{oops}]"), ("k.json", '{"a": 1}'), ("m.md", "x")):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(JournalError):
            add_entry(path, new_entry("Rain.", DAY))
        assert path.read_text() == text
        assert not (tmp_path / f"{name}.bak").exists()


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real.jsonl"
    real.write_text("")
    link = tmp_path / "link.jsonl"
    link.symlink_to(real)
    add_entry(link, new_entry("Rain.", DAY))
    assert link.is_symlink()
    assert texts(real) == ["Rain."]


@pytest.mark.parametrize("name", ["j.json", "j.jsonl", "notes"])
def test_two_processes_that_add_at_once_lose_nothing(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    processes = [adding(path, who, 15) for who in ("one", "two")]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    found = texts(path)
    assert len(found) == 30
    assert sorted(text.split(" and")[0] for text in found) == sorted(
        f"{w} {n}" for w in ("one", "two") for n in range(15)
    )


@pytest.mark.parametrize("name", ["j.json", "j.jsonl", "notes"])
def test_a_kill_while_adding_loses_nothing_that_was_said_to_be_added(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    said = 0
    for round_ in range(4):
        process = adding(path, f"round{round_}", 10_000)
        assert process.stdout is not None
        for _ in range(5 + 3 * round_):
            process.stdout.readline()
            said += 1
        time.sleep(0.0007 * round_)
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate(timeout=60)
        said += rest.count("\n")
        journal = read_journal(path)
        assert journal.problems == ()
        assert said <= len(journal.entries) <= said + round_ + 1


def test_import_adds_what_is_new(tmp_path: Path) -> None:
    source = tmp_path / "other.json"
    entries = [
        {"id": "a", "timestamp": "2025-03-01", "text": "Sun."},
        {"id": "b", "timestamp": "2025-03-02", "text": "Rain.", "tags": ["wet"], "publish": True},
        {"id": "c"},
    ]
    source.write_text(json.dumps(entries))
    path = tmp_path / "j.jsonl"
    path.write_text(json.dumps({"id": "a", "timestamp": "2024-01-01", "text": "Old."}) + "\n")
    done = import_journal(path, source)
    assert [entry.id for entry in done.added] == ["a (2)", "b"]
    assert (done.present, len(done.problems)) == (0, 2)
    again = import_journal(path, source)
    assert (again.added, again.present) == ((), 2)
    assert texts(path) == ["Old.", "Sun.", "Rain."]
    assert read_journal(path).entries[2].publish
    assert source.read_text() == json.dumps(entries)


def test_export_writes_markdown_and_overwrites_nothing_unasked(tmp_path: Path) -> None:
    entries = [JournalEntry("a", DAY, "Rain.", "Wet"), JournalEntry("b", DAY, "More.", "Wet")]
    folder = tmp_path / "out"
    done = export_entries(entries, folder)
    assert [path.name for path in done.written] == ["2025-03-02-wet.md", "2025-03-02-wet-2.md"]
    assert {entry.id: entry.text for entry in read_journal(folder).entries} == {"a": "Rain.", "b": "More."}
    assert export_entries(entries, folder).unchanged == done.written
    done.written[0].write_text("mine now")
    with pytest.raises(JournalError) as caught:
        export_entries(entries, folder)
    assert str(caught.value) == f"{done.written[0]} would be overwritten"
    assert done.written[0].read_text() == "mine now"
    assert export_entries(entries, folder, overwrite=True).written == done.written[:1]
    assert sorted(texts(folder)) == ["More.", "Rain."]
