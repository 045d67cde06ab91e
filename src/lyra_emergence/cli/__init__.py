"""The program: parses, prints, and leaves the work to the library."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main", "run_program"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status.

    Args:
        argv: The arguments after the program's name; those of this process where None.

    Returns:
        0 done, 1 failed, 2 bad usage or configuration, 3 the model does not fit, 130 interrupted.
    """
    from lyra_emergence.cli.app import run

    return run(argv)


def run_program() -> int:
    """Run the program on this process's arguments and return its exit status; the process ends with it at once."""
    from lyra_emergence.cli.ending import run_and_end

    return run_and_end(main)
