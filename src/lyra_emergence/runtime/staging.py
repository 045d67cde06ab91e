"""Copying weights from main memory to an accelerator through pinned memory.

From pageable memory a driver copies in small steps, and the thread that asked waits for all of them. Through a few
pinned pieces the bus sends one piece while the CPU reads the next, and the accelerator computes meanwhile: the copies
have a stream of their own. Devices without streams or pinned memory get the same copies, one after the other.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from lyra_emergence.placement import STAGING_PIECE, STAGING_PIECES

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Staging"]


class Staging:
    """Pinned pieces of main memory, and a stream of an accelerator that copies from them.

    Args:
        device: The accelerator.
        most: Bytes of what is copied at once, at most: a piece is no larger.

    Raises:
        RuntimeError: There is no memory for the pieces.
    """

    def __init__(self, device: torch.device, most: int) -> None:
        self._device = device
        self._stream = _side_stream(device)
        nbytes = max(1, min(STAGING_PIECE, most))
        self._pieces = [_pinned(nbytes, device) for _ in range(STAGING_PIECES)]
        self._sent: list[Any] = [None] * STAGING_PIECES
        self._next = 0

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: Any = None) -> Any:
        """Copy tensors of main memory to tensors of the device that have their shapes.

        Args:
            pairs: (source, target), both contiguous.
            after: The event of the device before which no target may change, or None.

        Returns:
            The event at which all of it is there, for `wait`; None where it is there already. The sources are no longer
            needed once this returns.
        """
        with self._stream or contextlib.nullcontext():
            if after is not None and self._stream is not None:
                self._stream.wait_event(after)
            for source, target in pairs:
                self._copy(_bytes(source), _bytes(target))
            return self._mark()

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        for begin in range(0, source.numel(), self._pieces[0].numel()):
            part = source[begin : begin + self._pieces[0].numel()]
            at, self._next = self._next, (self._next + 1) % len(self._pieces)
            if self._sent[at] is not None:
                self._sent[at].synchronize()
            piece = self._pieces[at][: part.numel()]
            piece.copy_(part)
            target[begin : begin + part.numel()].copy_(piece, non_blocking=self._stream is not None)
            self._sent[at] = self._mark()

    def _mark(self) -> Any:
        if self._stream is None:
            return None
        event = torch.Event(self._device)
        event.record(self._stream)
        return event

    def used(self) -> Any:
        """Return the event of what the device has been given to compute so far, for `copy` to wait for."""
        if self._stream is None:
            return None
        event = torch.Event(self._device)
        event.record(torch.accelerator.current_stream(self._device))
        return event

    def wait(self, event: Any) -> None:
        """Let what the device is given to compute from now on wait for an event."""
        if event is not None:
            torch.accelerator.current_stream(self._device).wait_event(event)


def _side_stream(device: torch.device) -> Any:
    try:
        return torch.Stream(device)
    except (RuntimeError, NotImplementedError, TypeError):
        return None


def _pinned(nbytes: int, device: torch.device) -> torch.Tensor:
    if device.type == "mps":  # main memory is the device's own
        return torch.empty(nbytes, dtype=torch.uint8)
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1).view(torch.uint8)
