"""What the chat and a single answer need of a model, whether it is loaded here or served elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lyra_emergence.chunks import GenerationOptions
    from lyra_emergence.cli.console import Console
    from lyra_emergence.journal import JournalIndex
    from lyra_emergence.load_report import LoadEvent
    from lyra_emergence.speaker import Speaker

__all__ = ["OpenModel", "Ready", "describe_journal"]


class OpenModel(Protocol):
    """A model that can be asked."""

    @property
    def speaker(self) -> Speaker:
        """Who answers."""

    @property
    def options(self) -> GenerationOptions:
        """How it answers, as the configuration says."""

    def placement(self) -> str:
        """Return where it is at this moment, such as "48% GPU / 52% CPU"."""

    def plan_lines(self, console: Console) -> Iterator[str]:
        """Yield the lines that show where it is."""

    def as_data(self) -> dict[str, Any]:
        """Return what `--json` tells of it."""

    def close(self) -> None:
        """Release it."""


class Ready(Protocol):
    """A run in which everything is settled that can be settled without the model."""

    @property
    def journal(self) -> JournalIndex | None:
        """The journal, indexed; None for a chat without one."""

    @property
    def model_id(self) -> str:
        """The model's id, as conversations are kept with it."""

    @property
    def title(self) -> str:
        """The model's name for a person."""

    @property
    def passages(self) -> int:
        """Journal passages for each question, at most."""

    def summary(self) -> str:
        """Return what answers, in a line."""

    def open(self, on_event: Callable[[LoadEvent], None]) -> OpenModel:
        """Load the model, or reach its server.

        Raises:
            LyraError: That is not possible.
        """


def describe_journal(journal: JournalIndex | None) -> str:
    """Return which journal answers draw on, in a line."""
    if journal is None:
        return "no journal (--journal PATH names one)"
    count = journal.count
    return f"journal {journal.path}, {count} entr{'y' if count == 1 else 'ies'}"
