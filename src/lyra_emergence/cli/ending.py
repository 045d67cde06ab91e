"""How the process ends: at once, with everything done that is to be done at the end."""

from __future__ import annotations

import atexit
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["run_and_end"]


def run_and_end(program: Callable[[], int]) -> int:
    """Run `program` and return its exit status, with which the process then ends at once.

    Python would first take every object of torch and transformers apart, for about a second in which the shell does
    not come back. What threads and libraries have to do at the end is done before: this runs behind all of it.
    """
    ended: list[int] = []

    def end() -> None:
        # Nothing is in `ended` where an error came out: Python prints it, and ends as it always does.
        if ended and _flushed():
            os._exit(ended[0])

    # Functions run in the reverse order: nothing that is imported later comes behind this one.
    atexit.register(end)
    ended.append(program())
    return ended[0]


def _flushed() -> bool:
    """Return whether all output is out; where it is not, Python has its own words and status for that."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        return False
    return True
