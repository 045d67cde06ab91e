"""The chat: a prompt that is there while the model still loads, answers that stream, and commands behind a slash."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING

from lyra_emergence.cli.answers import View, print_answer
from lyra_emergence.cli.behind import LoadFailed, ModelBehind
from lyra_emergence.cli.commands import SLASH_COMMANDS, suggestions
from lyra_emergence.cli.editor import EmptyInterrupt, PlainReader, TypedReader, unquoted
from lyra_emergence.cli.keeping import Keeping, begin_session, open_keeping
from lyra_emergence.cli.ready import describe_journal
from lyra_emergence.cli.settings import Settings
from lyra_emergence.cli.start import settle
from lyra_emergence.cli.status import INTERRUPTED
from lyra_emergence.cli.terminal import silent_keys
from lyra_emergence.distributed.launch import find_launch
from lyra_emergence.errors import ConfigError, LyraError, is_out_of_memory
from lyra_emergence.journal.text import shorten

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

    from lyra_emergence.chat import ChatChunk, ChatSession
    from lyra_emergence.chunks import GenerationStats
    from lyra_emergence.cli.console import Console
    from lyra_emergence.cli.editor import LineReader, Suggestion
    from lyra_emergence.cli.options import Options
    from lyra_emergence.cli.ready import OpenModel, Ready
    from lyra_emergence.conversations import Conversation
    from lyra_emergence.turns import Turn

__all__ = ["SLASH_COMMANDS", "Chat", "line_reader", "run_chat"]

_WHOLE_NUMBERS = 10
"""Tokens a second from which on their fractions tell nothing."""
_LONGEST_RECALL = 400
"""Characters of the last answer that a continued conversation shows again."""


def run_chat(options: Options, console: Console) -> int:
    """Open a chat and return its exit status.

    Raises:
        LyraError: The chat cannot start, or its model could not be loaded.
    """
    if options.json:
        raise ConfigError("--json prints one answer, but there is no prompt", hint='write: lyra.py --json "..."')
    with open_keeping(options, console) as keeping:
        ready = settle(options, console)
        behind = ModelBehind(ready, console)
        chat = Chat(ready, console, behind.wait, keeping=keeping, view=View(stream=options.stream), loading=behind)
        chat.welcome()
        try:
            code = chat.run(_reader(chat, behind, console, keep_history=not options.no_log).read)
        except LoadFailed as failed:
            raise failed.error from None
        if behind.error is not None:
            behind.tell()
            raise behind.error
    if behind.running:
        _leave_at_once(code)
    if behind.model is not None:
        behind.model.close()
    return code


def _reader(chat: Chat, behind: ModelBehind, console: Console, *, keep_history: bool) -> LineReader:
    """Return what reads lines, begins to load with its first prompt, and shows how far that is."""
    reader = line_reader(
        console, keep_history=keep_history, suggest=partial(suggestions, chat), status=chat.status_line
    )
    if isinstance(reader, TypedReader):
        reader.on_shown = behind.start
        reader.broken = lambda: behind.error is not None
        behind.on_change = reader.wake
    else:
        behind.start()
    return reader


def _leave_at_once(code: int) -> None:
    """End the process though a thread still loads: it is in the middle of C++ code that cannot be asked to stop."""
    sys.stdout.flush()
    sys.stderr.flush()
    if find_launch(os.environ) is not None:
        from lyra_emergence.cli.ranks import end_ranks

        end_ranks()
    os._exit(code)


class Chat:
    """One chat on a terminal.

    Args:
        ready: What answers, and the journal.
        console: Where it prints.
        model: Returns the model, as soon as it is there.
        keeping: The conversation.
        view: How answers are shown.
        loading: What loads the model, for the status line.
        session: The conversation's session; made of the model when it is first needed, if not given.
    """

    def __init__(
        self,
        ready: Ready,
        console: Console,
        model: Callable[[], OpenModel],
        *,
        keeping: Keeping | None = None,
        view: View | None = None,
        loading: ModelBehind | None = None,
        session: ChatSession | None = None,
    ) -> None:
        self.ready = ready
        self.console = console
        self.keeping = keeping or Keeping(None)
        self._model = model
        self._view = view or View()
        self._loading = loading
        self._session = session
        self._interrupts = 0

    @property
    def model(self) -> OpenModel:
        """The model; waits until it is there."""
        return self._model()

    @property
    def session(self) -> ChatSession:
        """The conversation; waits for the model."""
        if self._session is None:
            self._session = begin_session(self.ready, self.model, self.keeping)
        return self._session

    @property
    def settings(self) -> Settings:
        """What `/set` changes."""
        return Settings(self.session.options, self.session.passages, self._view)

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self.session.options, self.session.passages = settings.options, settings.passages
        self._view = settings.view

    def welcome(self) -> None:
        """Say what the chat runs on and how to leave it."""
        console = self.console
        console.tell(self.ready.summary())
        console.tell(describe_journal(self.ready.journal))
        if self.keeping.continued is not None:
            self.tell_continued(self.keeping.continued, self.keeping.turns)
        console.tell("Ask a question. /help lists the commands, Ctrl-D leaves.", "dim")
        console.say()

    def tell_continued(self, conversation: Conversation, turns: Sequence[Turn]) -> None:
        """Say which conversation goes on, and how it ended."""
        count = len(turns)
        self.console.say(f"conversation {conversation.id}, {count} turn{'' if count == 1 else 's'} so far")
        if turns:
            recalled = (f"> {turns[-1].question}", turns[-1].answer.text)
            for text in recalled:
                self.console.tell(shorten(text, _LONGEST_RECALL), "dim")

    def run(self, read_line: Callable[[], str]) -> int:
        """Answer lines until the user leaves; return the exit status.

        Args:
            read_line: Returns the next line; raises EOFError at Ctrl-D and `EmptyInterrupt` or KeyboardInterrupt at
                Ctrl-C.

        Raises:
            LoadFailed: The model that it waited for could not be loaded.
        """
        while True:
            try:
                line = unquoted(read_line())
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
        try:
            if line.startswith("/"):
                return self._command(line)
            self.show(lambda: self.session.ask(line))
        except KeyboardInterrupt:
            self.console.say(self.console.style("(stopped)", "dim"))
        except LyraError as error:
            self.console.error(str(error), error.hint)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.console.error(f"memory ran out: {error}", "ask something shorter, or restart with a smaller --context")
        return None

    def show(self, begin: Callable[[], Generator[ChatChunk, None, None]]) -> None:
        """Print the answer that `begin` begins."""
        try:
            with silent_keys(self.console.stdin, read=find_launch(os.environ) is not None):
                session = self.session
                print_answer(session, begin(), self.console, self._view)
        finally:
            self.console.say()

    def status_line(self) -> str:
        """Return the line below the prompt, as wide as the terminal at most."""
        parts = list(self._status())
        dot = " · " if self.console.can_show("·") else " - "
        while len(parts) > 1 and len(dot.join(parts)) > self.console.width - 1:
            # The model's name says least: it was chosen by whoever reads this.
            parts.pop(0)
        return shorten(dot.join(parts), self.console.width - 1)

    def _status(self) -> Iterator[str]:
        if self._loading is not None and self._loading.model is None:
            yield self.ready.title
            if state := self._loading.state:
                yield state
            return
        placement = self.model.placement()
        if self.ready.title not in placement:  # a server's placement is its name
            yield self.ready.title
        yield placement
        if self._session is None:
            return
        answered = [turn.answer.stats for turn in self._session.turns if turn.answer.stats is not None]
        stats = answered[-1] if answered else None
        if stats is not None:
            yield f"context {stats.prompt_tokens + stats.new_tokens}/{self._session.context_length}"
            if stats.tokens_per_second:
                yield f"{_speed(stats)} tok/s"

    def figures(self) -> Iterator[tuple[str, str]]:
        """Yield what `/stats` shows: a name and its text."""
        session, model = self.session, self.model
        yield "model", self.ready.summary()
        yield "placement", model.placement()
        yield "turns", str(len(session.turns))
        last = session.last
        stats = last.stats if last is not None else None
        if stats is None:
            yield "context", f"{session.context_length} tokens"
        else:
            used = stats.prompt_tokens + stats.new_tokens
            yield "context", f"{used} of {session.context_length} tokens used by the last answer"
            yield "prompt", f"{stats.prompt_tokens} tokens, {stats.reused_tokens} of them kept from before"
            yield "first token", f"after {stats.prefill_seconds:.2f} s"
            yield "answer", f"{stats.new_tokens} tokens, {_speed(stats)} a second"
        log = session.log
        kept = f"{log.id}, continued by --conversation {log.id}" if log is not None and log.kept else "not kept"
        yield "conversation", kept

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


def _speed(stats: GenerationStats) -> str:
    speed = stats.tokens_per_second
    return f"{speed:.0f}" if speed >= _WHOLE_NUMBERS else f"{speed:.1f}"


def line_reader(
    console: Console,
    *,
    keep_history: bool = True,
    suggest: Callable[[str], tuple[int, Iterable[Suggestion]]] | None = None,
    status: Callable[[], str] | None = None,
    keys: Input | None = None,
    screen: Output | None = None,
) -> LineReader:
    """Return what reads lines, with editing and history where the terminal can."""
    if console.dumb:
        return PlainReader(console)
    return TypedReader(console, keep_history=keep_history, suggest=suggest, status=status, keys=keys, screen=screen)
