"""Which passages a search may bring: by the day and the tags of their entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import date

    from lyra_emergence.journal.periods import Period

__all__ = ["ALL", "Filter", "Those"]


@dataclass(frozen=True, slots=True)
class Filter:
    """Passages whose entry is of one of some periods and has all of some tags.

    Attributes:
        days: First and last day of each period, as ordinals; an entry of any will do, and none means any day.
        tags: Tags, casefolded; an entry must have them all.
    """

    days: tuple[tuple[int, int], ...] = ()
    tags: tuple[str, ...] = ()

    @classmethod
    def asked(cls, since: date | None, until: date | None, tags: Iterable[str]) -> Filter:
        """Return the filter of a search's options; None and no tags let everything pass."""
        days = ((since.toordinal() if since else 0, until.toordinal() if until else 10**7),) if since or until else ()
        return cls(days, tuple(dict.fromkeys(tag.casefold() for tag in tags)))

    @property
    def restricts(self) -> bool:
        """Whether anything is left out."""
        return bool(self.days or self.tags)

    def within(self, periods: tuple[Period, ...]) -> Filter:
        """Return this filter, narrowed to the days of `periods`."""
        spans = [(period.first.toordinal(), period.last.toordinal()) for period in periods]
        if self.days:
            (low, high), *_ = self.days
            spans = [(max(first, low), min(last, high)) for first, last in spans]
        return Filter(tuple(spans), self.tags)

    def condition(self) -> tuple[str, list[Any]]:
        """Return the SQL condition on the columns of `passages`, and its values."""
        conditions, values = ["1"], list[Any]()
        if self.days:
            conditions.append(f"({' OR '.join(['day BETWEEN ? AND ?'] * len(self.days))})")
            values += [day for span in self.days for day in span]
        for tag in self.tags:
            conditions.append("entry IN (SELECT entry FROM labels WHERE tag = ?)")
            values.append(tag)
        return " AND ".join(conditions), values


@dataclass(frozen=True, slots=True)
class Those:
    """Passages of some days, as the vector search takes them.

    Attributes:
        days: First and last day of each period, as ordinals; none means any day.
        passages: The only passages, by number, or None for any.
    """

    days: tuple[tuple[int, int], ...] = ()
    passages: Sequence[int] | None = None


ALL: Final = Those()
