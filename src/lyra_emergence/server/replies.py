"""Answers as objects of the `openai` package, for chats and for completions, whole and in pieces."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar

from openai.types import Completion, CompletionChoice, CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as Piece
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.completion_usage import PromptTokensDetails

if TYPE_CHECKING:
    from pydantic import BaseModel

    from lyra_emergence.chunks import FinishReason, GenerationStats

__all__ = ["DONE", "ChatReply", "CompletionReply", "Reply", "as_event", "listed_model", "timings"]

DONE: Final = b"data: [DONE]\n\n"
_DIGITS: Final = 6

Made = TypeVar("Made", bound="BaseModel")
Reason = Literal["stop", "length"]


class Reply(Protocol):
    """How one kind of request is answered."""

    def whole(self, text: str, reason: FinishReason, stats: GenerationStats, waited: float) -> BaseModel:
        """Return a whole answer."""

    def opening(self) -> BaseModel | None:
        """Return what a stream begins with, or None."""

    def piece(self, text: str) -> BaseModel:
        """Return a piece of a stream."""

    def ending(self, reason: FinishReason, stats: GenerationStats, waited: float) -> BaseModel:
        """Return the last piece of a stream that belongs to the answer."""

    def usage(self, stats: GenerationStats) -> BaseModel:
        """Return the piece after it that counts tokens."""


@dataclass(frozen=True, slots=True)
class _Head:
    """What all pieces of one answer have in common."""

    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, slots=True)
class ChatReply(_Head):
    """Answers a chat completion."""

    def whole(self, text: str, reason: FinishReason, stats: GenerationStats, waited: float) -> ChatCompletion:
        """Return a whole answer."""
        message = ChatCompletionMessage(role="assistant", content=text)
        made = ChatCompletion(
            **self._common(),
            object="chat.completion",
            choices=[Choice(index=0, message=message, finish_reason=_reason(reason))],
            usage=_usage(stats),
        )
        return _with_timings(made, reason, stats, waited)

    def opening(self) -> ChatCompletionChunk:
        """Return the piece that says who speaks."""
        return self._chunk(Piece(index=0, delta=ChoiceDelta(role="assistant", content="")))

    def piece(self, text: str) -> ChatCompletionChunk:
        """Return a piece of the answer."""
        return self._chunk(Piece(index=0, delta=ChoiceDelta(content=text)))

    def ending(self, reason: FinishReason, stats: GenerationStats, waited: float) -> ChatCompletionChunk:
        """Return the piece that says why it ended."""
        made = self._chunk(Piece(index=0, delta=ChoiceDelta(), finish_reason=_reason(reason)))
        return _with_timings(made, reason, stats, waited)

    def usage(self, stats: GenerationStats) -> ChatCompletionChunk:
        """Return the piece that counts tokens."""
        return self._chunk(usage=_usage(stats))

    def _common(self) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.id}", "created": self.created, "model": self.model}

    def _chunk(self, *choices: Piece, usage: CompletionUsage | None = None) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._common(), object="chat.completion.chunk", choices=list(choices), usage=usage)


@dataclass(frozen=True, slots=True)
class CompletionReply(_Head):
    """Answers a completion."""

    def whole(self, text: str, reason: FinishReason, stats: GenerationStats, waited: float) -> Completion:
        """Return a whole answer."""
        choice = CompletionChoice(index=0, text=text, finish_reason=_reason(reason))
        return _with_timings(self._completion(choice, usage=_usage(stats)), reason, stats, waited)

    def opening(self) -> None:
        """Return None: a completion begins with its text."""

    def piece(self, text: str) -> Completion:
        """Return a piece of the answer."""
        # A piece has no reason yet, which the protocol writes as null and the package's type does not know.
        return self._completion(CompletionChoice.model_construct(index=0, text=text, finish_reason=None, logprobs=None))

    def ending(self, reason: FinishReason, stats: GenerationStats, waited: float) -> Completion:
        """Return the piece that says why it ended."""
        choice = CompletionChoice(index=0, text="", finish_reason=_reason(reason))
        return _with_timings(self._completion(choice), reason, stats, waited)

    def usage(self, stats: GenerationStats) -> Completion:
        """Return the piece that counts tokens."""
        return self._completion(usage=_usage(stats))

    def _completion(self, *choices: CompletionChoice, usage: CompletionUsage | None = None) -> Completion:
        return Completion.model_construct(
            id=f"cmpl-{self.id}",
            created=self.created,
            model=self.model,
            object="text_completion",
            choices=list(choices),
            usage=usage,
        )


def listed_model(name: str, created: int, context: int) -> dict[str, Any]:
    """Return a model as `/v1/models` lists it, with its context as other servers name it."""
    model = Model(id=name, created=created, object="model", owned_by="lyra")
    return model.model_dump() | {"max_model_len": context}


def as_event(piece: BaseModel) -> bytes:
    """Return a piece as a server-sent event."""
    return b"data: " + json.dumps(piece.model_dump(mode="json", warnings=False)).encode() + b"\n\n"


def timings(stats: GenerationStats, waited: float) -> dict[str, Any]:
    """Return where the time of an answer went, in seconds, and what happened on the way."""
    return {
        "queue_seconds": round(waited, _DIGITS),
        "prefill_seconds": round(stats.prefill_seconds, _DIGITS),
        "decode_seconds": round(stats.decode_seconds, _DIGITS),
        "tokens_per_second": round(stats.tokens_per_second, _DIGITS),
        "recoveries": [str(recovery) for recovery in stats.recoveries],
        "warnings": list(stats.warnings),
    }


def _with_timings(made: Made, reason: FinishReason, stats: GenerationStats, waited: float) -> Made:
    told = timings(stats, waited) | ({"loop": True} if reason == "loop" else {})
    # The package's models take further fields, and hand them to whoever reads `model_extra`.
    return made.model_copy(update={"timings": told})


def _reason(reason: FinishReason) -> Reason:
    # OpenAI has no word for an answer that came to repeat itself.
    return "length" if reason == "length" else "stop"


def _usage(stats: GenerationStats) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=stats.prompt_tokens,
        completion_tokens=stats.new_tokens,
        total_tokens=stats.prompt_tokens + stats.new_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=stats.reused_tokens),
    )
