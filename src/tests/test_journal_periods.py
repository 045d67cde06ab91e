"""Dates in questions, counted from a day and said."""

from __future__ import annotations

from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyra_emergence.journal.periods import Anchor, anchor_for, read_question

FRIDAY = Anchor(date(2026, 3, 20), "the newest entry")


def spans(question: str, anchor: Anchor = FRIDAY) -> list[tuple[str, str]]:
    periods = read_question(question, anchor, lambda _first, _last: True).periods
    return [(str(period.first), str(period.last)) for period in periods]


@pytest.mark.parametrize(
    ("question", "first", "last"),
    [
        ("What did I do today?", "2026-03-20", "2026-03-20"),
        ("this morning", "2026-03-20", "2026-03-20"),
        ("yesterday", "2026-03-19", "2026-03-19"),
        ("last night", "2026-03-19", "2026-03-19"),
        ("the day before yesterday", "2026-03-18", "2026-03-18"),
        ("three days ago", "2026-03-17", "2026-03-17"),
        ("a week ago", "2026-03-09", "2026-03-15"),
        ("a couple of months ago", "2026-01-01", "2026-01-31"),
        ("4 months ago", "2025-11-01", "2025-11-30"),
        ("two years ago", "2024-01-01", "2024-12-31"),
        ("Last  WEEK", "2026-03-09", "2026-03-15"),
        ("this week", "2026-03-16", "2026-03-22"),
        ("last month", "2026-02-01", "2026-02-28"),
        ("last year", "2025-01-01", "2025-12-31"),
        ("in the past week", "2026-03-14", "2026-03-20"),
        ("over the last two weeks", "2026-03-07", "2026-03-20"),
        ("in the last 30 days", "2026-02-19", "2026-03-20"),
        ("on Tuesday", "2026-03-17", "2026-03-17"),
        ("on Friday", "2026-03-20", "2026-03-20"),
        ("last Friday", "2026-03-13", "2026-03-13"),
        ("last weekend", "2026-03-14", "2026-03-15"),
        ("last summer", "2025-06-01", "2025-08-31"),
        ("in winter 2024", "2024-12-01", "2025-02-28"),
        ("in 2024", "2024-01-01", "2024-12-31"),
        ("in March", "2026-03-01", "2026-03-31"),
        ("in April", "2025-04-01", "2025-04-30"),
        ("on May 12", "2025-05-12", "2025-05-12"),
        ("on 2025-10-12", "2025-10-12", "2025-10-12"),
        ("in February 2024", "2024-02-01", "2024-02-29"),
        ("on February 29", "2024-02-29", "2024-02-29"),
    ],
)
def test_what_a_question_means(question: str, first: str, last: str) -> None:
    assert spans(question) == [(first, last)]


@pytest.mark.parametrize(
    "question", ["", "How heavy is the dog?", "It may march on", "2025-02-30", "in a week", "fall"]
)
def test_a_question_without_a_date(question: str) -> None:
    assert spans(question) == []


def test_each_date_is_read_once() -> None:
    assert spans("yesterday and in May 2024") == [("2026-03-19", "2026-03-19"), ("2024-05-01", "2024-05-31")]


def test_what_is_left_to_look_for() -> None:
    asked = read_question("Who visited last week, and on May 3?", FRIDAY, lambda _first, _last: True)
    assert asked.text.split() == ["Who", "visited", ",", "and", "on", "May", "3?"]
    assert asked.topic.split() == ["Who", "visited", ",", "and", "on", "?"]


def test_it_is_said_how_it_was_counted() -> None:
    def said(question: str, anchor: Anchor = FRIDAY) -> list[str]:
        return [period.said for period in read_question(question, anchor, lambda _first, _last: True).periods]

    today = Anchor(date(2026, 3, 20), "today")
    assert said("last week") == ['"last week" is 2026-03-09 to 2026-03-15, counted from the newest entry, 2026-03-20']
    assert said("yesterday", today) == ['"yesterday" is 2026-03-19, counted from today']
    assert said("in March") == ['"March" is 2026-03-01 to 2026-03-31']
    assert said("in winter 2024") == ['"in winter 2024" is 2024-12-01 to 2025-02-28']
    assert said("on 2025-10-12") == [""]


def test_a_month_without_a_year_is_the_latest_with_entries() -> None:
    def only_2023(first: date, _last: date) -> bool:
        return first.year == 2023

    (period,) = read_question("in May", FRIDAY, only_2023).periods
    assert str(period.first) == "2023-05-01"


def test_days_are_counted_from_today_while_the_journal_is_kept_up() -> None:
    today = date(2026, 3, 20)
    assert anchor_for(date(2026, 3, 6), today) == Anchor(today, "today")
    assert anchor_for(date(2026, 3, 5), today) == Anchor(date(2026, 3, 5), "the newest entry")
    assert anchor_for(date(2027, 1, 1), today) == Anchor(today, "today")
    assert anchor_for(None, today) == Anchor(today, "today")


@given(st.text(max_size=200), st.dates())
@settings(max_examples=300, deadline=None)
def test_no_question_and_no_day_breaks_it(question: str, day: date) -> None:
    for text in (question, f"{question} last year 3 months ago in winter on Sunday in May 999 weeks ago"):
        for period in read_question(text, Anchor(day, "today"), lambda _first, _last: False).periods:
            assert period.first <= period.last
