"""An answer on its way to the terminal: streamed, cleaned, wrapped, interruptible, with its sources."""

from __future__ import annotations

import signal
import textwrap
import threading
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lyra_emergence.cli.console import ControlStripper, WordWrapper

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from lyra_emergence.chat import Answer, ChatSession, Source
    from lyra_emergence.cli.console import Console

__all__ = ["Interrupt", "catch_interrupt", "print_answer", "source_lines"]


@dataclass(slots=True)
class Interrupt:
    """Whether Ctrl-C was pressed."""

    pressed: bool = False


@contextmanager
def catch_interrupt() -> Iterator[Interrupt]:
    """Turn the first Ctrl-C inside into a flag, so that it never cuts a computation in two; the second one raises."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def note(_signal: int, _frame: FrameType | None) -> None:
        if interrupt.pressed:
            raise KeyboardInterrupt
        interrupt.pressed = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


def print_answer(session: ChatSession, question: str, console: Console) -> Answer | None:
    """Stream the answer to `question` and the sources it cites to stdout; return it, or None if nothing came.

    Raises:
        LyraError: The question cannot be answered.
        KeyboardInterrupt: Ctrl-C was pressed twice.
    """
    before = session.last
    with catch_interrupt() as interrupt, closing(session.ask(question)) as chunks:
        _stream((chunk.text for chunk in chunks), console, interrupt)
    answer = session.last if session.last is not before else None
    if answer is not None:
        _print_epilogue(answer, console)
    return answer


def _stream(pieces: Iterator[str], console: Console, interrupt: Interrupt) -> None:
    stripper = ControlStripper()
    wrapper = WordWrapper(console.width) if console.answers_to_terminal else None
    for piece in pieces:
        clean = stripper.feed(piece)
        console.write(wrapper.feed(clean) if wrapper else clean)
        if interrupt.pressed:
            break
    rest = stripper.flush()
    console.print(wrapper.feed(rest) + wrapper.flush() if wrapper else rest)


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
