"""From options to a loaded model: configuration, journal, model, plan and load, each said as it happens."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lyra_emergence import cli
from lyra_emergence.bundled import BUNDLED_ID, BUNDLED_PASSAGE_LENGTH, BUNDLED_PASSAGES
from lyra_emergence.cli.console import strip_controls
from lyra_emergence.cli.models import choose_model, describe_download
from lyra_emergence.cli.options import say_notes
from lyra_emergence.cli.placed import placement_text, weight_shares
from lyra_emergence.cli.plan import make_plan_for
from lyra_emergence.cli.plan_view import render_plan, summary
from lyra_emergence.cli.progress import LoadProgress, fetch, working
from lyra_emergence.hub import free_disk
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lyra_emergence.chunks import GenerationOptions
    from lyra_emergence.cli.console import Console
    from lyra_emergence.cli.models import Answer, ModelChoice
    from lyra_emergence.cli.options import Options
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.distributed.rank_report import RankReport
    from lyra_emergence.hub import RemoteModel
    from lyra_emergence.journal import JournalIndex
    from lyra_emergence.load_report import LoadEvent
    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.plan import Plan
    from lyra_emergence.speaker import LocalSpeaker

__all__ = [
    "SAMPLE_JOURNAL",
    "LocalModel",
    "Prepared",
    "choose_on_terminal",
    "find_journal",
    "loaded_model",
    "open_the_journal",
    "prepare",
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

    @property
    def model_id(self) -> str:
        """The model's id."""
        return self.choice.config.model_id

    @property
    def passages(self) -> int:
        """Journal passages for each question, at most."""
        from lyra_emergence.chat import DEFAULT_PASSAGES

        return BUNDLED_PASSAGES if self.model_id == BUNDLED_ID else DEFAULT_PASSAGES

    def summary(self) -> str:
        """Return the plan in a line."""
        return summary(self.plan, self.title)

    def open(self, on_event: Callable[[LoadEvent], None]) -> LocalModel:
        """Load the model.

        Raises:
            LyraError: It cannot be loaded.
        """
        return LocalModel(_load(self, on_event), self.title)


class LocalModel:
    """A model loaded in this process.

    Attributes:
        loaded: The model.
    """

    def __init__(self, loaded: LoadedModel, title: str) -> None:
        self.loaded = loaded
        self._title = title
        self._speaker: LocalSpeaker | None = None

    @property
    def speaker(self) -> LocalSpeaker:
        """Who answers; made in the thread that asks."""
        if self._speaker is None:
            from lyra_emergence.runtime.compute_threads import settle_for_fewer_threads
            from lyra_emergence.speaker import LocalSpeaker

            settle_for_fewer_threads()
            self._speaker = LocalSpeaker(self.loaded)
        return self._speaker

    @property
    def options(self) -> GenerationOptions:
        """How it answers, as its configuration and its own files say."""
        from lyra_emergence.chunks import GenerationOptions

        return GenerationOptions.for_model(self.loaded)

    def placement(self) -> str:
        """Return where its weights are now."""
        return placement_text(self._shares())

    def plan_lines(self, console: Console) -> Iterator[str]:
        """Yield the lines that show the plan that it was loaded by."""
        yield from render_plan(self.loaded.plan, self._title, console)
        ranks = self._ranks()
        yield from ("", *map(str, ranks)) if ranks else ()

    def as_data(self) -> dict[str, Any]:
        """Return the plan and the load, as `--json` tells them."""
        plan = self.loaded.plan.to_json()
        del plan["placements"]
        data = {
            "placement": {"text": self.placement(), "weight_bytes": self._shares()},
            "plan": plan,
            "load": self.loaded.report.to_json(),
        }
        ranks = self._ranks()
        return data | {"ranks": [one.to_json() for one in ranks]} if ranks else data

    def _ranks(self) -> list[RankReport]:
        """Return what each process holds now, where several share the model."""
        return self.loaded.model.measure() if self.loaded.report.ranks else []

    def close(self) -> None:
        """Release its memory."""
        self.loaded.close()

    def _shares(self) -> dict[str, int]:
        return weight_shares(self.loaded.plan, {block.name: block.device for block in self.loaded.blocks})


def prepare(options: Options, console: Console) -> Prepared:
    """Settle everything that can go wrong before seconds are spent on importing torch.

    Raises:
        LyraError: Something is wrong; see its type.
    """
    resolved = options.resolve()
    say_notes(resolved, console)
    journal = open_the_journal(options, resolved.config, console)
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
        # It compares words, and answers a little better from what words bring (docs/journal.md).
        by_words = resolved.config.embedding_model is None
        journal = journal.with_passages(BUNDLED_PASSAGE_LENGTH, by_words=by_words)
    return Prepared(choice, plan, journal)


def open_the_journal(options: Options, config: ModelConfig, console: Console) -> JournalIndex | None:
    """Return the journal that the options name or that is found, indexed; None where there is none, or is to be none.

    Raises:
        JournalError: It cannot be read.
    """
    path = None if options.no_journal else find_journal(options.journal)
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
    with LoadProgress(console) as progress:
        loaded = _load(prepared, progress)
    try:
        yield loaded
    finally:
        loaded.close()


def _load(prepared: Prepared, on_event: Callable[[LoadEvent], None]) -> LoadedModel:
    # One person's tokenizer needs no threads, and a fork behind them would warn.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lyra_emergence.loading import load

    choice = prepared.choice
    return load(choice.config, directory=choice.directory, plan=prepared.plan, on_event=on_event)


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
    console.say(f"     free on that disk: {format_bytes(free_disk())}")
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
