"""Dates that a question names: "2025-03-02", "2025-03", "March 3", "3 March 2025", "March 2025", "in March".

What they mean on a calendar, and dates such as "last week", are `periods`' matter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import date

__all__ = ["NamedDate", "named_dates", "without_dates"]

_MONTHS = (
    "january", "february", "march", "april", "may", "june",
    "july", "august", "september", "october", "november", "december",
)  # fmt: skip
_NAME = rf"(?P<name>{'|'.join(_MONTHS)}|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)\b\.?"
_DAY = r"(?P<day>[0-3]?[0-9])(?:st|nd|rd|th)?\b"
_YEAR = r"(?P<year>(?:19|20)[0-9]{2})\b"
# In this order: a date that one form reads is not read again by a later, looser one. A month that stands alone must
# follow a word such as "in", or "may" and "march" would be months in every sentence.
_FORMS = tuple(
    re.compile(form, re.IGNORECASE)
    for form in (
        rf"\b{_YEAR}-(?P<month>[01][0-9])(?:-(?P<day>[0-3][0-9]))?\b",
        rf"\b{_NAME}\s+{_DAY}(?:,?\s+{_YEAR})?",
        rf"\b{_DAY}\s+(?:of\s+)?{_NAME}(?:,?\s+{_YEAR})?",
        rf"\b{_NAME},?\s+{_YEAR}",
        rf"\b(?:in|during|since|last|this|of)\s+(?:early\s+|late\s+)?{_NAME}",
    )
)
_MAX_QUESTION = 2_000


@dataclass(frozen=True, slots=True)
class NamedDate:
    """A day, a month, or either in any year.

    Attributes:
        month: 1 to 12.
        day: 1 to 31, or None for the whole month.
        year: None for any year.
    """

    month: int
    day: int | None = None
    year: int | None = None

    def covers(self, when: date) -> bool:
        """Return whether `when` falls on it."""
        return when.month == self.month and self.day in {None, when.day} and self.year in {None, when.year}


def named_dates(question: str) -> tuple[NamedDate, ...]:
    """Return the dates that `question` names, in the order of its forms."""
    rest = question[:_MAX_QUESTION]
    found: list[NamedDate] = []
    for form in _FORMS:
        for match in form.finditer(rest):
            named = _named(match.groupdict())
            if named is not None and named not in found:
                found.append(named)
        rest = form.sub(" ", rest)
    return tuple(found)


def without_dates(question: str) -> str:
    """Return `question` without the words that `named_dates` reads."""
    for form in _FORMS:
        question = form.sub(" ", question)
    return question


def _named(groups: dict[str, str | None]) -> NamedDate | None:
    name, day, year = groups.get("name"), groups.get("day"), groups.get("year")
    month = int(groups["month"] or 0) if name is None else _month(name)
    if not 1 <= month <= len(_MONTHS) or (day is not None and not 1 <= int(day) <= 31):  # noqa: PLR2004
        return None
    return NamedDate(month, int(day) if day else None, int(year) if year else None)


def _month(name: str) -> int:
    return next(number for number, month in enumerate(_MONTHS, start=1) if month.startswith(name.lower()[:3]))
