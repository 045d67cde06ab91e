"""Who answers in a conversation: a model loaded here, or a server (`endpoint`), behind the same four names.

What a prompt is, is the speaker's own business: token ids here, messages there. A conversation only needs to know how
many tokens it has, which is its `len`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sized

    from lyra_emergence.chunks import Chunk, GenerationOptions
    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.prompting import Excerpt, Exchange, PromptWriter

    Stream = Callable[[LoadedModel, list[int], GenerationOptions], Iterator[Chunk]]

__all__ = ["LocalSpeaker", "Speaker", "Writer"]


class Writer(Protocol):
    """Makes prompts."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which an answer must stop, beside the model's own end."""

    def write(self, question: str, excerpts: tuple[Excerpt, ...] = (), earlier: tuple[Exchange, ...] = (), /) -> Sized:
        """Return the prompt; its `len` is its tokens."""


class Speaker(Protocol):
    """What a conversation needs of whoever answers.

    Attributes:
        waits_on_others: Whether its next chunk may be long in coming without any work here, so that Ctrl-C should end
            the wait at once instead of taking effect at the next chunk.
    """

    waits_on_others: ClassVar[bool]

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""

    def writer(self, system: str | None) -> Writer:
        """Return what writes prompts that begin with the system message `system`."""

    def stream(self, prompt: Any, options: GenerationOptions) -> Iterator[Chunk]:
        """Answer a prompt of this speaker's writer, a chunk at a time."""

    def forget(self) -> None:
        """Let go of what was kept of earlier prompts."""


class LocalSpeaker:
    """A model loaded in this process.

    Args:
        loaded: The model.
        stream: What generates, called as `generation.stream_generate` is; that by default.
    """

    waits_on_others: ClassVar[bool] = False

    def __init__(self, loaded: LoadedModel, stream: Stream | None = None) -> None:
        from lyra_emergence.generation import PromptCache, stream_generate

        self._loaded = loaded
        self._kept = PromptCache()
        self._stream: Stream = stream or partial(stream_generate, kept=self._kept)

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._loaded.context_length

    def writer(self, system: str | None) -> PromptWriter:
        """Return what writes token ids."""
        from lyra_emergence.prompting import PromptWriter

        return PromptWriter(self._loaded.tokenizer, system)

    def stream(self, prompt: list[int], options: GenerationOptions) -> Iterator[Chunk]:
        """Answer a prompt, a chunk per token."""
        return self._stream(self._loaded, prompt, options)

    def forget(self) -> None:
        """Let go of the keys and values of earlier prompts."""
        self._kept.drop()
