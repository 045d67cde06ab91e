"""The commands of the chat, which begin with a slash."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lyra_emergence.cli.answers import source_lines
from lyra_emergence.cli.console import strip_controls
from lyra_emergence.cli.settings import SETTINGS, change
from lyra_emergence.errors import ConversationError
from lyra_emergence.journal.text import shorten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from lyra_emergence.cli.chat import Chat
    from lyra_emergence.cli.editor import Suggestion
    from lyra_emergence.turns import Turn

__all__ = ["SLASH_COMMANDS", "SlashCommand", "read_saved", "suggestions"]

JSON_FORMAT: Final = "lyra.conversation/1"
_LISTED: Final = 10
_MOST_BYTES: Final = 64 * 2**20
"""More than any conversation has; bounds what `/load` reads of a file that is none."""
_AGAIN_TEMPERATURE: Final = 0.7


@dataclass(frozen=True, slots=True)
class SlashCommand:
    """A command of the chat.

    Attributes:
        names: What calls it, with the slash; the first one is shown in the help.
        help: What it does, in a line.
        run: Does it, given the chat and the text behind the name; returns an exit status to leave with, or None.
        arguments: What may stand behind the name, as the help shows it.
    """

    names: tuple[str, ...]
    help: str
    run: Callable[[Chat, str], int | None]
    arguments: str = ""


def suggestions(chat: Chat, text: str) -> tuple[int, Iterable[Suggestion]]:
    """Return what Tab offers for a line that begins with `text`: how many characters it replaces, and by what."""
    if not text.startswith("/") or "\n" in text:
        return 0, ()
    name, space, rest = text.partition(" ")
    if not space:
        offered = ((n, command.help) for command in SLASH_COMMANDS for n in command.names)
        return len(text), [(n, help_) for n, help_ in offered if n.startswith(name)]
    found = list(_arguments(chat, name, rest))
    word = rest.rpartition(" ")[2]
    return len(word), [(argument, meaning) for argument, meaning in found if argument.startswith(word)]


def _arguments(chat: Chat, name: str, rest: str) -> Iterator[Suggestion]:
    """Yield what the next word behind a command may be."""
    before = rest.split(" ")[:-1]
    if name == "/set" and not before:
        yield from ((key, setting.help) for key, setting in SETTINGS.items())
    elif name == "/set" and before == ["markdown"]:
        yield from (("on", ""), ("off", ""))
    elif name == "/system" and not before:
        yield ("off", "no system message")
    elif name == "/load" and not before and chat.keeping.store is not None:
        yield from ((found.id, found.title) for found in chat.keeping.store.latest(2 * _LISTED))


def _help(chat: Chat, _rest: str) -> None:
    rows = [(" ".join((", ".join(c.names), c.arguments)).strip(), c.help) for c in SLASH_COMMANDS]
    rows += [
        ('"""', "begins a question of several lines, which ends with another one"),
        ("Tab", "completes a command"),
        ("Ctrl-G", "write the question in your editor"),
        ("Ctrl-R", "search the questions asked before"),
        ("Ctrl-C", "stop the answer; twice at an empty prompt: leave"),
        ("Ctrl-D", "leave"),
    ]
    widest = max(len(names) for names, _ in rows)
    for names, text in rows:
        for line in chat.console.columns(f"  {names.ljust(widest)}  ", text):
            chat.console.say(line)


def _clear(chat: Chat, _rest: str) -> None:
    chat.session.clear(chat.keeping.new_log(chat.ready))
    chat.console.say("The conversation starts anew.")


def _again(chat: Chat, _rest: str) -> None:
    session = chat.session
    options = session.options
    if not options.do_sample:
        # The likeliest words would be the same ones again.
        options = replace(options, do_sample=True, temperature=_AGAIN_TEMPERATURE)
    if options.seed is not None:
        options = replace(options, seed=options.seed + 1)
    chat.show(lambda: session.again(options))


def _undo(chat: Chat, _rest: str) -> None:
    turn = chat.session.undo()
    if turn is None:
        chat.console.say("There is nothing to take back.")
    else:
        chat.console.say(f"Taken back: {_one_line(turn.question, chat.console.width - 12)}")


def _system(chat: Chat, rest: str) -> None:
    if rest:
        chat.session.system = None if rest == "off" else rest
    said = chat.session.system
    chat.console.say(f"System message: {strip_controls(said)}" if said else "There is no system message.")


def _set(chat: Chat, rest: str) -> None:
    name, _, text = rest.partition(" ")
    if name:
        chat.settings = change(chat.settings, name, text.strip())
    widest = max(map(len, SETTINGS))
    shown = {name: SETTINGS[name]} if name else SETTINGS
    for key, setting in shown.items():
        value = setting.show(chat.settings)
        for line in chat.console.columns(f"  {key.ljust(widest)}  {value.ljust(6)}  ", setting.help):
            chat.console.say(line)


def _sources(chat: Chat, _rest: str) -> None:
    answer = chat.session.last
    if answer is None or not answer.sources:
        chat.console.say("No journal entry was given to the model for the last answer.")
        return
    for source in answer.sources:
        for line in source_lines(source, chat.console, passage=True):
            chat.console.say(line)


