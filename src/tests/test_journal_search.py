"""Searching a journal by words and dates."""

from __future__ import annotations

import threading
from datetime import date, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyra_emergence.journal import Journal, JournalEntry, JournalIndex, open_journal
from lyra_emergence.journal.dates import NamedDate, named_dates
from lyra_emergence.journal.search import asks_for_overview, best_part, quoted, terms

SAMPLE = Path(__file__).parents[2] / "data" / "journal" / "sample.json"
START = datetime(2025, 3, 1)  # noqa: DTZ001  # a journal's times have an offset only where its writer gave one


@pytest.fixture(scope="module")
def sample() -> JournalIndex:
    return open_journal(SAMPLE)


def index(*texts: str) -> JournalIndex:
    """Return an index of entries "0", "1", ... a day apart from 1 March 2025."""
    entries = (JournalEntry(str(day), START + timedelta(days=day), text) for day, text in enumerate(texts))
    return JournalIndex(Journal(Path("journal.json"), tuple(entries)))


def ids(found: JournalIndex, question: str, limit: int = 4) -> list[str]:
    return [hit.entry.id for hit in found.search(question, limit)]


@pytest.mark.parametrize(
    ("question", "entry_id"),
    [
        ("How much did Biscuit's adoption cost?", "2025-04-19-biscuit-comes-home"),
        ("Which doctor looked at my aching knees?", "2025-03-11-the-knee-again"),
        ("how much did the roof repair cost", "2025-08-03-the-roofer-came"),
        ("Grandma's CAKE recipe?", "2025-03-16-grandmas-plum-cake"),
        ("What did I plant in October?", "2025-10-26-putting-the-garden-to-bed"),
        ("What happened on 2025-10-12?", "2025-10-12-saltmarsh-half-marathon"),
        ("what was on May 12", "2025-05-12-planting-day"),
        ("Who teaches me Portuguese?", "2026-01-18-portuguese-lesson-three"),
    ],
)
def test_the_best_entry_comes_first(sample: JournalIndex, question: str, entry_id: str) -> None:
    assert ids(sample, question)[0] == entry_id


@pytest.mark.parametrize(
    "question",
    [
        "hello",
        "Hello!",
        "how are you?",
        "thank you",
        "What is the capital of France?",
        "",
        "  ",
        "?!",
        "2+2?",
        "qwertz",
    ],
)
def test_nothing_matches(sample: JournalIndex, question: str) -> None:
    assert sample.search(question) == ()


@pytest.mark.parametrize(
    "question",
    [
        '"',
        "'",
        '" OR "',
        "garlic*",
        "NEAR(garlic, 3)",
        "title:garlic",
        "-garlic AND",
        "^garlic",
        "\0garlic",
        "(",
        "{a}:b",
    ],
)
def test_query_syntax_is_only_text(sample: JournalIndex, question: str) -> None:
    expected = "2025-10-26-putting-the-garden-to-bed" if "garlic" in question else None
    assert (expected in ids(sample, question)) == (expected is not None)


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_no_question_breaks_the_query(question: str) -> None:
    assert len(_ONE.search(question)) <= 1


_ONE = index("Ein Wort und 7 words, 日本")


def test_inflections_and_diacritics_match() -> None:
    found = index("We planted tulips near the café.", "Nothing here.")
    assert ids(found, "planting a tulip") == ["0"]
    assert ids(found, "CAFE") == ["0"]


def test_title_outweighs_tags_and_tags_outweigh_text() -> None:
    entries = (
        JournalEntry("text", START, "About garlic and more."),
        JournalEntry("tags", START, "About something and more.", tags=("garlic",)),
        JournalEntry("title", START, "About something and more.", title="garlic"),
    )
    found = JournalIndex(Journal(Path("journal.json"), entries))
    assert ids(found, "garlic") == ["title", "tags", "text"]


def test_the_newer_of_two_equal_matches_comes_first() -> None:
    assert ids(index("Rain today.", "Rain today.", "Rain today."), "rain", 2) == ["2", "1"]


def test_scores_fall_and_the_limit_holds(sample: JournalIndex) -> None:
    hits = sample.search("tomatoes in the garden", 3)
    assert len(hits) == 3
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_a_long_entry_is_found_by_its_best_passage() -> None:
    padding = "The weather was as it was. " * 400
    (hit,) = index(f"{padding}The heron landed on the jetty at noon. {padding}", "Other.").search("heron jetty")
    assert "The heron landed on the jetty at noon." in hit.passage
    assert len(hit.passage) <= 600


def test_a_chance_word_of_a_long_question_is_no_match() -> None:
    found = index("One cup of food.", "Rain.", "Sun.", "Snow.")
    assert ids(found, "cup") == ["0"]
    assert ids(found, "Which cup tournament champions defeated northern opponents decisively, goalkeeper saving?") == []


