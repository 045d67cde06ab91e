"""Which conversation a run goes on with, and where it is kept, as the options say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from lyra_emergence.errors import ConfigError, ConversationError

if TYPE_CHECKING:
    from lyra_emergence.chat import ChatSession
    from lyra_emergence.cli.console import Console
    from lyra_emergence.cli.options import Options
    from lyra_emergence.cli.ready import OpenModel, Ready
    from lyra_emergence.conversations import Conversation, ConversationLog, ConversationStore
    from lyra_emergence.turns import Turn

__all__ = ["Keeping", "begin_session", "open_keeping"]


@dataclass(frozen=True, slots=True)
class Keeping:
    """The conversation of a run; leaving its context closes the file.

    Attributes:
        store: All conversations; None where none is kept.
        continued: The one that is gone on with, or None for a new one.
        turns: Its turns.
    """

    store: ConversationStore | None
    continued: Conversation | None = None
    turns: tuple[Turn, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.store is not None:
            self.store.close()

    def log(self, ready: Ready) -> ConversationLog | None:
        """Return where this run's conversation is kept."""
        if self.store is not None and self.continued is not None:
            return self.store.reopen(self.continued)
        return self.new_log(ready)

    def new_log(self, ready: Ready) -> ConversationLog | None:
        """Return where another conversation is kept."""
        if self.store is None:
            return None
        path = None if ready.journal is None else str(ready.journal.path)
        return self.store.begin(ready.model_id, path)


def begin_session(ready: Ready, model: OpenModel, keeping: Keeping) -> ChatSession:
    """Return a session with a model over the journal, which goes on with the conversation of this run."""
    from lyra_emergence.chat import ChatSession

    return ChatSession(
        model.speaker,
        ready.journal,
        options=model.options,
        passages=ready.passages,
        system=keeping.continued.system if keeping.continued is not None else None,
        log=keeping.log(ready),
        turns=keeping.turns,
    )


def open_keeping(options: Options, console: Console) -> Keeping:
    """Return the conversation that the options ask for.

    Raises:
        ConfigError: The options contradict each other.
        ConversationError: It is not there.
    """
    wanted = options.continue_last or options.conversation is not None
    if options.no_log:
        if wanted:
            raise ConfigError("--no-log keeps no conversation that could be continued", hint="leave one of them out")
        return Keeping(None)
    from lyra_emergence.conversations import open_store

    store = open_store(console.note)
    if not wanted:
        return Keeping(store)
    if store is None:
        raise ConversationError("no conversation can be continued: none can be read", hint="see the note above")
    try:
        found = _wanted(store, options)
        return Keeping(store, found, tuple(store.turns(found)))
    except BaseException:
        store.close()
        raise


def _wanted(store: ConversationStore, options: Options) -> Conversation:
    if options.conversation is not None:
        return store.find(options.conversation)
    latest = store.latest()
    if not latest:
        raise ConversationError("there is no conversation to continue yet", hint="ask something without -c first")
    return latest[0]
