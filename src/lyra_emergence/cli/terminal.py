"""The terminal's keys while an answer streams: not shown, so that what is typed ahead does not run into it."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["silent_keys"]

_CTRL_C = b"\x03"


@contextmanager
def silent_keys(stdin: TextIO, *, read: bool = False) -> Iterator[None]:
    """Show no typed character on the terminal behind `stdin` for the length of the block.

    What is typed is kept for the next prompt, and Ctrl-C works as ever. Nothing happens where there is no terminal, or
    none of the kind that can do this (Windows).

    Args:
        stdin: The terminal.
        read: Read the keys, and let only this process have the signal of Ctrl-C: the terminal would send it to those
            that it knows, of which this one is none under torchrun. What is typed ahead is lost then.
    """
    if sys.platform == "win32" or not stdin.isatty():
        yield
        return
    import termios

    try:
        before = termios.tcgetattr(stdin)
    except termios.error:
        yield
        return
    silent = list(before)
    silent[3] &= ~(termios.ECHO | (termios.ISIG | termios.ICANON if read else 0))  # the local flags
    termios.tcsetattr(stdin, termios.TCSANOW, silent)
    try:
        if not read:
            yield
            return
        with _reading(stdin.fileno()):
            yield
    finally:
        termios.tcsetattr(stdin, termios.TCSANOW, before)


@contextmanager
def _reading(terminal: int) -> Iterator[None]:
    """Turn Ctrl-C, read as a key, into this process's SIGINT for the length of the block."""
    wake, end = os.pipe()

    def watch() -> None:
        while True:
            ready, _, _ = select.select([terminal, wake], [], [])
            if wake in ready:
                return
            if _CTRL_C in os.read(terminal, 1024):
                os.kill(os.getpid(), signal.SIGINT)

    reader = threading.Thread(target=watch, daemon=True, name="lyra-keys")
    reader.start()
    try:
        yield
    finally:
        os.write(end, b"x")
        reader.join()
        os.close(wake)
        os.close(end)
