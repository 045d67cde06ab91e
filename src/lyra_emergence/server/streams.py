"""Streams of server-sent events."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from starlette.responses import StreamingResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.types import Receive, Scope, Send

__all__ = ["KEEP_ALIVE", "STREAM_CONTENT", "EventStream", "named_event"]

KEEP_ALIVE: Final = b": still here\n\n"
"""A comment, which readers skip."""
_EVENT: Final = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
STREAM_CONTENT: Final[dict[str, Any]] = {"text/event-stream": {"schema": _EVENT}}
"""How /openapi.json describes a stream."""
_TEXT: Final = "text/event-stream; charset=utf-8"
# Proxies are asked not to hold pieces back.
_HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """A stream of events.

    Args:
        pieces: The events.
        at_end: Called when it ends, however that is: also where the client leaves.
    """

    def __init__(self, pieces: AsyncIterator[bytes], at_end: Callable[[], None]) -> None:
        super().__init__(pieces, headers=_HEADERS, media_type=_TEXT)
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


def named_event(name: str, data: Any) -> bytes:
    """Return an event with a name; `data` as JSON on one line."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
