'''The line that a person types: editing, history, completion, several lines between """, and an editor for long ones.

Where the terminal understands no control sequences, lines are read as they come, with """ and without the rest.
'''

from __future__ import annotations

import os
import shlex
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from lyra_emergence.private_files import private_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from prompt_toolkit import PromptSession
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

    from lyra_emergence.cli.console import Console

__all__ = ["EmptyInterrupt", "LineReader", "PlainReader", "Suggestion", "TypedReader", "history_path", "unquoted"]

PROMPT: Final = "> "
CONTINUATION: Final = ". "
QUOTES: Final = '"""'
NOT_KEPT: Final = "the data folder cannot be written: questions are not kept for next time"
_EDITORS: Final = ("editor", "nano", "pico", "vi", "emacs")
"""What prompt_toolkit tries where neither VISUAL nor EDITOR is set."""

Suggestion = tuple[str, str]
"""What Tab offers for the text before the cursor's word, and what it means."""


class EmptyInterrupt(KeyboardInterrupt):
    """Ctrl-C while nothing was typed."""


def unquoted(text: str) -> str:
    '''Return what stands between """ and """, or the text as it is, without the white space around it.'''
    text = text.strip()
    if text.startswith(QUOTES):
        text = text.removeprefix(QUOTES).removesuffix(QUOTES).strip()
    return text


def is_open(text: str) -> bool:
    '''Return whether `text` begins with """ and does not end with another one.'''
    text = text.strip()
    return text.startswith(QUOTES) and not (len(text) >= 2 * len(QUOTES) and text.endswith(QUOTES))


def history_path() -> Path:
    """Return the file of the questions asked before, readable by its owner only; it is made where it is missing.

    Raises:
        OSError: It cannot be made.
    """
    return private_file("chat_history")