def _plan(chat: Chat, _rest: str) -> None:
    for line in chat.model.plan_lines(chat.console):
        chat.console.say(line)


def _stats(chat: Chat, _rest: str) -> None:
    for name, text in chat.figures():
        for line in chat.console.columns(f"  {name.ljust(12)}  ", text):
            chat.console.say(line)


def _save(chat: Chat, rest: str) -> None:
    session = chat.session
    if not session.turns:
        chat.console.say("There is nothing to save yet.")
        return
    from lyra_emergence.private_files import write_new

    name = session.log.id if session.log is not None else "conversation"
    path = Path(rest or f"{name}.md").expanduser()
    text = _as_json(session.turns, session.system) if path.suffix == ".json" else _as_markdown(session.turns)
    try:
        write_new(path, text)
    except FileExistsError:
        raise ConversationError(f"{path} is there already", hint="/save NAME writes another file") from None
    except OSError as error:
        raise ConversationError(f"{path} cannot be written: {(error.strerror or str(error)).lower()}") from error
    chat.console.say(f"Saved to {path}, readable by you only.")


def _load(chat: Chat, rest: str) -> None:
    if not rest:
        _list(chat)
        return
    store = chat.keeping.store
    if Path(rest).suffix == ".json":
        turns, system = read_saved(Path(rest).expanduser())
        log = chat.keeping.new_log(chat.ready)
        if log is not None:
            log.adopt(turns)
        chat.session.resume(turns, log, system)
        chat.console.say(f"Loaded {_count(len(turns))} from {rest}.")
        return
    if store is None:
        raise ConversationError("no conversations are kept in this chat", hint="/load FILE.json reads a saved one")
    found = store.find(rest)
    chat.session.resume(store.turns(found), store.reopen(found), found.system)
    chat.tell_continued(found, chat.session.turns)


def _list(chat: Chat) -> None:
    found = chat.keeping.store.latest(_LISTED) if chat.keeping.store is not None else []
    if not found:
        chat.console.say("No conversation is kept yet.")
        return
    for one in found:
        chat.console.say(_one_line(f"  {one.id}  {_count(one.count):>8}  {one.title}", chat.console.width))
    chat.console.say("/load ID goes on with one.")


def _exit(_chat: Chat, _rest: str) -> int:
    return 0


def read_saved(path: Path) -> tuple[tuple[Turn, ...], str | None]:
    """Return the turns and the system message of a file that `/save` wrote.

    Raises:
        ConversationError: It cannot be read, or is none.
    """
    from lyra_emergence.conversations import turn_from_data

    try:
        with path.open("rb") as file:
            data: Any = json.loads(file.read(_MOST_BYTES))
        if not isinstance(data, dict) or data.get("format") != JSON_FORMAT:
            raise ConversationError(f"{path} holds no saved conversation", hint="/save NAME.json writes one")
        system = data.get("system")
        return tuple(turn_from_data(turn) for turn in data["turns"]), system if isinstance(system, str) else None
    except OSError as error:
        raise ConversationError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConversationError(f"{path} holds no saved conversation: {error}") from error


def _as_json(turns: tuple[Turn, ...], system: str | None) -> str:
    from lyra_emergence.conversations import turn_as_data

    data = {"format": JSON_FORMAT, "system": system, "turns": [turn_as_data(turn) for turn in turns]}
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _as_markdown(turns: tuple[Turn, ...]) -> str:
    parts = []
    for turn in turns:
        parts += [f"## {' '.join(turn.question.split())}", turn.answer.text]
        parts += ["\n".join(f"- {source.label()}" for source in turn.answer.cited)] if turn.answer.cited else []
    return "\n\n".join(parts) + "\n"


def _count(turns: int) -> str:
    return f"{turns} turn{'' if turns == 1 else 's'}"


def _one_line(text: str, width: int) -> str:
    lead = text[: len(text) - len(text.lstrip())]
    return lead + shorten(strip_controls(text.strip(), one_line=False).replace("\n", " "), max(width - len(lead), 8))


SLASH_COMMANDS: Final = (
    SlashCommand(("/help",), "list the commands", _help),
    SlashCommand(("/clear",), "begin a new conversation", _clear),
    SlashCommand(("/regen",), "answer the last question again, otherwise", _again),
    SlashCommand(("/undo",), "take the last question and answer back", _undo),
    SlashCommand(("/system",), "show or change the system message", _system, "[TEXT|off]"),
    SlashCommand(("/set",), "show or change how answers are made", _set, "[NAME VALUE]"),
    SlashCommand(("/sources",), "show the journal passages behind the last answer", _sources),
    SlashCommand(("/plan",), "show where the model's layers are", _plan),
    SlashCommand(("/stats",), "show speed, context, placement and what is kept", _stats),
    SlashCommand(("/save",), "write the conversation to a file, .md or .json", _save, "[FILE]"),
    SlashCommand(("/load",), "list conversations, or go on with one", _load, "[ID|FILE]"),
    SlashCommand(("/exit", "/quit"), "leave", _exit),
)
