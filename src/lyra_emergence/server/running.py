"""The server as a process: it listens, it answers, and it ends with a signal.

The first SIGTERM or Ctrl-C closes the listening socket; answers that run or wait have `grace` seconds to end, and are
cut then. The second one cuts them at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import uvicorn

from lyra_emergence.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.types import ASGIApp

    from lyra_emergence.server.engine import Engine

__all__ = ["DEFAULT_GRACE", "LyraServer", "bound_socket"]

DEFAULT_GRACE: Final = 30.0
"""Seconds that answers have to end after the first signal."""
_LAST_WORDS: Final = 5.0
"""Seconds for the pass that runs when an answer is cut, and for telling its client."""
_LOOK: Final = 0.05
"""Seconds between two looks at whether there was a second signal."""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that has its address and does not listen yet; port 0 takes any free one.

    Raises:
        ConfigError: The address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host: '{host}' is no address: {error.strerror}", hint="write 127.0.0.1") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        told = (error.strerror or str(error)).lower()
        raise ConfigError(f"{host} port {port} cannot be had: {told}", hint="name another one with --port") from error
    return bound


class LyraServer(uvicorn.Server):
    """Serves an application until a signal comes, and lets answers end.

    Args:
        app: The application.
        engine: What runs its answers.
        grace: Seconds that answers have to end after the first signal.
        on_ready: Called once it listens.
    """

    def __init__(
        self,
        app: ASGIApp,
        engine: Engine,
        grace: float = DEFAULT_GRACE,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=round(grace + _LAST_WORDS),
            )
        )
        self._engine = engine
        self._grace = grace
        self._on_ready = on_ready
        self._hurried = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self._on_ready is not None:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, let answers end or cut them, close the connections."""
        self._engine.close()
        cutting = asyncio.create_task(self._cut_in_time())
        try:
            await super().shutdown(sockets)
        finally:
            cutting.cancel()
            self._engine.cut()
        await asyncio.to_thread(self._engine.join, _LAST_WORDS)

    async def _cut_in_time(self) -> None:
        end = time.monotonic() + self._grace
        while time.monotonic() < end and not self._hurried:  # noqa: ASYNC110 - a signal's handler may set no event
            await asyncio.sleep(_LOOK)
        self._engine.cut()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to end; at once where that was asked for before."""
        # Nothing more is done here: a signal comes at any point of the program, also where the engine's lock is held.
        self._hurried = self.should_exit
        self.should_exit = True
        del sig, frame

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Heed signals meanwhile; uvicorn would raise them once more afterwards, and an end in order be a kill.

        Once one has come, a further Ctrl-C is not heeded: the program is about to end, and that with a traceback.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            ending = {signal.SIGINT: signal.SIG_IGN} if self.should_exit else {}
            for number, handler in (before | ending).items():
                signal.signal(number, handler)
