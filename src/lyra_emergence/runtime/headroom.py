"""Main memory while a model runs: looked at before it is taken, since a kernel that kills gives no error.

Weights that lie in the checkpoint's map count as free: the kernel drops their pages and reads them again. What counts
is what has no file behind it: temporaries, and the caches of blocks that run on the CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lyra_emergence.main_memory import KEPT_FREE, require, takeable_bytes

if TYPE_CHECKING:
    from lyra_emergence.runtime.residency import Residency

__all__ = ["Headroom"]

_STEPS_BETWEEN_LOOKS = 16
"""A look takes a fifth of a millisecond: as long as a thirtieth of a token of the smallest model."""


class Headroom:
    """What a model's next steps want of main memory, beside what it has left.

    Args:
        residency: The model's blocks.
        batch: Sequences that run together.
        chunk: Tokens that run at once, as the plan counted with.
    """

    def __init__(self, residency: Residency, batch: int, chunk: int) -> None:
        self._residency = residency
        self._batch = batch
        self._whole_chunk = chunk
        self._steps = 0

    def short_by(self, chunk: int) -> tuple[int, int]:
        """Return the bytes that an answer may want beyond what is left, 0 where it fits, and what is left.

        Args:
            chunk: Tokens of the prompt that run at once.
        """
        wanted = self._residency.wanted_main_memory(self._share(chunk))
        left = max(0, takeable_bytes() - KEPT_FREE)
        return max(0, wanted - left), left

    def look(self, tokens: int, held: int) -> None:
        """Check, for a prompt's chunk or now and then, that a pass of `tokens` tokens behind `held` others has room.

        Raises:
            LowMainMemoryError: It has not.
        """
        self._steps = self._steps + 1 if tokens == 1 else 0
        if self._steps % _STEPS_BETWEEN_LOOKS or not self._residency.uses_main_memory:
            return
        # Where it fails, the next try of the same step looks again.
        steps, self._steps = self._steps, -1
        require(self._needed(tokens, held), "the next step")
        self._steps = steps

    def _needed(self, tokens: int, held: int) -> int:
        """Temporaries of the pass, what caches grow by until the next look, and one layer's caches made anew."""
        grown = self._residency.cached_per_token() * self._batch
        again = grown * held // self._residency.layers
        if tokens == 1:
            return grown * _STEPS_BETWEEN_LOOKS + again
        return grown * tokens + again + self._residency.temporaries_in_main_memory(self._share(tokens))

    def _share(self, tokens: int) -> float:
        return min(1.0, tokens / self._whole_chunk)
