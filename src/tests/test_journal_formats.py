"""The forms of a journal beside the JSON file: JSON lines, Markdown with front matter, folders."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyra_emergence.errors import JournalError
from lyra_emergence.journal import JournalEntry, read_journal
from lyra_emergence.journal.fields import check_entry
from lyra_emergence.journal.markdown import FrontMatterError, read_markdown, write_markdown

NOTE = """\
---
# kept by hand
id: garden-1
date: 2025-03-02 19:40
title: "Garden: the plan"   # a comment
tags:
  - garden
  - 'it''s home'
mood: hopeful
publish: yes
aliases:
  nested:
    - of another program
cssclass: wide
---

Two raised beds.

Tomatoes first.
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths, so that error texts are short."""
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_markdown_file_is_an_entry() -> None:
    (found,) = read_journal(write("note.md", NOTE)).entries
    assert found == JournalEntry(
        "garden-1",
        datetime(2025, 3, 2, 19, 40),  # noqa: DTZ001  # the file has no offset
        "Two raised beds.\n\nTomatoes first.",
        "Garden: the plan",
        ("garden", "it's home"),
        "hopeful",
        publish=True,
    )


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("Just text.", {"id": "n", "title": "", "text": "Just text."}),
        ("# A walk #\n\nRain.", {"id": "n", "title": "A walk", "text": "Rain."}),
        ("# Only a heading\n", {"id": "n", "title": "", "text": "# Only a heading"}),
        ("---\ntags: [a, \"b, c\", 'd']\n---\nx", {"tags": ["a", "b, c", "d"], "text": "x"}),
        ("---\ntags: a, b\n---\nx", {"tags": ["a", "b"], "text": "x"}),
        ("---\ntags: []\n---\nx", {"tags": [], "text": "x"}),
        ("---\ntags: solo\n---\nx", {"tags": ["solo"], "text": "x"}),
        ("---\r\ntitle: t\r\n---\r\nx\r\ny", {"title": "t", "text": "x\ny"}),
        ("---\ntitle:\n---\nx", {"title": "", "text": "x"}),
        ("--- not a fence\nx", {"title": "", "text": "--- not a fence\nx"}),
        ('---\ntitle: "\\u00e9\\n"\n---\nx', {"title": "é\n"}),
    ],
)
def test_front_matter(text: str, fields: dict[str, object]) -> None:
    found = read_markdown(text, "n")
    assert {key: found.get(key, "") for key in fields} == fields


def test_the_date_may_stand_in_the_name() -> None:
    (found,) = read_journal(write("2025-03-02 a walk.md", "Rain.")).entries
    assert (found.id, found.date, found.text) == ("2025-03-02 a walk", "2025-03-02", "Rain.")
    assert read_markdown("x", "2025-03-021")["text"] == "x"
    assert "timestamp" not in read_markdown("x", "2025-03-021")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Rain.", "note.md: date: is missing"),
        ("---\ndate: 2 March\n---\nRain.", "note.md: date: '2 March' is not an ISO 8601 date;"),
        ("---\ndate: 2025-03-02\npublish: maybe\n---\nRain.", "note.md: publish: is 'maybe', not true or false"),
        ("---\ndate: 2025-03-02\n---\n \n", "note.md: text: is empty"),
        ("---\ndate: 2025-03-02\nRain.", "note.md: line 1: the front matter has no end;"),
        ("---\ndate: 2025-03-02\noops\n---\nRain.", "note.md: line 3: 'oops' is not 'key: value'"),
    ],
)
def test_what_is_wrong_with_a_markdown_file_is_named(text: str, problem: str) -> None:
    with pytest.raises(JournalError) as caught:
        read_journal(write("note.md", text))
    assert problem in str(caught.value)


_WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=30).map(str.strip)


@given(_WORDS.filter(bool), _WORDS, st.lists(_WORDS.filter(bool), max_size=4), st.booleans(), _WORDS.filter(bool))
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read_back(text: str, title: str, tags: list[str], publish: bool, name: str) -> None:
    moment = datetime(2025, 3, 2, 19, 40, tzinfo=UTC)
    data = {"id": name, "timestamp": moment.isoformat(), "text": text, "title": title, "tags": tags, "publish": publish}
    entry = check_entry(data)
    read = check_entry(read_markdown(write_markdown(entry), "other"))
    if not title:
        # A text that begins with a heading gets it for a title.
        assert read.text in entry.text
        return
    assert read == entry


@given(st.text(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused_by_line(text: str) -> None:
    for whole in (text, f"---\n{text}\n---\nx"):
        said = ""
        try:
            read_markdown(whole, "n")
        except FrontMatterError as error:
            said = str(error)
        assert not said or said.startswith("line ")


def test_json_lines_name_the_line() -> None:
    lines = [
        json.dumps({"id": "a", "timestamp": "2025-03-02", "text": "Rain."}),
        "",
        "{oops",
        json.dumps({"id": "b", "timestamp": "2025-03-03"}),
        json.dumps({"journal_entry": {"timestamp": "2025-03-04", "description": "Old form."}}),
        "[" * 100_000,
    ]
    journal = read_journal(write("j.jsonl", "\r\n".join(lines)))
    assert [entry.text for entry in journal.entries] == ["Rain.", "Old form."]
    assert journal.problems == (
        "j.jsonl: line 3: not JSON: Expecting property name enclosed in double quotes",
        "j.jsonl: line 4 (id 'b'): text: is missing",
        "j.jsonl: line 6: not JSON: it is nested too deep or not usable",
    )


def test_a_folder_is_read_whole_and_one_bad_file_hides_no_other() -> None:
    write("j/2025/2025-03-02.md", "Rain.")
    write("j/a.json", json.dumps([{"id": "a", "timestamp": "2025-03-01", "text": "Sun."}]))
    write("j/b.jsonl", json.dumps({"id": "a", "timestamp": "2025-03-03", "text": "Snow."}))
    write("j/c.json", "{oops")
    write("j/d.md", "---\ndate: never\n---\nFog.")
    write("j/.hidden/x.md", "no")
    write("j/picture.png", "no")
    Path("j/latin.md").write_bytes(b"\xe9")
    journal = read_journal(Path("j"))
    assert [(entry.id, entry.text) for entry in journal.entries] == [
        ("a", "Sun."),
        ("2025/2025-03-02", "Rain."),
        ("a (2)", "Snow."),
    ]
    assert journal.problems == (
        "j/b.jsonl: line 1 (id 'a'): id: already the id of j/a.json: entry 1; kept as 'a (2)'",
        "j/c.json: 1:2: not JSON: Expecting property name enclosed in double quotes",
        "j/d.md: date: 'never' is not an ISO 8601 date; write it like '2025-03-02' or '2025-03-02T19:40:00Z'",
        "j/latin.md: is not UTF-8 text (byte 0)",
    )


def test_a_folder_without_a_valid_entry_is_an_error() -> None:
    write("j/a.md", "Rain.")
    with pytest.raises(JournalError) as caught:
        read_journal(Path("j"))
    assert str(caught.value) == "j: its only entry is not valid\n  j/a.md: date: is missing"


def test_publish_is_read_in_every_form() -> None:
    entries = [
        {"id": "a", "timestamp": "2025-03-02", "text": "A.", "publish": True},
        {"id": "b", "timestamp": "2025-03-03", "text": "B.", "publish": None},
        {"journal_entry": {"timestamp": "2025-03-04", "description": "C.", "publish": True}},
        {"id": "d", "timestamp": "2025-03-05", "text": "D.", "publish": 1},
    ]
    journal = read_journal(write("j.json", json.dumps(entries)))
    assert [entry.publish for entry in journal.entries] == [True, False, True]
    assert journal.problems == ("j.json: entry 4 (id 'd'): publish: is a number, not true or false",)
