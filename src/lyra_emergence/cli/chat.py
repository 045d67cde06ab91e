"""The chat: a line editor with history, answers that stream, and commands that begin with a slash."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final

from lyra_emergence.cli.answers import print_answer, source_lines
from lyra_emergence.cli.plan_view import render_plan, summary
from lyra_emergence.cli.prepare import loaded_model, prepare, start_session
from lyra_emergence.cli.status import INTERRUPTED
from lyra_emergence.cli.terminal import silent_keys
from lyra_emergence.errors import ConfigError, LyraError, is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

    from lyra_emergence.chat import ChatSession
    from lyra_emergence.cli.console import Console
    from lyra_emergence.cli.options import Options
    from lyra_emergence.cli.prepare import Prepared

__all__ = ["SLASH_COMMANDS", "Chat", "EmptyInterrupt", "SlashCommand", "history_path", "line_reader", "run_chat"]

PROMPT: Final = "> "
_APPLICATION: Final = "lyra-emergence"
_NOT_KEPT: Final = "the data folder cannot be written: questions are not kept for next time"


def run_chat(options: Options, console: Console) -> int:
    """Open a chat and return its exit status.

    Raises:
        LyraError: The chat cannot start.
    """
    if options.json:
        raise ConfigError("--json prints one answer, but there is no prompt", hint='write: lyra.py --json "..."')
    prepared = prepare(options, console)
    with loaded_model(prepared, console) as loaded:
        chat = Chat(start_session(prepared, loaded), prepared, console)
        chat.welcome()
        return chat.run(line_reader(console))


@dataclass(frozen=True, slots=True)
class SlashCommand:
    """A command of the chat.

    Attributes:
        names: What calls it, with the slash; the first one is shown in the help.
        help: What it does, in a line.
        run: Does it, given the chat and the text behind the name; returns an exit status to leave with, or None.
    """

    names: tuple[str, ...]
    help: str
    run: Callable[[Chat, str], int | None]


class Chat:
    """One chat on a terminal.

    Attributes:
        session: The conversation.
        prepared: The model's plan and the journal.
        console: Where it prints.
    """

    def __init__(self, session: ChatSession, prepared: Prepared, console: Console) -> None:
        self.session = session
        self.prepared = prepared
        self.console = console
        self._interrupts = 0

    def welcome(self) -> None:
        """Say what the chat runs on and how to leave it."""
        console = self.console
        console.say(summary(self.prepared.plan, self.prepared.title))
        console.say(self.prepared.describe_journal())
        console.say(console.style("Ask a question. /help lists the commands, Ctrl-D leaves.", "dim"))
        console.say()

    def run(self, read_line: Callable[[], str]) -> int:
        """Answer lines until the user leaves; return the exit status.

        Args:
            read_line: Returns the next line; raises EOFError at Ctrl-D and `EmptyInterrupt` or KeyboardInterrupt at
                Ctrl-C.
        """
        while True:
            try:
                line = read_line().strip()
            except EOFError:
                return 0
            except KeyboardInterrupt as pressed:
                if self._interrupted(at_empty_prompt=isinstance(pressed, EmptyInterrupt)):
                    return INTERRUPTED
                continue
            self._interrupts = 0
            code = self.handle(line) if line else None
            if code is not None:
                return code

    def handle(self, line: str) -> int | None:
        """Run a command or answer a question; return an exit status to leave with, or None."""
        if line.startswith("/"):
            return self._command(line)
        try:
            with silent_keys(self.console.stdin):
                print_answer(self.session, line, self.console)
        except KeyboardInterrupt:
            self.console.say()
        except LyraError as error:
            self.console.error(str(error), error.hint)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.console.error(f"memory ran out: {error}", "ask something shorter, or restart with a smaller --context")
        self.console.say()
        return None

    def _command(self, line: str) -> int | None:
        name, _, rest = line.partition(" ")
        command = next((c for c in SLASH_COMMANDS if name in c.names), None)
        if command is None:
            near = get_close_matches(name, [n for c in SLASH_COMMANDS for n in c.names], n=1)
            hint = f"did you mean {near[0]}?" if near else "/help lists the commands"
            self.console.error(f"there is no command {name}", hint)
            return None
        return command.run(self, rest.strip())

    def _interrupted(self, *, at_empty_prompt: bool) -> bool:
        """Count Ctrl-C at an empty prompt; return whether it was the second in a row."""
        self._interrupts = self._interrupts + 1 if at_empty_prompt else 0
        if self._interrupts == 1:
            self.console.say("Press Ctrl-C again or Ctrl-D to leave.")
        return self._interrupts > 1


class EmptyInterrupt(KeyboardInterrupt):
    """Ctrl-C while nothing was typed."""


def _help(chat: Chat, _rest: str) -> None:
    rows = [(", ".join(command.names), command.help) for command in SLASH_COMMANDS]
    rows += [("Ctrl-C", "stop the answer; twice at an empty prompt: leave"), ("Ctrl-D", "leave")]
    widest = max(len(names) for names, _ in rows)
    for names, text in rows:
        chat.console.say(f"  {names.ljust(widest)}  {text}")


def _clear(chat: Chat, _rest: str) -> None:
    chat.session.clear()
    chat.console.say("The conversation starts anew.")


def _sources(chat: Chat, _rest: str) -> None:
    answer = chat.session.last
    if answer is None or not answer.sources:
        chat.console.say("No journal entry was given to the model for the last answer.")
        return
    for source in answer.sources:
        for line in source_lines(source, chat.console, passage=True):
            chat.console.say(line)


def _plan(chat: Chat, _rest: str) -> None:
    for line in render_plan(chat.prepared.plan, chat.prepared.title, chat.console):
        chat.console.say(line)


def _exit(_chat: Chat, _rest: str) -> int:
    return 0


SLASH_COMMANDS: Final = (
    SlashCommand(("/help",), "list the commands", _help),
    SlashCommand(("/sources",), "show the journal passages behind the last answer", _sources),
    SlashCommand(("/plan",), "show where the model's layers are", _plan),
    SlashCommand(("/clear",), "forget the conversation", _clear),
    SlashCommand(("/exit", "/quit"), "leave", _exit),
)


def history_path() -> Path:
    """Return the file of the questions asked before, readable by its owner only; it is made where it is missing.

    Raises:
        OSError: It cannot be made.
    """
    from platformdirs import user_data_path

    path = user_data_path(_APPLICATION, appauthor=False) / "chat_history"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    path.chmod(0o600)
    return path


def line_reader(console: Console, *, keys: Input | None = None, screen: Output | None = None) -> Callable[[], str]:
    """Return a function that reads a line, with editing and history where the terminal can."""
    if console.dumb:
        return _plain_reader(console)
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    # The prompt must not end up in a redirected answer.
    stream = console.stdout if console.answers_to_terminal else console.stderr
    prompt: PromptSession[str] = PromptSession(
        history=_history(console), input=keys, output=screen or create_output(stream)
    )

    def read() -> str:
        try:
            return prompt.prompt(PROMPT)
        except KeyboardInterrupt:
            if prompt.default_buffer.text:
                raise
            raise EmptyInterrupt from None

    return read


def _plain_reader(console: Console) -> Callable[[], str]:
    def read() -> str:
        console.stderr.write(PROMPT)
        console.stderr.flush()
        try:
            line = console.stdin.readline()
        except KeyboardInterrupt:
            console.say()
            raise EmptyInterrupt from None
        if not line:
            raise EOFError
        return line

    return read


def _history(console: Console) -> Any:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class KeptHistory(FileHistory):
        def store_string(self, string: str) -> None:
            """Keep a question; a disk that is full must not end the chat."""
            try:
                super().store_string(string)
            except OSError:
                console.note(_NOT_KEPT)

    with suppress(OSError):
        return KeptHistory(str(history_path()))
    console.note(_NOT_KEPT)
    return InMemoryHistory()
