"""Every rank but 0: silent, and there until rank 0 ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from lyra_emergence.distributed.board import Board
    from lyra_emergence.distributed.launch import Launch

__all__ = ["follow"]

_LOST: Final = 1
_PATIENCE: Final = timedelta(seconds=30)
"""How long a rank stays after a failure: torchrun ends the others, rank 0 too, as soon as it is gone."""


def follow(launch: Launch) -> int:
    """Be a rank other than 0, and return its exit status."""
    _be_silent()
    # A person's Ctrl-C is for rank 0, which decides what comes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from lyra_emergence.distributed.board import Board, Failure
    from lyra_emergence.distributed.leader import is_lost_connection
    from lyra_emergence.errors import LyraError

    try:
        board = Board(launch)
    except LyraError:
        return _LOST  # rank 0 cannot reach it either, and says so
    status = _Status()
    threading.Thread(target=_end_with_rank_0, args=(board, status), daemon=True, name="lyra-end").start()
    from lyra_emergence.distributed.loading import follow_request

    try:
        follow_request(launch, board)
    except BaseException as error:  # noqa: BLE001 - whatever it is, rank 0 tells it
        if is_lost_connection(error):
            # The end of another: rank 0 finds out which, as long as this one is still there.
            board.wait_for_end(board.another(), _PATIENCE)
            return _LOST
        failure = Failure.of(error, launch)
        status.code = failure.exit_code
        with contextlib.suppress(RuntimeError):
            board.fail(failure)
            board.wait_until_told(_PATIENCE)
        return failure.exit_code
    return 0


@dataclass(slots=True)
class _Status:
    """What this rank ends with, should rank 0 end now."""

    code: int = 0


def _end_with_rank_0(board: Board, status: _Status) -> None:
    try:
        ended = board.wait_for_end(board.another())
    except RuntimeError:
        ended = False
    if ended:
        os._exit(status.code)


def _be_silent() -> None:
    """Send what libraries print, also those in C++, nowhere."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
