"""A run whose answers come from a server: `--endpoint URL`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lyra_emergence.cli.console import strip_controls
from lyra_emergence.cli.options import say_notes
from lyra_emergence.cli.prepare import open_the_journal
from lyra_emergence.endpoint import DEFAULT_CONTEXT, Endpoint, is_loopback
from lyra_emergence.endpoint_errors import KEY_VARIABLE
from lyra_emergence.errors import ConfigError, EndpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lyra_emergence.chunks import GenerationOptions
    from lyra_emergence.cli.console import Console
    from lyra_emergence.cli.options import Options
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.endpoint import ServedModel
    from lyra_emergence.journal import JournalIndex
    from lyra_emergence.load_report import LoadEvent

__all__ = ["ReadyEndpoint", "prepare_endpoint"]


@dataclass(frozen=True, slots=True)
class ReadyEndpoint:
    """A run that is ready to ask a server.

    Attributes:
        endpoint: The server.
        model: What the user named for it; empty for the one that it has.
        context: Tokens that it takes, as the user says; None for what it lists.
        config: How answers are generated.
        journal: The journal, indexed; None for a chat without one.
    """

    endpoint: Endpoint
    model: str
    context: int | None
    config: ModelConfig
    journal: JournalIndex | None

    @property
    def model_id(self) -> str:
        """The model's name, or the server's where it is not known yet."""
        return self.model or self.endpoint.url

    @property
    def title(self) -> str:
        """The model's name for a person."""
        return strip_controls(self.model_id, one_line=True)

    @property
    def passages(self) -> int:
        """Journal passages for each question, at most."""
        from lyra_emergence.chat import DEFAULT_PASSAGES

        return DEFAULT_PASSAGES

    def summary(self) -> str:
        """Return what answers, in a line."""
        model = f"{self.title} at " if self.model else ""
        return f"{model}{self.endpoint.url}"

    def open(self, _on_event: Callable[[LoadEvent], None]) -> OpenEndpoint:
        """Ask the server for its models, unless all that matters was said.

        Raises:
            EndpointError: It cannot be reached, or has several models and none was named.
        """
        if self.model and self.context is not None:
            return OpenEndpoint(self.endpoint.serving(self.model, self.context), self.config)
        model = _chosen(self.endpoint, self.model)
        return OpenEndpoint(
            self.endpoint.serving(model.id, self.context or model.context or DEFAULT_CONTEXT), self.config
        )


@dataclass(frozen=True, slots=True)
class OpenEndpoint:
    """A server that can be asked.

    Attributes:
        speaker: It.
        config: How answers are generated.
    """

    speaker: Endpoint
    config: ModelConfig

    @property
    def options(self) -> GenerationOptions:
        """How it answers, as the configuration says."""
        from lyra_emergence.chunks import GenerationOptions

        return GenerationOptions.of(self.config.pipeline_kwargs or {})

    def placement(self) -> str:
        """Return which model answers where."""
        return strip_controls(f"{self.speaker.model} at {self.speaker.url}", one_line=True)

    def plan_lines(self, _console: Console) -> Iterator[str]:
        """Yield where it is."""
        yield f"{self.placement()}: the server places it, and shows no plan"

    def as_data(self) -> dict[str, Any]:
        """Return what `--json` tells of it."""
        endpoint = {"url": self.speaker.url, "model": self.speaker.model}
        return {"placement": {"text": self.placement()}, "endpoint": endpoint, "plan": None, "load": None}

    def close(self) -> None:
        """Do nothing: each answer has a connection of its own."""


def prepare_endpoint(url: str, options: Options, console: Console) -> ReadyEndpoint:
    """Settle what can go wrong before the server is asked.

    Raises:
        LyraError: Something is wrong; see its type.
    """
    endpoint = Endpoint(url, key=os.environ.get(KEY_VARIABLE, "").strip())
    here = is_loopback(endpoint.url)
    if options.offline and not here:
        raise ConfigError(f"--offline forbids to ask {endpoint.url}", hint="leave one of the two out")
    resolved = options.resolve()
    say_notes(resolved, console)
    journal = open_the_journal(options, resolved.config, console)
    if not here:
        told = "questions and journal passages go" if journal is not None else "questions go"
        console.warning(f"{told} to {endpoint.url}")
    return ReadyEndpoint(endpoint, options.model or "", options.context, resolved.config, journal)


def _chosen(endpoint: Endpoint, name: str) -> ServedModel:
    """Return the model of that name, or the only one."""
    from lyra_emergence.endpoint import ServedModel

    try:
        listed = endpoint.models()
    except EndpointError:
        if not name:
            raise
        return ServedModel(name, None)  # not every server lists its models; the answer will tell
    if name:
        return next((model for model in listed if model.id == name), ServedModel(name, None))
    if len(listed) == 1:
        return listed[0]
    names = ", ".join(model.id for model in listed[:10])
    raise EndpointError(
        f"{endpoint.url} has {f'{len(listed)} models: {names}' if listed else 'no model'}",
        hint="name one with --model" if listed else "load a model into the server",
    )
