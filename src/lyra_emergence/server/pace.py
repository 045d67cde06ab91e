"""How fast tokens come, as seen lately."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Pace"]

_LATELY: Final = 3.0
"""Seconds that count."""
_REMEMBERED: Final = 1024
"""Steps that count at most; from a few hundred a second on they are fewer seconds."""


class Pace:
    """Counts steps of all answers together. Not for several threads at once.

    Args:
        clock: Seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED)

    def add(self, tokens: int) -> None:
        """Count tokens that came just now."""
        self._steps.append((self._clock(), tokens))

    def tokens_per_second(self) -> float:
        """Return how many tokens a second came of late; 0 where fewer than two steps tell it."""
        now = self._clock()
        while self._steps and now - self._steps[0][0] > _LATELY:
            self._steps.popleft()
        if len(self._steps) < 2 or now <= self._steps[0][0]:  # noqa: PLR2004 - a span has two ends
            return 0.0
        # The first step ends the time before it.
        tokens = sum(count for _, count in self._steps) - self._steps[0][1]
        return tokens / (now - self._steps[0][0])