class PlainReader:
    """Reads lines from a terminal without control sequences, or from none."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def read(self) -> str:
        """Return what was typed, several lines where it began with quotes.

        Raises:
            EOFError: Ctrl-D.
            EmptyInterrupt: Ctrl-C.
        """
        text = self._line(PROMPT)
        while is_open(text):
            text += self._line(CONTINUATION)
        return text

    def wake(self) -> None:
        """Do nothing: a line that is being read cannot be given up."""

    def _line(self, prompt: str) -> str:
        self._console.stderr.write(prompt)
        self._console.stderr.flush()
        try:
            line = self._console.stdin.readline()
        except KeyboardInterrupt:
            self._console.say()
            raise EmptyInterrupt from None
        if not line:
            raise EOFError
        return line


class TypedReader:
    """Reads lines with prompt_toolkit.

    Args:
        console: The terminal.
        keep_history: Whether questions are kept for the next chat.
        suggest: Returns what Tab offers for the text before the cursor: how many of its last characters are replaced,
            and by what.
        status: Returns the line below the prompt.
        keys: Where keys come from, if not from the terminal.
        screen: What is drawn on, if not the terminal.

    Attributes:
        on_shown: Called once the first prompt is on the screen.
        broken: Returns whether a prompt should be given up; looked at when `wake` is called.
    """

    def __init__(
        self,
        console: Console,
        *,
        keep_history: bool = True,
        suggest: Callable[[str], tuple[int, Iterable[Suggestion]]] | None = None,
        status: Callable[[], str] | None = None,
        keys: Input | None = None,
        screen: Output | None = None,
    ) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output
        from prompt_toolkit.styles import Style

        self.on_shown: Callable[[], None] = lambda: None
        self.broken: Callable[[], bool] = lambda: False
        self._said = ""
        self._pressed = False
        self._status = status or (lambda: "")
        # The prompt must not end up in a redirected answer.
        stream = console.stdout if console.answers_to_terminal else console.stderr
        self._session: PromptSession[str] = PromptSession(
            history=_history(console, keep=keep_history),
            input=keys,
            output=screen or create_output(stream),
            completer=_completer(suggest) if suggest else None,
            complete_while_typing=False,
            reserve_space_for_menu=6,
            multiline=True,
            prompt_continuation=lambda *_: CONTINUATION,
            bottom_toolbar=self._toolbar if status else None,
            style=Style.from_dict({"bottom-toolbar": "noreverse", "bottom-toolbar.text": "ansibrightblack"}),
            key_bindings=self._bindings(),
            enable_suspend=True,
            tempfile_suffix=".md",
        )

    def read(self) -> str:
        """Return what was typed.

        Raises:
            EOFError: Ctrl-D at an empty prompt, or the prompt was given up because of `broken`.
            EmptyInterrupt: Ctrl-C at an empty prompt.
            KeyboardInterrupt: Ctrl-C on a line that was begun.
        """
        self._said = ""
        try:
            return self._session.prompt(PROMPT, pre_run=self._begun)
        except KeyboardInterrupt:
            if self._session.default_buffer.text:
                raise
            raise EmptyInterrupt from None

    def wake(self) -> None:
        """Draw the status line anew, or give the prompt up if it is `broken`; may be called from any thread."""
        app = self._session.app
        loop = app.loop
        if loop is None:
            return
        app.invalidate()
        if self.broken():
            with suppress(RuntimeError):  # the loop has just ended by itself
                loop.call_soon_threadsafe(self._give_up)

    def _begun(self) -> None:
        app = self._session.app
        if self.broken():
            app.exit(exception=EOFError())
            return
        if self._pressed:
            self._interrupt()
            return

        def shown(_: object) -> None:
            app.after_render -= shown
            on_shown, self.on_shown = self.on_shown, lambda: None
            on_shown()

        app.after_render += shown

    def _interrupt(self) -> None:
        """End the prompt with Ctrl-C: one that begins, as soon as it has begun; one that ends, as it does."""
        app = self._session.app
        self._pressed = app.future is None
        if not self._pressed and not app.is_done:
            app.exit(exception=KeyboardInterrupt(), style="class:aborting")

    def _give_up(self) -> None:
        app = self._session.app
        if app.is_running and not app.is_done:
            app.exit(exception=EOFError())

    def _toolbar(self) -> Any:
        return self._said or self._status()

    def _bindings(self) -> Any:
        from prompt_toolkit.enums import DEFAULT_BUFFER
        from prompt_toolkit.filters import has_focus, is_searching
        from prompt_toolkit.key_binding import KeyBindings

        bindings = KeyBindings()

        @bindings.add("enter", filter=~is_searching)
        def _enter(event: Any) -> None:
            buffer = event.current_buffer
            if is_open(buffer.text):
                buffer.newline(copy_margin=False)
            else:
                buffer.validate_and_handle()

        # prompt_toolkit's own raise where the prompt is not there yet, or not any more.
        @bindings.add("c-c", filter=has_focus(DEFAULT_BUFFER))
        @bindings.add("<sigint>")
        def _interrupted(_: Any) -> None:
            self._interrupt()

        @bindings.add("escape", "enter", filter=~is_searching)
        def _newline(event: Any) -> None:
            event.current_buffer.newline(copy_margin=False)

        @bindings.add("c-g", filter=~is_searching)
        def _edit(event: Any) -> None:
            self._said = "" if _has_editor() else "no editor was found: set EDITOR"
            if not self._said:
                event.current_buffer.open_in_editor()

        return bindings


LineReader = PlainReader | TypedReader


def _has_editor() -> bool:
    named = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    candidates = [shlex.split(named)[0]] if named and named.strip() else _EDITORS
    return any(shutil.which(name) for name in candidates)


def _completer(suggest: Callable[[str], tuple[int, Iterable[Suggestion]]]) -> Any:
    from prompt_toolkit.completion import Completer, Completion

    class Suggesting(Completer):
        def get_completions(self, document: Any, _event: Any) -> Any:
            length, found = suggest(document.text_before_cursor)
            for text, meaning in found:
                yield Completion(text, start_position=-length, display_meta=meaning)

    return Suggesting()


def _history(console: Console, *, keep: bool) -> Any:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class KeptHistory(FileHistory):
        def store_string(self, string: str) -> None:
            """Keep a question; a disk that is full must not end the chat."""
            try:
                super().store_string(string)
            except OSError:
                console.note(NOT_KEPT)

    if not keep:
        return InMemoryHistory()
    with suppress(OSError):
        return KeptHistory(str(history_path()))
    console.note(NOT_KEPT)
    return InMemoryHistory()
