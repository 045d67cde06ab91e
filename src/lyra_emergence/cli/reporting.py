"""What is said of an error, and the exit status that it becomes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from lyra_emergence.cli.program import DEFAULT_COMMAND
from lyra_emergence.cli.status import FAILED, USAGE
from lyra_emergence.distributed.launch import find_launch
from lyra_emergence.errors import LyraError

if TYPE_CHECKING:
    from lyra_emergence.cli.console import Console

__all__ = ["program_name", "report"]

_PROGRAM_NAMES: Final = frozenset({"lyra.py", "lyra", "lyra.exe"})
# typer keeps its copy of click private; its public BadParameter leads to the base of all usage errors.
_UsageError: type[Any] = typer.BadParameter.__mro__[1]


def report(error: Exception, console: Console) -> int:
    """Print an error and return its exit status."""
    if find_launch(os.environ) is not None:
        from lyra_emergence.cli.ranks import claim_last_word

        claim_last_word()
    if isinstance(error, LyraError):
        console.error(str(error), error.hint)
        return error.exit_code
    if isinstance(error, _UsageError):
        if type(error).__name__ == "NoArgsIsHelpError":
            console.say(error.format_message())
        else:
            console.error(error.format_message(), f"{_usage_of(error)} --help lists the options")
        return USAGE
    return _report_unexpected(error, console)


def program_name() -> str:
    """Return what the program was called by."""
    name = Path(sys.argv[0]).name
    return name if name in _PROGRAM_NAMES else "lyra.py"


def _usage_of(error: Any) -> str:
    context = error.ctx
    if context is None or context.info_name == DEFAULT_COMMAND:
        return program_name()
    return str(context.command_path)


def _report_unexpected(error: Exception, console: Console) -> int:
    if console.verbose:
        import traceback

        console.say("".join(traceback.format_exception(error)).rstrip())
    text = str(error) or "no message"
    console.error(
        f"unexpected {type(error).__name__}: {text}",
        "" if console.verbose else "run it again with --verbose to see where, and report it with that output",
    )
    return FAILED