def test_a_named_day_outranks_words_and_brings_entries_by_itself() -> None:
    found = index("Rain.", "Sun.", "Rain again.")
    assert ids(found, "rain on March 2") == ["1", "0", "2"]
    assert ids(found, "what was 2025-03-03?") == ["2"]
    assert ids(found, "what was 2024-03-03?") == []


def test_an_empty_journal_finds_nothing_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "empty.json"
    path.write_text("[]")
    told: list[str] = []
    empty = open_journal(path, on_note=told.append)
    assert empty.search("anything at all, garlic") == ()
    assert empty.notes == (f"{path}: the journal holds no entries yet",)
    assert told == list(empty.notes)


def test_problems_are_notes(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    path.write_text('[{"id": "a", "timestamp": "2025-01-01", "text": "Rain."}, 7]')
    opened = open_journal(path)
    assert opened.notes == (f"{path}: entry 2: is a number, not an object",)
    assert [entry.id for entry in opened.entries] == ["a"]


def test_threads_may_share_an_index(sample: JournalIndex) -> None:
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(ids(sample, "garlic"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [ids(sample, "garlic")] * 4


def test_terms() -> None:
    assert terms("What did the dog's vet say about the dog on 2025-05-02?") == ("dog", "vet")
    assert terms("What did Will say about it, May?") == ("will", "may")
    assert terms("WHAT WILL IT BE") == ()
    assert terms("a " * 5000 + "heron") == ()
    assert len(terms(" ".join(f"word{number}" for number in range(100)))) == 32


def test_quoted() -> None:
    assert quoted('a"b\0') == '"a""b"'


def test_best_part() -> None:
    passage = "Sun all day. The heron came at noon. Rain at night."
    assert best_part(passage, "When did the heron come?", 25) == "The heron came at noon."
    assert best_part("", "heron", 25) == ""


@pytest.mark.parametrize(
    ("question", "dates"),
    [
        ("on 2025-03-02", [NamedDate(3, 2, 2025)]),
        ("in 2025-03?", [NamedDate(3, None, 2025)]),
        ("on March 3rd, 2025", [NamedDate(3, 3, 2025)]),
        ("March 3", [NamedDate(3, 3)]),
        ("the 3rd of Sept. 2025", [NamedDate(9, 3, 2025)]),
        ("march 2026 and in April", [NamedDate(3, None, 2026), NamedDate(4)]),
        ("in May", [NamedDate(5)]),
        ("I may march", []),
        ("2025-13-02", []),
        ("May 32", []),
        ("12345-03-021", []),
    ],
)
def test_named_dates(question: str, dates: list[NamedDate]) -> None:
    assert list(named_dates(question)) == dates


def test_a_named_date_covers() -> None:
    day = date(2025, 3, 2)
    assert NamedDate(3).covers(day)
    assert NamedDate(3, 2).covers(day)
    assert NamedDate(3, None, 2025).covers(day)
    assert not NamedDate(3, 1).covers(day)
    assert not NamedDate(3, 2, 2024).covers(day)
    assert not NamedDate(4, 2).covers(day)


def test_shorter_passages_are_chosen_sentence_by_sentence() -> None:
    text = "The roof leaks again. " * 8 + "Tomasz lent me his hose timer. " + "It rained all night. " * 8
    found = index(text, "Nothing about that here.")
    assert len(found.search("Who lent me a hose timer?")[0].passage) > 120
    short = found.with_passages(40)
    assert [hit.passage for hit in short.search("Who lent me a hose timer?")] == ["Tomasz lent me his hose timer."]
    assert short.journal is found.journal


@pytest.mark.parametrize(
    "question", ["Summarize my week.", "What have I been up to?", "recap", "What is new in my journal?"]
)
def test_an_overview_is_of_everything(question: str) -> None:
    assert asks_for_overview(question)


@pytest.mark.parametrize(
    "question", ["Summarize the marathon.", "Sum up what Dana said", "What did I do last week?", "Hello"]
)
def test_a_question_for_something_is_no_overview(question: str) -> None:
    assert not asks_for_overview(question)


def test_the_latest_entries_come_newest_first() -> None:
    found = index("first", "second", "third. " * 200)
    assert [(hit.entry.id, hit.passage[:6]) for hit in found.latest(2)] == [("2", "third."), ("1", "second")]
    assert len(found.latest(9)) == 3
    assert found.latest(0) == ()


def test_a_question_for_a_name_does_not_search_for_calls() -> None:
    assert terms("What is my bank called?") == ("bank",)
    assert terms("What was the dog called") == ("dog",)
    assert terms("Who called?") == terms("Has she called?") == ("called",)
    assert terms("What did Dana say when she called?") == ("dana", "called")
