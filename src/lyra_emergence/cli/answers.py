"""An answer on its way to the terminal: streamed, cleaned, rendered, interruptible, with its sources."""

from __future__ import annotations

import signal
import textwrap
import threading
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lyra_emergence.cli.console import ControlStripper, WordWrapper
from lyra_emergence.cli.markdown import MarkdownStream, renders_markdown
from lyra_emergence.cli.progress import working
from lyra_emergence.errors import LyraError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from types import FrameType

    from lyra_emergence.chat import Answer, ChatChunk, ChatSession, Source
    from lyra_emergence.cli.console import Console

__all__ = ["Interrupt", "View", "catch_interrupt", "print_answer", "source_lines"]


@dataclass(frozen=True, slots=True)
class View:
    """How answers are shown.

    Attributes:
        stream: As they come; else whole.
        markdown: Rendered where a terminal can; else as the model wrote them.
    """

    stream: bool = True
    markdown: bool = True


@dataclass(slots=True)
class Interrupt:
    """Whether Ctrl-C was pressed."""

    pressed: bool = False


@contextmanager
def catch_interrupt(*, at_once: bool = False) -> Iterator[Interrupt]:
    """Turn the first Ctrl-C inside into a flag, so that it never cuts a computation in two; the second one raises.

    Args:
        at_once: Let the first one raise too: nothing is computed here, and what is waited for may never come.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def note(_signal: int, _frame: FrameType | None) -> None:
        if interrupt.pressed or at_once:
            interrupt.pressed = True
            raise KeyboardInterrupt
        interrupt.pressed = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


def print_answer(
    session: ChatSession,
    chunks: Generator[ChatChunk, None, None],
    console: Console,
    view: View = View(),
) -> Answer | None:
    """Print the answer and the sources it cites to stdout; return it, or None if nothing came.

    Args:
        session: The conversation.
        chunks: What its `ask` or `again` returned.
        console: Where to print.
        view: How.

    Raises:
        LyraError: The question cannot be answered, or the answer broke off; what came is printed.
        KeyboardInterrupt: Ctrl-C was pressed twice.
    """
    before = session.last
    waits = session.waits_on_others
    with catch_interrupt(at_once=waits) as interrupt:
        try:
            with closing(chunks):
                _show((chunk.text for chunk in chunks), console, interrupt, view)
        except KeyboardInterrupt:
            if not waits:
                raise
    answer = session.last if session.last is not before else None
    if answer is not None:
        _print_epilogue(answer, console)
    elif interrupt.pressed:
        console.say(console.style("(stopped)", "dim"))
    return answer


class _Sink(Protocol):
    """Where the clean text of an answer goes."""

    def feed(self, text: str) -> None:
        """Take a piece."""

    def close(self) -> None:
        """Show what is left."""


class _Text:
    """Plain text, its words kept whole where it goes to a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._wrapper = WordWrapper(console.width) if console.answers_to_terminal else None

    def feed(self, text: str) -> None:
        self._console.write(self._wrapper.feed(text) if self._wrapper else text)

    def close(self) -> None:
        self._console.print(self._wrapper.flush() if self._wrapper else "")


def _show(pieces: Iterator[str], console: Console, interrupt: Interrupt, view: View) -> None:
    sink: _Sink = MarkdownStream(console) if view.markdown and renders_markdown(console) else _Text(console)
    stripper = ControlStripper()
    shown = False
    pieces = _until(pieces, interrupt)
    try:
        for piece in pieces if view.stream else _whole(pieces, console):
            shown = shown or bool(piece)
            sink.feed(stripper.feed(piece))
    except BaseException:
        if shown:
            sink.feed(stripper.flush())
            sink.close()
        raise
    sink.feed(stripper.flush())
    sink.close()


def _whole(pieces: Iterator[str], console: Console) -> Iterator[str]:
    """Yield all pieces as one, also where they break off."""
    parts: list[str] = []
    failure: BaseException | None = None
    try:
        with working(console, "answering"):
            parts += pieces  # what came is in the list also where this raises
    except (LyraError, KeyboardInterrupt) as error:
        failure = error
    yield "".join(parts)
    if failure is not None:
        raise failure


def _until(pieces: Iterator[str], interrupt: Interrupt) -> Iterator[str]:
    for piece in pieces:
        yield piece
        if interrupt.pressed:
            return


def _print_epilogue(answer: Answer, console: Console) -> None:
    if answer.cited:
        console.print()
    for source in answer.cited:
        for line in source_lines(source, console):
            console.print(line)
    for note in answer.notes:
        console.note(note)
    if answer.unknown_citations:
        numbers = ", ".join(f"[{number}]" for number in answer.unknown_citations)
        console.warning(f"the answer cites {numbers}, which the journal search did not find")
    if answer.finish_reason == "interrupted":
        console.say(console.style("(stopped)", "dim"))
    elif answer.finish_reason == "length":
        console.note("the answer was cut at the most tokens it may have (--max-new-tokens)")
    elif answer.finish_reason == "loop":
        console.note("the answer was ended where the model only repeated itself ('max_repeats')")


def source_lines(source: Source, console: Console, *, passage: bool = False) -> Iterator[str]:
    """Yield the lines that show a source: its label, and its passage where `passage`."""
    label = source.label() if console.can_show(source.label()) else source.label().replace(" · ", " - ")
    yield console.style(label, "cyan", stream=console.stdout)
    if passage:
        yield from textwrap.wrap(source.passage, console.width, initial_indent="    ", subsequent_indent="    ")
