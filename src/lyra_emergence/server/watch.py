"""What the page shows of the server as it happens: where blocks are, memory that ran out, how fast tokens come.

The model's threads only leave a note and wake the event loop; everything else happens there and in a thread of its
own. While nobody listens, nothing is looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from lyra_emergence.server.broadcast import Broadcast
from lyra_emergence.server.picture import BlockPicture, DevicePicture, blocks_now, devices_now, free_now
from lyra_emergence.server.streams import KEEP_ALIVE, named_event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from lyra_emergence.load_report import LoadEvent
    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.server.broadcast import Mailbox
    from lyra_emergence.server.engine import Engine

__all__ = ["Figures", "MemoryEvent", "Picture", "Watch"]

_BEAT: Final = 1.0
"""Seconds between two looks while something runs."""
_QUIET: Final = 15.0
"""Seconds after which a listener is sent a sign of life."""
_REMEMBERED: Final = 20
"""Memory events that a new listener is told of."""
_TOLD: Final = frozenset({"recover", "demote", "promote", "note"})
_DIGITS: Final = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """Something that happened to the model's memory.

    Attributes:
        number: Counts them, from 1.
        kind: "load" (a rung that failed while the model was loaded), "recover" (memory ran out and an answer went on),
            "demote" (blocks made room before an answer), "promote" (blocks came back) or "note".
        message: What happened, for a person.
        at: When, in seconds since 1970.
    """

    number: int
    kind: str
    message: str
    at: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What the server is doing.

    Attributes:
        running: Answers that run.
        waiting: Requests that wait.
        reserved_tokens: Tokens that running answers may come to.
        room_tokens: Tokens that they may come to at most.
        tokens_per_second: How fast tokens come of late, all answers together.
        free: Bytes that can be taken now, by device.
    """

    running: int
    waiting: int
    reserved_tokens: int
    room_tokens: int
    tokens_per_second: float
    free: dict[str, int]


@dataclass(frozen=True, slots=True)
class Picture:
    """The model on its devices at one moment.

    Attributes:
        model: What clients call it.
        context_length: Tokens of prompt and answer together.
        rung: The rung of the plan's ladder that it was loaded at.
        journal: The name of the journal that questions of the page are answered from; None without one.
        devices: Each device.
        blocks: Each block, in the order in which they run.
        figures: What the server is doing.
        memory_events: The last things that happened to its memory, oldest first.
    """

    model: str
    context_length: int
    rung: str
    journal: str | None
    devices: tuple[DevicePicture, ...]
    blocks: tuple[BlockPicture, ...]
    figures: Figures
    memory_events: tuple[MemoryEvent, ...]


