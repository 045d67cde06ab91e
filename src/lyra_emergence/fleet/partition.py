"""Dividing a row of layers among stages that follow one another: each takes one or more, in order."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["divide", "fits"]


def fits(costs: Sequence[int], rooms: Sequence[int]) -> bool:
    """Return whether `costs` can be divided so that no stage takes more than its room."""
    return _ends(_sums(costs), rooms, 0) is not None


def divide(costs: Sequence[int], rooms: Sequence[int]) -> tuple[int, ...] | None:
    """Return how many of `costs` each stage takes, so that the least that any of them has left is as much as possible.

    No other division leaves more in the fullest stage. Among those that leave as much, the one whose numbers differ
    least is taken where it is one of them.

    Args:
        costs: Bytes of each layer, in order.
        rooms: Bytes that each stage has for layers, in order.

    Returns:
        A number for each stage, each at least 1; None where no division fits.
    """
    sums = _sums(costs)
    if _ends(sums, rooms, 0) is None:
        return None
    least, beyond = 0, max(rooms) + 1
    while beyond - least > 1:
        middle = (least + beyond) // 2
        if _ends(sums, rooms, middle) is None:
            beyond = middle
        else:
            least = middle
    for counts in _even(len(costs), len(rooms)):
        if _slack(sums, rooms, counts) >= least:
            return counts
    ends = _ends(sums, rooms, least)
    assert ends is not None
    return tuple(end - start for start, end in pairwise((0, *ends)))


def _sums(costs: Sequence[int]) -> list[int]:
    return list(accumulate(costs, initial=0))


def _ends(sums: list[int], rooms: Sequence[int], slack: int) -> tuple[int, ...] | None:
    """Return where each stage ends if all leave `slack` free; None where they cannot.

    From the ends that a stage can have, the next one's follow: of those before it, the last takes the fewest bytes.
    """
    count = len(sums) - 1
    reached = [True] + [False] * count
    starts: list[list[int]] = []
    for room in rooms:
        start, found = -1, [-1] * (count + 1)
        for end in range(1, count + 1):
            if reached[end - 1]:
                start = end - 1
            if start >= 0 and sums[end] - sums[start] <= room - slack:
                found[end] = start
        starts.append(found)
        reached = [start >= 0 for start in found]
    if not reached[count]:
        return None
    ends = [count]
    for found in reversed(starts[1:]):
        ends.append(found[ends[-1]])
    return tuple(reversed(ends))


def _even(count: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Yield the even divisions: what is left over goes to the middle, to the first or to the last stages."""
    each, over = divmod(count, stages)
    for first in ((stages - over) // 2, 0, stages - over):
        yield tuple(each + (first <= stage < first + over) for stage in range(stages))


def _slack(sums: list[int], rooms: Sequence[int], counts: Sequence[int]) -> int:
    """Return the least that a stage has left."""
    ends = accumulate(counts, initial=0)
    return min(room - (sums[end] - sums[start]) for room, (start, end) in zip(rooms, pairwise(ends), strict=True))
