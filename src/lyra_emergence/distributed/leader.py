"""Rank 0: it talks, and ends all ranks together.

Whatever goes wrong on whichever rank, a person reads of it once, here. Three threads see to that while the main thread
may be anywhere, in a collective that will never end too: one waits for what another rank says of its failure, one for
the signal by which torchrun ends the ranks once one of them is gone, and the main thread's own errors ask first whether
it is their turn. Whoever tells ends the process at once; the other ranks follow.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Final, NoReturn

from lyra_emergence.distributed.board import Board, Failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from lyra_emergence.distributed.launch import Launch

__all__ = ["Leader", "hold_signal", "is_lost_connection", "leading"]

_LEFT: Final = 0
"""What a person who leaves in the middle of a pass ends with: torchrun answers anything else with a traceback."""
_PATIENCE: Final = 3.0
"""Seconds in which a rank that fails says so; one that does not was killed."""
_PAUSE: Final = 0.05
_LONGEST_WORD: Final = 30.0
_LOST: Final = ("gloo", "Connection closed by peer", "Connection reset by peer", "Socket")
_SUMMARY: Final = (
    "torchrun's summary below has its exit code or signal; the kernel kills (signal 9) where main memory runs out"
)

_leaders: list[Leader] = []


def leading() -> Leader | None:
    """Return this process's leader; None where it is no rank 0."""
    return _leaders[0] if _leaders else None


class Leader:
    """Rank 0 among the others.

    Args:
        launch: What torchrun started.
        tell: Prints an error and its hint.

    Raises:
        LyraError: The ranks cannot meet.
    """

    def __init__(self, launch: Launch, tell: Callable[[str, str], None]) -> None:
        self.launch = launch
        self.board = Board(launch)
        self._tell = tell
        self._word = threading.Lock()
        self._restore = _terminal_as_it_is()
        self._store = self.board.another()
        threading.Thread(target=self._watch_failures, daemon=True, name="lyra-failures").start()
        if sys.platform != "win32":
            threading.Thread(target=self._watch_signal, daemon=True, name="lyra-signal").start()
        _leaders.append(self)

    def claim(self) -> None:
        """Take the right to tell a person of an error; where another thread has it, wait for it to end the process."""
        if not self._word.acquire(blocking=False):
            self._wait_to_be_ended()

    def end(self) -> None:
        """End the other ranks: the program is over."""
        with contextlib.suppress(RuntimeError):
            self.board.end()

    def lose(self, error: BaseException) -> NoReturn:
        """End all ranks after an error in the middle of a pass.

        One that merely shows that another rank is gone gives way to what that one said, if it said anything.
        """
        if isinstance(error, KeyboardInterrupt):
            self._leave(_LEFT)
        if is_lost_connection(error):
            self._tell_of_loss()
        self.claim()
        self._finish(Failure.of(error, self.launch))

    def _watch_failures(self) -> None:
        try:
            failure = self.board.wait_for_failure(self._store)
        except RuntimeError:
            return  # the store is gone with torchrun, which ends us too
        self.claim()
        self._finish(failure)

    def _watch_signal(self) -> None:
        signal.sigwait({signal.SIGTERM})
        self._tell_of_loss()

    def _tell_of_loss(self) -> NoReturn:
        """Tell which rank is gone, unless one says itself what went wrong."""
        ended: list[int] = []
        until = time.monotonic() + _PATIENCE
        with contextlib.suppress(RuntimeError):  # the store may be gone as well
            while not ended and time.monotonic() < until:
                if self.board.has_failed():
                    self._wait_to_be_ended()
                ended = self.board.lost(range(1, self.launch.world_size))
                time.sleep(_PAUSE)
        self.claim()
        self._finish(_loss(ended))

    def _wait_to_be_ended(self) -> NoReturn:
        """Wait for the thread that tells."""
        time.sleep(_LONGEST_WORD)
        os._exit(1)

    def _finish(self, failure: Failure) -> NoReturn:
        """Tell a person and end; this thread has the right to."""
        self._restore()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            self._tell(failure.message, failure.hint)
        with contextlib.suppress(RuntimeError):
            self.board.tell()
        self._leave(failure.exit_code)

    def _leave(self, code: int) -> NoReturn:
        self.end()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def hold_signal() -> None:
    """Keep SIGTERM for the thread that waits for it; call it before there are other threads."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def is_lost_connection(error: BaseException) -> bool:
    """Return whether a collective failed since a rank is gone. gloo raises bare RuntimeErrors."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)


def _loss(ranks: list[int]) -> Failure:
    if not ranks:
        return Failure("torchrun ended the ranks: one of them is gone, or torchrun was stopped", _SUMMARY, 1)
    named = f"rank {ranks[0]}" if len(ranks) == 1 else f"one of the ranks {', '.join(map(str, ranks))}"
    return Failure(f"{named} ended without saying why, as a process does that is killed", _SUMMARY, 1)


def _terminal_as_it_is() -> Callable[[], None]:
    """Return what gives the terminal the settings back that it has now."""
    if sys.platform == "win32":
        return lambda: None
    import termios

    try:
        descriptor = sys.stdin.fileno()
        settings = termios.tcgetattr(descriptor)
    except (OSError, ValueError, AttributeError, termios.error):
        return lambda: None
    return lambda: termios.tcsetattr(descriptor, termios.TCSANOW, settings)
