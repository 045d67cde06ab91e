"""News for many listeners, none of which can hold up another one or what the news is about.

Used in the event loop alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from lyra_emergence.errors import RequestError

__all__ = ["MOST_LISTENERS", "Broadcast", "Mailbox"]

MOST_LISTENERS: Final = 32
"""Pages and programs that listen at once, at most."""
_HELD: Final = 64
"""Events that wait for one listener at most; of more the oldest are dropped."""


class Mailbox:
    """What one listener has not read yet."""

    def __init__(self) -> None:
        self._held: deque[bytes] = deque(maxlen=_HELD)
        self._news = asyncio.Event()
        self._closed = False

    def put(self, event: bytes) -> None:
        """Hold an event, in place of the oldest one where there are too many."""
        self._held.append(event)
        self._news.set()

    def close(self) -> None:
        """Let the listener end once it has read what is there."""
        self._closed = True
        self._news.set()

    async def next(self, seconds: float) -> bytes | None:
        """Return the oldest event; None where there will be no more.

        Raises:
            TimeoutError: None came for so long.
        """
        async with asyncio.timeout(seconds):
            while not self._held:
                if self._closed:
                    return None
                self._news.clear()
                await self._news.wait()
        return self._held.popleft()


class Broadcast:
    """The listeners of one server."""

    def __init__(self) -> None:
        self._mailboxes: set[Mailbox] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._mailboxes)

    def join(self) -> Mailbox:
        """Return the mailbox of a new listener.

        Raises:
            RequestError: There are too many (429), or the server is shutting down (503).
        """
        if self._closed:
            raise RequestError("the server is shutting down", status=503, code="shutting_down", retry_after=5)
        if len(self._mailboxes) >= MOST_LISTENERS:
            raise RequestError(
                f"{MOST_LISTENERS} listen already, and that is the limit",
                status=429,
                code="too_many_listeners",
                retry_after=5,
                hint="close a page that shows this server",
            )
        mailbox = Mailbox()
        self._mailboxes.add(mailbox)
        return mailbox

    def leave(self, mailbox: Mailbox) -> None:
        """Forget a listener."""
        self._mailboxes.discard(mailbox)

    def send(self, event: bytes) -> None:
        """Put an event into every mailbox."""
        for mailbox in self._mailboxes:
            mailbox.put(event)

    def close(self) -> None:
        """Let all listeners end, and take no more."""
        self._closed = True
        for mailbox in self._mailboxes:
            mailbox.close()
