"""Reading and checking a journal file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from lyra_emergence.errors import JournalError
from lyra_emergence.journal import entries as entries_module
from lyra_emergence.journal import read_journal

FORMS = "write it like '2025-03-02' or '2025-03-02T19:40:00Z'"
NOTHING_VALID = """\
journal.json: its only entry is not valid
  journal.json: entry 1 (id 'a'): timestamp: is missing
  journal.json: entry 1 (id 'a'): text: is missing"""
Write = Callable[[Any], Path]
SAMPLE = Path(__file__).parents[2] / "data" / "journal" / "sample.json"


@pytest.fixture
def journal_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return a function that writes "journal.json" to the current folder, so that error texts are short."""
    monkeypatch.chdir(tmp_path)

    def write(data: Any) -> Path:
        path = Path("journal.json")
        path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        return path

    return write


def entry(**fields: Any) -> dict[str, Any]:
    return {"id": "a", "timestamp": "2025-03-02", "text": "Rain."} | fields


def test_the_sample_is_valid_and_in_order() -> None:
    journal = read_journal(SAMPLE)
    assert journal.problems == ()
    assert len(journal.entries) == 32
    assert len({found.id for found in journal.entries}) == 32
    assert all(found.title and found.tags and found.mood for found in journal.entries)
    assert [found.date for found in journal.entries] == sorted(found.date for found in journal.entries)


def test_modern_form(journal_file: Write) -> None:
    path = journal_file(
        [entry(timestamp="2025-03-02T19:40:00Z", title=" Rain ", tags=["wet", "home"], mood="calm", x=1)]
    )
    (found,) = read_journal(path).entries
    assert found.id == "a"
    assert found.timestamp == datetime(2025, 3, 2, 19, 40, tzinfo=UTC)
    assert (found.text, found.title, found.tags, found.mood) == ("Rain.", "Rain", ("wet", "home"), "calm")


def test_only_id_timestamp_and_text_are_needed(journal_file: Write) -> None:
    (found,) = read_journal(journal_file([entry(title=None, tags=None, mood=None)])).entries
    assert (found.title, found.tags, found.mood) == ("", (), "")
    assert found.label == "Rain."


def test_older_form_becomes_title_and_text(journal_file: Write) -> None:
    wrapped = {
        "timestamp": "2024-01-05T10:00:00+02:00",
        "label": "A first",
        "entry_type": "milestone",
        "description": "It began.",
        "key_insights": ["One.", "Two."],
        "lyra_reflections": "I was glad.",
        "tags": ["start"],
    }
    (found,) = read_journal(journal_file([{"journal_entry": wrapped}])).entries
    assert found.title == "A first"
    assert found.text == "It began.\n\n- One.\n- Two.\n\nI was glad."
    assert found.tags == ("start", "milestone")
    assert found.timestamp.utcoffset() == timedelta(hours=2)


def test_older_form_gets_an_id_that_does_not_depend_on_its_place(journal_file: Write) -> None:
    wrapped = {"journal_entry": {"timestamp": "2024-01-05", "label": "L", "description": "D"}}
    (alone,) = read_journal(journal_file([wrapped])).entries
    moved = read_journal(journal_file([entry(), entry(id="b"), wrapped])).entries
    assert alone.id == "2024-01-05-dfb1a6fd6a2a"
    assert alone.id in {found.id for found in moved}
    outside = read_journal(journal_file([{"id": 7, **wrapped}])).entries
    assert outside[0].id == "7"


def test_forms_mix_and_time_orders_them(journal_file: Write) -> None:
    items = [
        entry(id="noon", timestamp="2025-03-02T12:00:00Z"),
        {"journal_entry": {"timestamp": "2025-03-02T12:30:00+02:00", "description": "Earlier in UTC."}},
        entry(id="day", timestamp="2025-03-02"),
    ]
    journal = read_journal(journal_file({"entries": items}))
    assert [found.text for found in journal.entries] == ["Rain.", "Earlier in UTC.", "Rain."]
    assert journal.entries[0].id == "day"
    assert journal.entries[1].timestamp.tzinfo == timezone(timedelta(hours=2))


