"""What reaches the terminal: answers on stdout, everything else on stderr, nothing that steers the terminal.

Covers: colors only where wanted, words kept whole at the right margin, notes said once, and the removal of control
sequences from text that a model or a file wrote. Does not cover: progress bars (`progress`), line editing (`chat`).
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Literal, TextIO

from lyra_emergence.errors import LyraError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "Console",
    "ControlStripper",
    "Style",
    "WordWrapper",
    "knows_ascii_alone",
    "strip_controls",
    "writing_output",
]

Style = Literal["bold", "dim", "red", "yellow", "green", "cyan", "magenta", "blue"]

_CODES: Final[Mapping[str, str]] = {
    "bold": "1",
    "dim": "2",
    "red": "31",
    "green": "32",
    "yellow": "33",
    "blue": "34",
    "magenta": "35",
    "cyan": "36",
}
_DEFAULT_WIDTH: Final = 80
_MIN_WIDTH: Final = 20
_NARROWEST_COLUMN: Final = 20
# Longer than any sequence that a terminal acts on; bounds what one unfinished sequence can hold back.
_MAX_SEQUENCE: Final = 512
_SEQUENCE = re.compile(
    r"""
    (?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]                                  # CSI: colors, cursor, modes
    | (?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)   # OSC, DCS, SOS, PM, APC
    | \x1b(?:[ -/]+[0-~]|[0-OQ-WYZ\\`-~])                             # two bytes, and charset selections
    """,
    re.VERBOSE,
)
_UNFINISHED = re.compile(r"(?:\x1b|[\x9b\x9d\x90\x98\x9e\x9f])[^\x07\x9c]*\Z", re.DOTALL)
# C0 but tab and line feed, DEL, C1, and the bidirectional overrides that reorder what a reader sees.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class ControlStripper:
    """Removes terminal control sequences from text that arrives in pieces.

    A sequence cut in two by a piece's end is removed as a whole; an unfinished one is held back up to 512 characters.
    Line feeds and tabs stay; carriage returns go, since they overwrite the line.
    """

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> str:
        """Return what of `text`, and of what was held back, may be printed now."""
        text = _without_sequences(self._held + text)
        self._held = ""
        unfinished = _UNFINISHED.search(text)
        if unfinished is not None and len(unfinished[0]) < _MAX_SEQUENCE:
            text, self._held = text[: unfinished.start()], unfinished[0]
        return _CONTROL.sub("", text)

    def flush(self) -> str:
        """Return what was held back and turned out to be no sequence."""
        held, self._held = self._held, ""
        return _CONTROL.sub("", held)


def _without_sequences(text: str) -> str:
    # Again until nothing changes: what stood inside a sequence may have kept it from being one.
    while (shorter := _SEQUENCE.sub("", text)) != text:
        text = shorter
    return text


def strip_controls(text: str, *, one_line: bool = False) -> str:
    """Return `text` without terminal control sequences; on one line where `one_line`."""
    stripper = ControlStripper()
    clean = stripper.feed(text) + stripper.flush()
    return " ".join(clean.split()) if one_line else clean


class WordWrapper:
    """Breaks streamed text between words at a width, so that the terminal never cuts one."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._word = ""
        self._gap = ""

    def feed(self, text: str) -> str:
        """Return the part of the text whose words are complete; the last word waits for its end."""
        parts: list[str] = []
        for character in text:
            if character == "\n":
                parts += [self._place(), "\n"]
                self._column, self._gap = 0, ""
            elif character.isspace():
                parts.append(self._place())
                self._gap += " " * (4 - self._column % 4) if character == "\t" else character
            else:
                self._word += character
        return "".join(parts)

    def flush(self) -> str:
        """Return the word that waited."""
        return self._place()

    def _place(self) -> str:
        if not self._word:
            return ""
        word, gap, width = self._word, self._gap, _columns(self._word)
        self._word = self._gap = ""
        if self._column and self._column + len(gap) + width > self._width:
            self._column = width
            return "\n" + word
        self._column += len(gap) + width
        return gap + word


def _columns(text: str) -> int:
    if text.isascii():
        return len(text)
    from prompt_toolkit.utils import get_cwidth

    return get_cwidth(text)


@contextmanager
def writing_output() -> Iterator[None]:
    """Turn a disk that is full behind stdout into an error of ours; a reader that left is none.

    Raises:
        LyraError: stdout cannot be written.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise LyraError(
            f"the output cannot be written: {reason}", hint="free some space, or write elsewhere"
        ) from error


def knows_ascii_alone(environ: Mapping[str, str]) -> bool:
    """Return whether a terminal's locale is C or POSIX, by its own word: Python would write UTF-8 all the same.

    Python sets LC_CTYPE to C.UTF-8 itself where nothing else was said (PEP 538), so that says nothing here; a terminal
    without any locale, as in a container, is taken to know UTF-8.
    """
    if environ.get("PYTHONIOENCODING") or environ.get("PYTHONUTF8"):
        return False
    named = environ.get("LC_ALL") or environ.get("LC_CTYPE", "").replace("C.UTF-8", "") or environ.get("LANG")
    return named in {"C", "POSIX"}


class Console:
    """The two output streams of one run of the program.

    Attributes:
        verbose: Whether debug lines are shown.
        environ: The environment variables that hold for it.
    """

    def __init__(
        self,
        *,
        verbose: bool = False,
        stdin: TextIO | None = None,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.stdin = stdin or sys.stdin
        self.stdout = stdout or sys.stdout
        self.stderr = stderr or sys.stderr
        self.verbose = verbose
        self.environ: Mapping[str, str] = os.environ if environ is None else environ
        self._said: set[str] = set()

    @property
    def interactive(self) -> bool:
        """Whether a person sits at both ends: stdin and stderr are terminals."""
        return _is_terminal(self.stdin) and _is_terminal(self.stderr)

    @property
    def answers_to_terminal(self) -> bool:
        """Whether stdout is a terminal."""
        return _is_terminal(self.stdout)

    @property
    def shows_progress(self) -> bool:
        """Whether stderr is a terminal that can redraw a line."""
        return _is_terminal(self.stderr) and not self.dumb

    @property
    def width(self) -> int:
        """Columns of the terminal, or 80 where output goes elsewhere."""
        if not (_is_terminal(self.stdout) or _is_terminal(self.stderr)):
            return _DEFAULT_WIDTH
        return max(_MIN_WIDTH, shutil.get_terminal_size((_DEFAULT_WIDTH, 24)).columns)

    @property
    def dumb(self) -> bool:
        """Whether the terminal understands no control sequences."""
        return self.environ.get("TERM", "") in {"dumb", "unknown"}

    def colored(self, stream: TextIO) -> bool:
        """Return whether `stream` is a terminal whose user did not turn colors off."""
        return _is_terminal(stream) and not self.dumb and not self.environ.get("NO_COLOR")

    def style(self, text: str, *styles: Style, stream: TextIO | None = None) -> str:
        """Return `text` in `styles` for `stream` (stderr where None), unchanged where colors are off."""
        if not styles or not self.colored(stream or self.stderr):
            return text
        return f"\x1b[{';'.join(_CODES[style] for style in styles)}m{text}\x1b[0m"

    def can_show(self, characters: str) -> bool:
        """Return whether stdout's encoding has all of `characters`."""
        try:
            characters.encode(getattr(self.stdout, "encoding", None) or "utf-8")
        except (UnicodeEncodeError, LookupError):
            return False
        return True

    def write(self, text: str) -> None:
        """Write a piece of the answer to stdout at once."""
        with writing_output():
            self.stdout.write(text)
            self.stdout.flush()

    def print(self, text: str = "") -> None:
        """Print a line on stdout."""
        self.write(text + "\n")

    def say(self, text: str = "") -> None:
        """Print a line on stderr."""
        self.stderr.write(text + "\n")
        self.stderr.flush()

    def columns(self, lead: str, text: str) -> list[str]:
        """Return lines of `lead` with `text` beside it, or below it where the terminal is too narrow for that."""
        room = self.width - len(lead)
        if room < _NARROWEST_COLUMN:
            below = textwrap.wrap(text, self.width - 6, initial_indent=" " * 6, subsequent_indent=" " * 6)
            return [lead.rstrip(), *below]
        first, *rest = textwrap.wrap(text, room) or [""]
        return [(lead + first).rstrip(), *(" " * len(lead) + line for line in rest)]

    def tell(self, text: str, *styles: Style) -> None:
        """Say text whose lines break between words."""
        for line in strip_controls(text).splitlines():
            for part in textwrap.wrap(line, self.width, subsequent_indent="  ", break_on_hyphens=False) or [""]:
                self.say(self.style(part, *styles))

    def note(self, text: str) -> None:
        """Say something worth knowing, once."""
        self._tell("note", text, "cyan")

    def warning(self, text: str) -> None:
        """Say something that may be wrong, once."""
        self._tell("warning", text, "yellow")

    def error(self, text: str, hint: str = "") -> None:
        """Say what failed, and what to do about it."""
        self._labelled("error", text, "red")
        if hint:
            self._labelled("hint", hint, "green")

    def debug(self, text: str) -> None:
        """Say something that only --verbose shows."""
        if self.verbose:
            self._labelled("debug", text, "dim")

    def _tell(self, label: str, text: str, style: Style) -> None:
        if text not in self._said:
            self._said.add(text)
            self._labelled(label, text, style)

    def _labelled(self, label: str, text: str, style: Style) -> None:
        lines = _wrap(f"{label}: {strip_controls(text)}", self.width if _is_terminal(self.stderr) else None)
        self.say(self.style(f"{label}:", "bold", style) + lines[len(label) + 1 :])


COMMAND_INDENT: Final = " " * 4
"""What a line begins with that is a command to copy: a break would cut it in two."""


def _wrap(text: str, width: int | None) -> str:
    """Break lines between words at `width`, continuing each at its own indent plus two; commands are left whole."""
    if width is None:
        return text
    lines = []
    for line in text.split("\n"):
        if line.startswith(COMMAND_INDENT):
            lines.append(line)
            continue
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        filled = textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
        lines += filled or [""]
    return "\n".join(lines)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # a closed or replaced stream
        return False
