"""What rank 0 tells the others while a model runs: which pass comes next.

A message is one broadcast of a few whole numbers, and a second one where they do not hold its tokens. It goes over a
group of its own, on main memory, whose waits have no end: a person may think for an hour. A rank that ends closes its
connections, and whoever waits for it gets an error at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MEASURE", "PASS", "Channel", "Message"]

PASS: Final = 1
"""Run the model on the tokens that come with it."""
MEASURE: Final = 2
"""Tell what is held."""

_WORDS: Final = 16
_HEAD: Final = 6
_MOST_TOKENS: Final = 2**24
"""Tokens of one pass at most: a message that claims more is none of ours."""


@dataclass(frozen=True, slots=True)
class Message:
    """One thing that all ranks do next.

    Attributes:
        kind: `PASS` or `MEASURE`.
        cache: The number of the cache that the pass goes on from, and adds to.
        held: Tokens that it holds before.
        keep: For how many last tokens logits are made; 0 for all.
        batch: Sequences.
        tokens: Their token ids, one sequence after the other.
        dropped: Caches that are not used any more.
    """

    kind: int
    cache: int = 0
    held: int = 0
    keep: int = 0
    batch: int = 1
    tokens: Sequence[int] = ()
    dropped: Sequence[int] = ()

    def ids(self, device: torch.device | str) -> torch.Tensor:
        """Return the token ids, (batch, tokens)."""
        return torch.tensor(self.tokens, device=device).reshape(self.batch, -1)


class Channel:
    """Where rank 0 sends messages, and the others receive them.

    Args:
        group: A process group of all ranks, on main memory.
    """

    def __init__(self, group: Any) -> None:
        self._group = group

    def send(self, message: Message) -> None:
        """Send a message to all other ranks."""
        more = [*message.tokens, *message.dropped]
        head = [message.kind, message.cache, message.held, message.keep, message.batch, len(message.dropped)]
        room = _WORDS - _HEAD - 1
        inline = more if len(more) <= room else []
        self._broadcast(torch.tensor([*head, len(more), *inline, *[0] * (room - len(inline))]))
        if len(more) > room:
            self._broadcast(torch.tensor(more))

    def receive(self) -> Message:
        """Wait for a message and return it."""
        words = self._broadcast(torch.zeros(_WORDS, dtype=torch.long)).tolist()
        kind, cache, held, keep, batch, dropped = words[:_HEAD]
        count = words[_HEAD]
        if not 0 <= dropped <= count <= _MOST_TOKENS:
            raise RuntimeError(f"a message of {count} words cannot be rank 0's")
        more = words[_HEAD + 1 :][:count]
        if count > len(more):
            more = self._broadcast(torch.zeros(count, dtype=torch.long)).tolist()
        tokens = count - dropped
        return Message(kind, cache, held, keep, batch, more[:tokens], more[tokens:])

    def gather(self, own: Any) -> list[Any]:
        """Return what every rank has, in their order."""
        found: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(found, own, group=self._group)
        return found

    def _broadcast(self, words: torch.Tensor) -> torch.Tensor:
        dist.broadcast(words, src=0, group=self._group)
        return words
