"""Dividing layers among stages, against every division there is."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyra_emergence.fleet.partition import divide, fits

COSTS = st.lists(st.integers(0, 30), min_size=1, max_size=8)
ROOMS = st.lists(st.integers(-5, 70), min_size=1, max_size=5)


def best_slack(costs: list[int], rooms: list[int]) -> int | None:
    """The most that the fullest stage can have left, found by trying all divisions; None where none fits."""
    if len(rooms) > len(costs):
        return None
    slacks = []
    for cuts in combinations(range(1, len(costs)), len(rooms) - 1):
        parts = pairwise((0, *cuts, len(costs)))
        slacks.append(min(room - sum(costs[a:b]) for room, (a, b) in zip(rooms, parts, strict=True)))
    best = max(slacks)
    return best if best >= 0 else None


@given(COSTS, ROOMS)
def test_no_division_leaves_more_in_the_fullest_stage(costs: list[int], rooms: list[int]) -> None:
    best, counts = best_slack(costs, rooms), divide(costs, rooms)
    assert fits(costs, rooms) == (best is not None)
    if best is None:
        assert counts is None
        return
    assert counts is not None
    assert len(counts) == len(rooms)
    assert min(counts) >= 1
    assert sum(counts) == len(costs)
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    parts = pairwise((0, *ends))
    assert min(room - sum(costs[a:b]) for room, (a, b) in zip(rooms, parts, strict=True)) == best


@pytest.mark.parametrize(
    ("costs", "rooms", "counts"),
    [
        ([10] * 8, [100] * 4, (2, 2, 2, 2)),
        ([10] * 10, [100] * 4, (2, 3, 3, 2)),  # the middle takes what is left over, as long as that costs nothing
        ([10] * 10, [100, 100, 100, 90], (2, 3, 3, 2)),
        ([10] * 4, [40, 20], (3, 1)),
        ([10] * 4, [10, 100], (1, 3)),
        ([1, 1, 1, 30], [40, 40], (3, 1)),
        ([10] * 3, [10, 10, 10], (1, 1, 1)),
    ],
)
def test_divisions(costs: list[int], rooms: list[int], counts: tuple[int, ...]) -> None:
    assert divide(costs, rooms) == counts


@pytest.mark.parametrize(
    ("costs", "rooms"),
    [([10] * 4, [10, 20]), ([10, 50, 10], [60, 5]), ([10], [100, 100]), ([10], [9]), ([0], [-1])],
)
def test_what_does_not_fit(costs: list[int], rooms: list[int]) -> None:
    assert divide(costs, rooms) is None
    assert not fits(costs, rooms)
