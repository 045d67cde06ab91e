"""What the command line asked for, and how it overrides the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lyra_emergence.load_report import TRUST_WARNING

if TYPE_CHECKING:
    from pathlib import Path

    from lyra_emergence.cli.console import Console
    from lyra_emergence.config import ResolvedConfig

__all__ = ["Options", "say_notes"]


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one run; None where the user said nothing.

    Attributes:
        model: Hub id or folder.
        model_config: Configuration file.
        max_memory: "DEVICE=AMOUNT", as written.
        context: Tokens of context.
        journal: Journal file.
        no_journal: Whether there is none, though one would be found.
        rerank: Whether found entries are ordered again.
        max_new_tokens: Longest answer, in tokens.
        temperature: Sampling temperature; 0 takes the likeliest token each time.
        seed: Seed of random sampling.
        json: Whether stdout gets one JSON object.
        dtype: What the model computes in.
        load_in_8bit: Whether its layers are packed to 8 bits.
        load_in_4bit: Whether its layers are packed to 4 bits.
        endpoint: URL of an OpenAI-compatible server that answers instead of a model loaded here.
        stream: Whether an answer is shown as it comes.
        continue_last: Whether the last conversation goes on.
        conversation: Id of the conversation that goes on, or its beginning.
        no_log: Whether nothing of the conversation is kept.
        offline: Whether no hub is asked.
    """

    model: str | None = None
    model_config: Path | None = None
    max_memory: tuple[str, ...] = ()
    context: int | None = None
    journal: Path | None = None
    rerank: bool = False
    max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    json: bool = False
    dtype: str | None = None
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    endpoint: str | None = None
    stream: bool = True
    continue_last: bool = False
    conversation: str | None = None
    no_log: bool = False
    offline: bool = False
    no_journal: bool = False

    def resolve(self) -> ResolvedConfig:
        """Return the configuration with these options on top.

        A limit or a generation setting given here replaces that one key of the file and leaves its others.

        Raises:
            ConfigError: The file or an option is wrong.
        """
        from lyra_emergence.config import resolve_config

        given: dict[str, Any] = {}
        if self.model is not None:
            given["model_id"] = self.model
        if self.context is not None:
            given["context_length"] = self.context
        if self.dtype is not None:
            given["dtype"] = self.dtype
        if self.load_in_8bit or self.load_in_4bit:
            given |= {"load_in_8bit": self.load_in_8bit, "load_in_4bit": self.load_in_4bit}
        if self.max_memory:
            given["max_memory"] = ",".join(self.max_memory)
        generation = self._generation()
        if generation:
            given["pipeline_kwargs"] = generation
        return resolve_config(self.model_config, overrides=given)

    def _generation(self) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if self.max_new_tokens is not None:
            given["max_new_tokens"] = self.max_new_tokens
        if self.temperature is not None:
            # transformers refuses a temperature of 0; greedy decoding is what people mean by it.
            given |= {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        if self.seed is not None:
            given["seed"] = self.seed
        return given


def say_notes(resolved: ResolvedConfig, console: Console) -> None:
    """Say what the user should know about the configuration before anything is done with it."""
    for note in resolved.notes:
        console.note(note)
    if resolved.config.trust_remote_code:
        console.warning(TRUST_WARNING)
