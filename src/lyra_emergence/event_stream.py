"""Server-sent events (WHATWG HTML, section 9.2), as far as answers need them: the data of each event."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lyra_emergence.errors import EndpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["events"]

MAX_EVENT: Final = 4 * 2**20
"""Bytes of one event at most: a server that never ends a line must not fill the memory."""


def events(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the data of each event in a stream that arrives in parts; lines end with LF, CR LF or CR.

    An event that the end of the stream cuts off is yielded too: servers exist that leave out the last empty line.

    Raises:
        EndpointError: An event is larger than 4 MiB.
    """
    data: list[bytes] = []
    size = 0
    for line in _lines(parts):
        if not line:
            if data:
                yield b"\n".join(data)
            data, size = [], 0
        elif line.startswith(b"data:"):
            value = line.removeprefix(b"data:").removeprefix(b" ")
            size += len(value)
            _bound(size)
            data.append(value)
    if data:
        yield b"\n".join(data)


def _lines(parts: Iterable[bytes]) -> Iterator[bytes]:
    held = b""
    for part in parts:
        held += part
        _bound(len(held) if b"\n" not in held and b"\r" not in held else 0)
        # A CR at the very end may be half of a CR LF.
        whole, tail = (held[:-1], held[-1:]) if held.endswith(b"\r") else (held, b"")
        *lines, held = whole.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        held += tail
        yield from lines
    if held.strip():
        yield held.rstrip(b"\r\n")


def _bound(size: int) -> None:
    if size > MAX_EVENT:
        raise EndpointError("the server sends an event without an end", hint="check that it is a chat server")