def test_each_problem_names_file_entry_and_field_and_hides_no_other_entry(journal_file: Write) -> None:
    path = journal_file(
        [
            entry(),
            {"timestamp": "03/02/2025", "text": 5, "title": "t" * 1001, "tags": "garden"},
            7,
            entry(id="c", text=" "),
            entry(id="d", tags=["ok", 3]),
            {"journal_entry": {"timestamp": 3, "description": "D"}},
            {"journal_entry": {"timestamp": "2025-01-01"}},
            {"journal_entry": []},
            entry(id="e", text="Sun."),
        ]
    )
    journal = read_journal(path)
    assert [found.id for found in journal.entries] == ["a", "e"]
    assert journal.problems == (
        "journal.json: entry 2: id: is missing",
        f"journal.json: entry 2: timestamp: '03/02/2025' is not an ISO 8601 date; {FORMS}",
        "journal.json: entry 2: text: is a number, not a string",
        "journal.json: entry 2: title: has more than 1000 characters",
        "journal.json: entry 2: tags: is a string, not a list of strings",
        "journal.json: entry 3: is a number, not an object",
        "journal.json: entry 4 (id 'c'): text: is empty",
        "journal.json: entry 5 (id 'd'): tags: has an item that is a number, not a string",
        "journal.json: entry 6: journal_entry.timestamp: is a number, not a string",
        "journal.json: entry 7: journal_entry: has no text in description, key_insights or lyra_reflections",
        "journal.json: entry 8: journal_entry: is a list, not an object",
    )


def test_a_repeated_entry_is_left_out_and_a_repeated_id_renamed(journal_file: Write) -> None:
    path = journal_file([entry(), entry(), entry(text="Sun."), entry(text="Snow.")])
    journal = read_journal(path)
    assert [(found.id, found.text) for found in journal.entries] == [
        ("a", "Rain."),
        ("a (2)", "Sun."),
        ("a (3)", "Snow."),
    ]
    assert journal.problems == (
        "journal.json: entry 2 (id 'a'): id: the same entry as entry 1; left out",
        "journal.json: entry 3 (id 'a'): id: already the id of entry 1; kept as 'a (2)'",
        "journal.json: entry 4 (id 'a'): id: already the id of entry 1; kept as 'a (3)'",
    )


def test_an_empty_list_is_an_empty_journal(journal_file: Write) -> None:
    journal = read_journal(journal_file([]))
    assert journal.entries == ()
    assert journal.problems == ()


def test_byte_order_mark_unicode_and_half_surrogates(journal_file: Write) -> None:
    path = journal_file("\ufeff" + json.dumps([entry(text="Grüße 🌱 \ud83d x\u0000y", id="ü")], ensure_ascii=True))
    (found,) = read_journal(path).entries
    assert (found.id, found.text) == ("ü", "Grüße 🌱 \ufffd xy")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": "a",\n  oops}]', "journal.json:2:3: not JSON: Expecting property name enclosed in double quotes"),
        ("", "journal.json:1:1: not JSON: Expecting value"),
        ('"text"', "journal.json holds a string, not a list of entries"),
        ('{"a": 1}', 'journal.json holds an object without a list "entries", not a list of entries'),
        ("[" * 200_000, "journal.json: its lists or objects are nested too deep"),
        ('[{"id": "a"}]', NOTHING_VALID),
    ],
)
def test_a_file_that_holds_no_journal(journal_file: Write, content: str, message: str) -> None:
    with pytest.raises(JournalError) as caught:
        read_journal(journal_file(content))
    assert str(caught.value) == message


def test_problems_of_a_hopeless_file_are_listed_to_a_bound(journal_file: Write) -> None:
    with pytest.raises(JournalError) as caught:
        read_journal(journal_file([1] * 20))
    lines = str(caught.value).splitlines()
    assert lines[0] == "journal.json: none of its 20 entries is valid"
    assert lines[-1] == "  and 12 more"
    assert len(lines) == 10


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JournalError) as missing:
        read_journal(Path("none.json"))
    assert str(missing.value) == "there is no journal at none.json"
    assert missing.value.hint == "check --journal; data/journal/sample.json shows the form"
    Path("folder").mkdir()
    with pytest.raises(JournalError) as folder:
        read_journal(Path("folder"))
    assert str(folder.value) == "folder is a folder without a journal file"
    assert folder.value.hint == "journal files end in .json, .jsonl or .md"
    Path("latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(JournalError) as latin:
        read_journal(Path("latin.json"))
    assert str(latin.value) == "latin.json is not UTF-8 text (byte 2)"


def test_a_huge_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Path("huge.json").open("wb") as file:
        os.truncate(file.fileno(), entries_module.MAX_FILE_BYTES + 1)
    with pytest.raises(JournalError) as caught:
        read_journal(Path("huge.json"))
    assert str(caught.value) == "huge.json has 268435457 bytes; a journal may have 268435456"
