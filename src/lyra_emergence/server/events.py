"""What the engine tells, from its threads to the event loop of one request."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from lyra_emergence.errors import AbandonedError, RequestError

if TYPE_CHECKING:
    from lyra_emergence.chunks import Chunk
    from lyra_emergence.server.engine import Asked, Engine, Outcome, Ticket

__all__ = ["Answer"]


class Answer:
    """One answer as it comes. Made in the event loop.

    Args:
        engine: Who runs it.
        asked: The request.

    Attributes:
        ticket: What the engine knows it by.

    Raises:
        RequestError: The engine does not take it.
    """

    def __init__(self, engine: Engine, asked: Asked) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        # Bounded by the answer's own length.
        self._outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        self.ticket: Ticket = engine.submit(asked, self._tell)

    def _tell(self, outcome: Outcome) -> None:
        # A loop that has ended has nobody who waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._outcomes.put_nowait, outcome)

    async def next(self) -> Chunk:
        """Return the next chunk; the last one has a `finish_reason`.

        Raises:
            LyraError: The answer ended with it.
        """
        outcome = await self._outcomes.get()
        if isinstance(outcome, AbandonedError):
            # A client that is still there is told so: only a server that ends stops its answers.
            raise RequestError("the server is shutting down", status=503, code="shutting_down", retry_after=5)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def stop(self) -> None:
        """Let the engine stop it; nothing where it has ended."""
        self._engine.stop(self.ticket)
