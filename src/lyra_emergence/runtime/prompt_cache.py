"""Keys and values of the last prompt and answer, so that the next turn of a conversation runs only what is new."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lyra_emergence.runtime.kv_cache import cut_back, held_bytes

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

__all__ = ["PromptCache"]


class PromptCache:
    """What one conversation keeps between two answers.

    A plan has room for one context: what is kept is given up as soon as another answer of the same model begins, or a
    block of the model moves. Caches that cannot be cut (a window that has slid, a recurrent state) serve only a prompt
    that goes on from all that they hold.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._caches: dict[str, Any] = {}

    @property
    def tokens(self) -> int:
        """The number of tokens that are kept."""
        return len(self._tokens)

    def keep(self, tokens: Sequence[int], caches: dict[str, Any]) -> None:
        """Keep caches that hold `tokens` and nothing else."""
        self._tokens, self._caches = list(tokens), caches

    def take(self, prompt: Sequence[int]) -> tuple[dict[str, Any], int]:
        """Give up what is kept; return the caches, cut to what `prompt` begins with, and how many tokens they hold.

        At least the prompt's last token is left to run: its logits are wanted. ({}, 0) where nothing can be used.
        """
        tokens, caches = self._tokens, self._caches
        self.drop()
        held = _common(tokens, prompt[:-1])
        if not held or (held < len(tokens) and not cut_back(caches, held)):
            return {}, 0
        return caches, held

    def drop(self) -> None:
        """Give up what is kept."""
        self._tokens, self._caches = [], {}

    # What `Residency` asks of those whose caches go along.

    def move_cache(self, _layer: int, _device: str) -> None:
        """Give up what is kept: memory is short, or comes back."""
        self.drop()

    def cached_bytes(self, device: str) -> int:
        """Return the bytes that are kept on a device."""
        return held_bytes(self._caches, device)

    def share_to_come(self, _device: str) -> float:
        """Return 0: nothing is added to what is kept."""
        return 0.0

    share_offloaded = share_to_come

    def offload_cache(self, _device: str, _layers: Collection[int]) -> bool:
        """Give up what is kept; return whether that freed anything."""
        kept = bool(self._caches)
        self.drop()
        return kept

    def onload_cache(self, _device: str, _layers: Collection[int]) -> None:
        """Do nothing: what is kept was given up."""


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of what both begin with."""
    shorter = min(len(first), len(second))
    return next((at for at in range(shorter) if first[at] != second[at]), shorter)
