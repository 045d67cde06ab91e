"""From options to a loaded model: configuration, journal, model, plan and load, each said as it happens."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lyra_emergence import cli
from lyra_emergence.bundled import BUNDLED_ID, BUNDLED_PASSAGE_LENGTH, BUNDLED_PASSAGES
from lyra_emergence.cli.console import strip_controls
from lyra_emergence.cli.models import choose_model, describe_download
from lyra_emergence.cli.options import say_notes
from lyra_emergence.cli.plan import make_plan_for
from lyra_emergence.cli.progress import LoadProgress, fetch, working

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lyra_emergence.chat import ChatSession
    from lyra_emergence.cli.console import Console
    from lyra_emergence.cli.models import Answer, ModelChoice
    from lyra_emergence.cli.options import Options
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.hub import RemoteModel
    from lyra_emergence.journal import JournalIndex
    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.plan import Plan

__all__ = [
    "SAMPLE_JOURNAL",
    "Prepared",
    "choose_on_terminal",
    "find_journal",
    "loaded_model",
    "prepare",
    "start_session",
]

SAMPLE_JOURNAL: Final = Path("data", "journal", "sample.json")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that is ready to load.

    Attributes:
        choice: The model and its configuration.
        plan: Where its blocks go.
        journal: The journal, indexed; None for a chat without one.
    """

    choice: ModelChoice
    plan: Plan
    journal: JournalIndex | None

    @property
    def title(self) -> str:
        """The model's name for a person."""
        bundled = self.choice.config.model_id == BUNDLED_ID
        return "the bundled model" if bundled else strip_controls(self.choice.config.model_id, one_line=True)

    def describe_journal(self) -> str:
        """Return which journal answers draw on, in a line."""
        if self.journal is None:
            return "no journal (--journal PATH names one)"
        count = self.journal.count
        return f"journal {self.journal.path}, {count} entr{'y' if count == 1 else 'ies'}"


def prepare(options: Options, console: Console) -> Prepared:
    """Settle everything that can go wrong before seconds are spent on importing torch.

    Raises:
        LyraError: Something is wrong; see its type.
    """
    resolved = options.resolve()
    say_notes(resolved, console)
    journal = _open_journal(options, resolved.config, console)
    choice = choose_model(
        resolved,
        fetch=lambda remote: fetch(remote, console),
        choose=(lambda remote: choose_on_terminal(remote, resolved.path, console)) if console.interactive else None,
    )
    for note in choice.notes:
        console.note(note)
    with working(console, "reading the plan"):
        plan = make_plan_for(choice)
    for note in plan.notes:
        console.warning(note)
    if journal is not None:
        journal.keep_within(next((use.unused for use in plan.devices if use.device == "cpu"), 0))
    if journal is not None and choice.config.model_id == BUNDLED_ID:
        journal = journal.with_passages(BUNDLED_PASSAGE_LENGTH)
    return Prepared(choice, plan, journal)


def _open_journal(options: Options, config: ModelConfig, console: Console) -> JournalIndex | None:
    path = find_journal(options.journal)
    if path is None:
        return None
    from lyra_emergence.journal import open_journal

    return open_journal(
        path,
        rerank=options.rerank,
        on_note=console.note,
        embedding_model=config.embedding_model,
        rerank_model=config.rerank_model,
    )


def start_session(prepared: Prepared, loaded: LoadedModel) -> ChatSession:
    """Return a conversation with the loaded model over the journal."""
    from lyra_emergence.chat import DEFAULT_PASSAGES, ChatSession
    from lyra_emergence.generation import GenerationOptions

    passages = BUNDLED_PASSAGES if prepared.choice.config.model_id == BUNDLED_ID else DEFAULT_PASSAGES
    options = GenerationOptions.for_model(loaded)
    return ChatSession(loaded, prepared.journal, options=options, passages=passages)


def find_journal(asked: Path | None) -> Path | None:
    """Return the journal asked for, else the user's own, else the folder's or checkout's sample, else None."""
    if asked is not None:
        return asked
    from lyra_emergence.journal.places import own_journal

    if own_journal().is_file():
        return own_journal()
    checkout = Path(cli.__file__).resolve().parents[3]
    places = [Path(), checkout] if (checkout / "lyra.py").is_file() else [Path()]
    return next((place / SAMPLE_JOURNAL for place in places if (place / SAMPLE_JOURNAL).is_file()), None)


@contextmanager
def loaded_model(prepared: Prepared, console: Console) -> Iterator[LoadedModel]:
    """Load the model, showing progress, and release it at the end.

    Raises:
        LyraError: It cannot be loaded.
    """
    with working(console, "starting torch"):
        # One person's tokenizer needs no threads, and a fork behind them would warn.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from lyra_emergence.loading import load
    with LoadProgress(console) as progress:
        loaded = load(
            prepared.choice.config, directory=prepared.choice.directory, plan=prepared.plan, on_event=progress
        )
    try:
        yield loaded
    finally:
        loaded.close()


def choose_on_terminal(remote: RemoteModel, asked_by: Path | None, console: Console) -> Answer:
    """Ask the person at the terminal what to do about a model that is not here; no answer takes the bundled one.

    Args:
        remote: What a download would fetch.
        asked_by: The configuration file that names the model, or None.
        console: Where to ask.
    """
    where = f" ({asked_by} names it)" if asked_by else ""
    console.say(f"{remote.model_id}{where} is not on this machine.")
    console.say(f"  d  download it now: {describe_download(remote)}")
    console.say("  b  use the small bundled model this time")
    while True:
        console.stderr.write("Which? [b] ")
        console.stderr.flush()
        reply = console.stdin.readline().strip().lower()
        if reply in {"", "b", "bundled"}:
            return "bundled"
        if reply in {"d", "download"}:
            return "download"
        console.say("Answer d or b.")
