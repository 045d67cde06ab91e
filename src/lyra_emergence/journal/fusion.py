"""Reciprocal-rank fusion: one order from several.

A passage's score is the sum over the rankings of weight / (K + its rank), from 1 (Cormack, Clarke and Buettcher,
"Reciprocal Rank Fusion Outperforms Condorcet and Individual Rank Learning Methods", SIGIR 2009). It needs no common
scale, which BM25 and cosines do not have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["fuse"]

K: Final = 60


def fuse(rankings: Iterable[Sequence[tuple[int, float]]], k: int = K) -> dict[int, float]:
    """Return the score of each row in any of the rankings.

    Args:
        rankings: Each rows with their weights, best first.
        k: How slowly a rank's worth falls.
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, (row, weight) in enumerate(ranking, start=1):
            scores[row] = scores.get(row, 0.0) + weight / (k + rank)
    return scores
