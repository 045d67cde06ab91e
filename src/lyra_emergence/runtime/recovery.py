"""What happened when memory ran out and work went on, and which device it was that fell short."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Recovery", "failing_device"]

_CPU = "cpu"
_NAMED_DEVICE = re.compile(r"\b(?:GPU|[Dd]evice) (\d+)\b")
_IN_MAIN_MEMORY = ("defaultcpuallocator", "bad_alloc", "unable to mmap", "could not create a primitive")


@dataclass(frozen=True, slots=True)
class Recovery:
    """One time that memory ran out and work went on.

    Attributes:
        device: torch's name of the device that fell short.
        tokens: Tokens of prompt and answer that were there, all of which were kept.
        remedy: What was done, in words.
        blocks: The blocks that left the device.
        reason: The error's first line.
    """

    device: str
    tokens: int
    remedy: str
    blocks: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"memory ran out on {self.device} after {self.tokens} tokens; nothing was lost: {self.remedy}"


def failing_device(error: BaseException, accelerators: Sequence[str]) -> str:
    """Return the device that an out-of-memory error came from, by its text; the first accelerator where it says none.

    Args:
        error: The error.
        accelerators: The accelerators in use.
    """
    text = str(error)
    if not accelerators or isinstance(error, MemoryError) or any(sign in text.lower() for sign in _IN_MAIN_MEMORY):
        return _CPU
    named = _NAMED_DEVICE.search(text)
    found = [device for device in accelerators if named and device.endswith(f":{named[1]}")]
    return (found or accelerators)[0]
