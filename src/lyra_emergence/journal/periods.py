"""The days that a question means: "last week", "yesterday", "three days ago", "in March", "on Tuesday", "in 2024".

They are counted from today where the journal is kept up to it, and from the newest entry where it ended earlier: who
asks an old journal for "last week" means its last week. A month or day without a year is the latest one up to then of
which there are entries. Weeks begin on Monday. What was understood is said, so that a reader can tell.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING, Final

from lyra_emergence.journal.dates import named_dates, without_dates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeAlias

    from lyra_emergence.journal.dates import NamedDate

    _Reader: TypeAlias = Callable[[re.Match[str], date], tuple[date, date]]

__all__ = ["Anchor", "Asked", "Period", "anchor_for", "read_question"]

_KEPT_UP: Final = 14
"""Days without an entry after which a journal counts as ended."""
_MAX_QUESTION: Final = 2_000
_YEARS_BACK: Final = 120
_NUMBER_WORDS: Final = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
_NUMBERS: Final = {word: number for number, word in enumerate(_NUMBER_WORDS, start=1)} | {
    "a": 1,
    "an": 1,
    "couple of": 2,
    "a couple of": 2,
    "few": 3,
    "a few": 3,
}
_WEEKDAYS: Final = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_SEASONS: Final = {"spring": 3, "summer": 6, "autumn": 9, "fall": 9, "winter": 12}
_COUNT = rf"(?P<count>[0-9]{{1,3}}|{'|'.join(sorted(_NUMBERS, key=len, reverse=True))})"
_UNIT = r"(?P<unit>day|week|month|year)s?"
_MONTH_END: Final = 31


@dataclass(frozen=True, slots=True)
class Anchor:
    """The day that dates are counted from.

    Attributes:
        day: The day.
        name: What it is: "today", or "the newest entry".
    """

    day: date
    name: str


@dataclass(frozen=True, slots=True)
class Period:
    """Days that a question means.

    Attributes:
        first: The first of them.
        last: The last of them.
        words: The question's words for them.
        said: What was understood, in a line; "" where the words leave no choice.
    """

    first: date
    last: date
    words: str
    said: str = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, read.

    Attributes:
        text: The question without the words that only count days ("last week").
        topic: The question without any words for days ("in March 2025" neither): what it is about.
        periods: The days that it means; an entry of any of them will do. None for any day.
    """

    text: str
    topic: str
    periods: tuple[Period, ...]


def anchor_for(newest: date | None, today: date) -> Anchor:
    """Return the day to count from in a journal whose newest entry is of `newest`."""
    if newest is None or (today - newest).days <= _KEPT_UP:
        return Anchor(today, "today")
    return Anchor(newest, "the newest entry")


def read_question(question: str, anchor: Anchor, has_entries: Callable[[date, date], bool]) -> Asked:
    """Return what `question` asks for and of which days.

    Args:
        question: The question.
        anchor: What days are counted from.
        has_entries: Returns whether there is an entry between two days, both included.
    """
    head, tail = question[:_MAX_QUESTION], question[_MAX_QUESTION:]
    found: list[Period] = []
    for form, read in _FORMS:
        for match in form.finditer(head):
            span = _sound(read, match, anchor.day)
            if span is not None:
                found.append(_stated(*span, match[0], anchor))
        head = form.sub(" ", head)
    named = (_resolved(date_, anchor, has_entries) for date_ in named_dates(head))
    found += [period for period in named if period is not None]
    topic = without_dates(head) if found else head
    return Asked(head + tail, topic + tail, tuple(dict.fromkeys(found)))


def _sound(read: _Reader, match: re.Match[str], day: date) -> tuple[date, date] | None:
    try:
        return read(match, day)
    except (ValueError, OverflowError):  # beyond the calendar
        return None


def _stated(first: date, last: date, words: str, anchor: Anchor) -> Period:
    words = " ".join(words.split())
    said = f'"{words}" is {_range(first, last)}'
    if not re.search(r"[0-9]{4}", words):
        said += ", counted from today" if anchor.name == "today" else f", counted from {anchor.name}, {anchor.day}"
    return Period(first, last, words, said)


def _range(first: date, last: date) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _resolved(named: NamedDate, anchor: Anchor, has_entries: Callable[[date, date], bool]) -> Period | None:
    if named.year is not None:
        span = _on_calendar(named, named.year)
        return span and Period(*span, words=str(named.year))
    spans = [span for span in _occurrences(named, anchor.day) if span is not None]
    chosen = next((span for span in spans if has_entries(*span)), spans[0] if spans else None)
    if chosen is None:
        return None
    words = f"{chosen[0]:%B}" + (f" {named.day}" if named.day else "")
    return Period(*chosen, words, f'"{words}" is {_range(*chosen)}')


