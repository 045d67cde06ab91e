"""The terminal's echo: off while an answer streams, so that what is typed ahead does not run into it."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["silent_keys"]


@contextmanager
def silent_keys(stdin: TextIO) -> Iterator[None]:
    """Show no typed character on the terminal behind `stdin` for the length of the block.

    What is typed is kept for the next prompt, and Ctrl-C works as ever. Nothing happens where there is no terminal, or
    none of the kind that can do this (Windows).
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
    silent[3] &= ~termios.ECHO  # the local flags
    termios.tcsetattr(stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(stdin, termios.TCSANOW, before)
