"""Who may ask, and how much: the first thing that a request meets.

Covers: pages of the web that talk to this machine's servers through its browser (a foreign `Origin`; a name of their
own that leads to loopback), the key, and the size of a body and the time that it takes to arrive. Does not cover:
encryption (put a proxy in front for that), and clients that open connections and send nothing.
"""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from lyra_emergence.errors import RequestError
from lyra_emergence.server.refusals import refusal
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections import Counter

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["DEFAULT_BODY", "Guard", "Limits", "is_loopback"]

DEFAULT_BODY: Final = 4 * 2**20
"""Bytes of a request's body at most."""
_BODY_SECONDS: Final = 30.0
"""How long a body may take to arrive."""
_OPEN_PATHS: Final = frozenset({"/", "/health"})
"""What is answered without the key: whether the server is well, and the page, which asks its reader for it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Who may ask, and how much.

    Attributes:
        key: What a client has to send as a bearer token; "" for none.
        body: Bytes of a request's body at most.
        local_names_only: Whether a request must name this machine as localhost or by a loopback address.
    """

    key: str = ""
    body: int = DEFAULT_BODY
    local_names_only: bool = True


class Guard:
    """Passes on the requests that may be asked.

    Args:
        app: What answers them.
        limits: Who may ask, and how much.
        statuses: Receives the number of responses by status.
    """

    def __init__(self, app: ASGIApp, limits: Limits, statuses: Counter[int]) -> None:
        self._app = app
        self._limits = limits
        self._statuses = statuses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._statuses[message["status"]] += 1
            await send(message)

        try:
            self._check(scope)
            body = await self._body(scope, receive)
        except RequestError as error:
            await refusal(error)(scope, receive, counted)
            return
        await self._app(scope, _Replayed(body, receive), counted)

    def _check(self, scope: Scope) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self._limits.local_names_only and not is_loopback(_name(host)):
            raise RequestError(
                "this server answers to localhost alone", status=403, code="wrong_host", hint="ask 127.0.0.1"
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise RequestError("pages of other sites may not ask", status=403, code="foreign_origin")
        if self._limits.key and scope["path"] not in _OPEN_PATHS:
            self._check_key(headers.get("authorization", ""))

    def _check_key(self, given: str) -> None:
        kind, _, key = given.partition(" ")
        wanted = self._limits.key.encode()
        if kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), wanted):
            return
        told = "the API key is wrong" if given else "an API key is wanted"
        hint = "send it as a bearer token; whoever started the server knows it"
        raise RequestError(told, status=401, code="invalid_api_key", hint=hint)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Return the whole body.

        Raises:
            RequestError: It is too large, or does not arrive.
        """
        for name, value in scope["headers"]:
            if name.lower() == b"content-length" and int(value) > self._limits.body:
                raise self._too_large()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                return await self._read(receive)
        except TimeoutError:
            raise RequestError("the body did not arrive in time", status=408, code="timeout") from None

    async def _read(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise RequestError("the client left", status=499, code="client_closed")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._limits.body:
                raise self._too_large()
            if not message.get("more_body"):
                return b"".join(parts)

    def _too_large(self) -> RequestError:
        return RequestError(
            f"the body has more than {format_bytes(self._limits.body)}",
            status=413,
            code="request_too_large",
            hint="send less, or start the server with a larger --max-body",
        )


class _Replayed:
    """A body that was read already, and after it whatever comes (a client that leaves)."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._message: dict[str, Any] | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive

    async def __call__(self) -> Message:
        message, self._message = self._message, None
        return message if message is not None else await self._receive()


def is_loopback(host: str) -> bool:
    """Return whether a host's name or address means this machine itself."""
    name = host.strip("[]").lower().rstrip(".")
    return name in {"localhost", "::1"} or (name.startswith("127.") and name.replace(".", "").isdigit())


def _name(host: str) -> str:
    """Return a Host header without its port."""
    return host.partition("]")[0] if host.startswith("[") else host.partition(":")[0]