def _occurrences(named: NamedDate, day: date) -> Iterator[tuple[date, date] | None]:
    for year in range(day.year, max(day.year - _YEARS_BACK, 0), -1):
        span = _on_calendar(named, year)
        if span is None or span[0] <= day:
            yield span


def _on_calendar(named: NamedDate, year: int) -> tuple[date, date] | None:
    if named.day is None:
        return _month(year, named.month)
    try:
        day = date(year, named.month, named.day)
    except ValueError:
        return None
    return day, day


def _month(year: int, month: int, months: int = 1) -> tuple[date, date]:
    """Return the first and last day of a month, counted on from January of `year`, or of several from it on."""
    first = date(year + (month - 1) // 12, (month - 1) % 12 + 1, 1)
    end = month + months - 1
    after = date(year + end // 12, end % 12 + 1, 1)
    return first, after - timedelta(days=1)


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else _NUMBERS[" ".join(text.lower().split())]


def _monday(day: date) -> date:
    return day - timedelta(days=day.weekday())


def _single(offset: int) -> _Reader:
    def read(_match: re.Match[str], day: date) -> tuple[date, date]:
        return (day - timedelta(days=offset),) * 2

    return read


def _whole(unit: str, back: int, day: date) -> tuple[date, date]:
    """Return the day, week, month or year that lies `back` of them before that of `day`."""
    if unit == "day":
        return (day - timedelta(days=back),) * 2
    if unit == "week":
        first = _monday(day) - timedelta(weeks=back)
        return first, first + timedelta(days=6)
    if unit == "month":
        return _month(day.year, day.month - back)
    return date(day.year - back, 1, 1), date(day.year - back, 12, _MONTH_END)


def _ago(match: re.Match[str], day: date) -> tuple[date, date]:
    return _whole(match["unit"].lower(), _number(match["count"]), day)


def _trailing(match: re.Match[str], day: date) -> tuple[date, date]:
    days = {"day": 1, "week": 7, "month": 30, "year": 365}[match["unit"].lower()]
    return day - timedelta(days=_number(match["count"] or "one") * days - 1), day


def _last_or_this(match: re.Match[str], day: date) -> tuple[date, date]:
    return _whole(match["unit"].lower(), 0 if match["which"].lower() == "this" else 1, day)


def _weekday(match: re.Match[str], day: date) -> tuple[date, date]:
    back = (day.weekday() - _WEEKDAYS.index(match["weekday"].lower())) % 7
    if back == 0 and match["which"].lower().startswith("last"):
        back = 7
    return (day - timedelta(days=back),) * 2


def _weekend(match: re.Match[str], day: date) -> tuple[date, date]:
    saturday = _monday(day) + timedelta(days=5)
    if match["which"].lower() == "last" or saturday > day:
        saturday -= timedelta(weeks=1)
    return saturday, saturday + timedelta(days=1)


def _season(match: re.Match[str], day: date) -> tuple[date, date]:
    year, start = day.year, _SEASONS[match["season"].lower()]
    if match["year"]:
        return _month(int(match["year"]), start, 3)
    spans = (_month(year - back, start, 3) for back in range(3))
    # "Last summer" is over; "this summer" may be now.
    over = match["which"].lower() == "last"
    return next(span for span in spans if (span[1] if over else span[0]) < day)


def _year(match: re.Match[str], _day: date) -> tuple[date, date]:
    return date(int(match["year"]), 1, 1), date(int(match["year"]), 12, _MONTH_END)


def _form(pattern: str, read: _Reader) -> tuple[re.Pattern[str], _Reader]:
    return re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE), read


# In this order: what one form reads is not read again by a later one.
_FORMS: Final = (
    _form("the day before yesterday", _single(2)),
    _form("yesterday", _single(1)),
    _form("today|tonight|this (?:morning|afternoon|evening)", _single(0)),
    _form("last night", _single(1)),
    _form(rf"{_COUNT}\s+{_UNIT}\s+ago", _ago),
    _form(rf"(?:in|during|over|for|within)?\s*(?:the\s+)?(?:last|past|previous)\s+{_COUNT}\s+{_UNIT}", _trailing),
    _form(rf"(?:in|during|over|within)?\s*the\s+past(?P<count>)\s+{_UNIT}", _trailing),
    _form(rf"(?:in|during|over)?\s*(?P<which>last|previous|this)\s+{_UNIT}", _last_or_this),
    _form(rf"(?P<which>last|this|on)\s+(?P<weekday>{'|'.join(_WEEKDAYS)})", _weekday),
    _form(r"(?:on |over )?(?:the )?(?P<which>last|this)\s+weekend", _weekend),
    _form(
        rf"(?P<which>last|this|in)\s+(?P<season>{'|'.join(_SEASONS)})(?:\s+(?:of\s+)?(?P<year>(?:19|20)[0-9]{{2}}))?",
        _season,
    ),
    _form(r"(?:in|during)\s+(?P<year>(?:19|20)[0-9]{2})(?!-)", _year),
)