class Watch:
    """Tells listeners of one server.

    Args:
        loaded: The model; what is told of its memory is heard here too from now on.
        engine: What runs its answers; where it is closed, all listeners end.
        name: What clients call the model.
        journal: The journal's name, or None.
    """

    def __init__(self, loaded: LoadedModel, engine: Engine, name: str, journal: str | None) -> None:
        self._loaded = loaded
        self._engine = engine
        self._name = name
        self._journal = journal
        self._broadcast = Broadcast()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stirred = asyncio.Event()
        self._beating: asyncio.Task[None] | None = None
        self._devices = self._devices_of_blocks()
        self._last: Figures | None = None
        self._noting = threading.Lock()
        self._number = 0
        self._history: deque[MemoryEvent] = deque(maxlen=_REMEMBERED)
        self._untold: deque[MemoryEvent] = deque(maxlen=_REMEMBERED)
        for attempt in loaded.report.attempts:
            if attempt.outcome == "out of memory":
                self._note("load", f"rung '{attempt.rung}' ran out of memory while loading: {attempt.reason}")
        loaded.tell = self._heard_too(loaded.tell)
        engine.at_close(self._end)

    def picture(self) -> Picture:
        """Return the model as it is now. Asks the machine what is free, which takes some milliseconds."""
        devices = devices_now(self._loaded)
        free = {device.device: device.free_now for device in devices if device.free_now is not None}
        return Picture(
            model=self._name,
            context_length=self._loaded.context_length,
            rung=self._loaded.report.rung,
            journal=self._journal,
            devices=devices,
            blocks=blocks_now(self._loaded),
            figures=self._figures(free),
            memory_events=self._noted(),
        )

    def join(self) -> Mailbox:
        """Return the mailbox of a new listener, to be given to `events` and, at the end, to `leave`.

        Raises:
            RequestError: There are too many, or the server is shutting down.
        """
        mailbox = self._broadcast.join()
        self._loop = asyncio.get_running_loop()
        if self._beating is None or self._beating.done():
            self._beating = asyncio.create_task(self._beat())
        return mailbox

    def leave(self, mailbox: Mailbox) -> None:
        """Forget a listener; with the last one, nothing is looked at any more."""
        self._broadcast.leave(mailbox)
        if not self._broadcast and self._beating is not None:
            self._beating.cancel()
            self._beating = None

    async def events(self, mailbox: Mailbox, seconds: float | None) -> AsyncIterator[bytes]:
        """Yield the picture, and then what changes.

        Args:
            mailbox: What `join` returned.
            seconds: How long; None for as long as the server and the listener are there.
        """
        yield named_event("placement", asdict(await asyncio.to_thread(self.picture)))
        end = None if seconds is None else time.monotonic() + seconds
        while end is None or time.monotonic() < end:
            try:
                event = await mailbox.next(_QUIET if end is None else min(_QUIET, max(0, end - time.monotonic())))
            except TimeoutError:
                event = KEEP_ALIVE
            if event is None:
                return
            yield event

    async def _beat(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_BEAT):
                    await self._stirred.wait()
            self._stirred.clear()
            try:
                await self._look()
            except Exception:  # noqa: BLE001 - the next look may see more
                _log.exception("what the page shows could not be looked at")

    async def _look(self) -> None:
        """Send what happened since the last look."""
        told = False
        while self._untold:
            self._send("memory", asdict(self._untold.popleft()))
            told = True
        devices = self._devices_of_blocks()
        if told or devices != self._devices:
            self._devices = devices
            self._send("placement", asdict(await asyncio.to_thread(self.picture)))
        before = self._last
        if before is None or self._engine.figures().running or before.running or before.waiting:
            self._last = self._figures(await asyncio.to_thread(free_now, self._loaded))
            if before is None or before.running or before != self._last:
                self._send("figures", asdict(self._last))

    def _send(self, name: str, data: Any) -> None:
        self._broadcast.send(named_event(name, data))

    def _figures(self, free: dict[str, int]) -> Figures:
        figures = self._engine.figures()
        return Figures(
            running=figures.running,
            waiting=figures.waiting,
            reserved_tokens=figures.reserved,
            room_tokens=figures.room,
            tokens_per_second=round(figures.tokens_per_second, _DIGITS),
            free=free,
        )

    def _devices_of_blocks(self) -> tuple[str, ...]:
        return tuple(block.device for block in self._loaded.blocks)

    def _heard_too(self, tell: Callable[[LoadEvent], None]) -> Callable[[LoadEvent], None]:
        def both(event: LoadEvent) -> None:
            tell(event)
            if event.kind in _TOLD:
                self._note(event.kind, event.message)

        return both

    def _note(self, kind: str, message: str) -> None:
        """Note what happened. Called by the model's threads, in the middle of a lack of memory: it does no more."""
        with self._noting:
            self._number += 1
            event = MemoryEvent(self._number, kind, message, round(time.time(), _DIGITS))
            self._history.append(event)
        if self._loop is not None:
            self._untold.append(event)
            self._wake(self._stirred.set)

    def _noted(self) -> tuple[MemoryEvent, ...]:
        with self._noting:
            return tuple(self._history)

    def _end(self) -> None:
        if self._loop is None:
            self._broadcast.close()
        else:
            self._wake(self._broadcast.close)

    def _wake(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # a loop that has ended has nobody who listens
            self._loop.call_soon_threadsafe(call)
