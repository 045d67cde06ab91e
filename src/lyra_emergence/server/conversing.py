"""Questions of the page: answered over the journal as the chat does, as a stream of events.

What was said before comes with each question; nothing of a conversation is kept here.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from lyra_emergence.prompting import Exchange
from lyra_emergence.questions import answer_of, options_within, request_for
from lyra_emergence.server.asking import check_unicode
from lyra_emergence.server.bodies import Seed, Tokens  # noqa: TC001 - pydantic reads them
from lyra_emergence.server.engine import Asked
from lyra_emergence.server.refusals import error_body
from lyra_emergence.server.replies import timings
from lyra_emergence.server.streams import named_event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from lyra_emergence.chunks import Chunk
    from lyra_emergence.fitting import Request
    from lyra_emergence.journal import JournalIndex
    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.server.asking import Asking
    from lyra_emergence.server.engine import Engine
    from lyra_emergence.server.events import Answer
    from lyra_emergence.turns import Answer as Answered
    from lyra_emergence.turns import Source

__all__ = ["Conversing", "Question", "QuestionBody", "Said", "answer_events"]

_MOST_TURNS: Final = 1000
_LOOK: Final = 0.2
"""Seconds between two looks at how many are ahead in the queue."""


class Said(BaseModel):
    """A question that was answered before."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: str
    answer: str


class QuestionBody(BaseModel):
    """A question over the journal, with the conversation before it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: Annotated[str, Field(min_length=1)]
    turns: Annotated[list[Said], Field(max_length=_MOST_TURNS)] = []
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None

    @property
    def stop(self) -> None:
        """No texts end the answer but the configuration's."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question that is ready for the engine.

    Attributes:
        asked: What the engine is asked.
        request: The question with the passages that went into its prompt.
        journal: The journal's name, or None.
    """

    asked: Asked
    request: Request
    journal: str | None


class Conversing:
    """Reads questions for one model over one journal. May be used by several threads.

    Args:
        loaded: The model.
        asking: What reads its other requests.
        journal: What answers draw on; None for answers without.
        passages: Journal passages for each question, at most.
    """

    def __init__(self, loaded: LoadedModel, asking: Asking, journal: JournalIndex | None, passages: int) -> None:
        self._context = loaded.context_length
        self._asking = asking
        self._journal = journal
        self._passages = passages

    @property
    def journal(self) -> str | None:
        """The journal's name without the folders that it is in; None without one."""
        return None if self._journal is None else self._journal.path.name

    def read(self, body: QuestionBody) -> Question:
        """Search the journal and write the prompt.

        Raises:
            RequestError: What was said before is no Unicode.
            GenerationError: The question is empty or too long, or the model's chat template does not work.
            JournalError: The journal's index cannot be used.
        """
        # The body's own check is for the question alone: texts without a limit are not looked at.
        for at, turn in enumerate(body.turns):
            check_unicode(f"turns.{at}.question", turn.question)
            check_unicode(f"turns.{at}.answer", turn.answer)
        writer = self._asking.writer
        options = self._asking.options(body, body.max_tokens, ())
        request = request_for(
            body.question,
            [Exchange(turn.question, turn.answer) for turn in body.turns],
            writer,
            self._journal,
            passages=self._passages,
            context=self._context,
            answer=options.max_new_tokens,
        )
        prompt: Any = request.prompt
        options = options_within(options, request, writer, self._context)
        return Question(Asked(tuple(prompt), options), request, self.journal)


async def answer_events(question: Question, answer: Answer, engine: Engine) -> AsyncIterator[bytes]:
    """Yield an answer as it comes: "sources", "queued" as long as it waits, "text"s, and "answer" or "error"."""
    sources = [_source(source) for source in question.request.sources]
    yield named_event(
        "sources", {"journal": question.journal, "sources": sources, "notes": list(question.request.notes)}
    )
    text = ""
    try:
        async for chunk in _chunks(answer, engine):
            if isinstance(chunk, int):
                yield named_event("queued", {"ahead": chunk})
                continue
            new = chunk.text if text else chunk.text.lstrip()
            text += new
            if new:
                yield named_event("text", {"text": new})
            if chunk.finish_reason is not None:
                whole = answer_of(question.request, text, chunk.finish_reason, chunk.stats)
                yield named_event("answer", _answer(whole, answer.ticket.waited))
    except Exception as error:  # noqa: BLE001 - the status is sent already, and what is not ours the engine has logged
        yield named_event("error", error_body(error).model_dump(mode="json"))


async def _chunks(answer: Answer, engine: Engine) -> AsyncIterator[Chunk | int]:
    """Yield how many are ahead as long as it waits, each number once, and then its chunks."""
    first = asyncio.ensure_future(answer.next())
    try:
        shown: int | None = None
        while not (await asyncio.wait({first}, timeout=_LOOK))[0]:
            ahead = engine.ahead_of(answer.ticket)
            if ahead is not None and ahead != shown:
                shown = ahead
                yield ahead
        chunk = first.result()
    finally:
        first.cancel()
    yield chunk
    while chunk.finish_reason is None:
        chunk = await answer.next()
        yield chunk


def _source(source: Source) -> dict[str, Any]:
    return {
        "number": source.number,
        "entry": source.entry_id,
        "date": source.date,
        "title": source.title,
        "passage": source.passage,
    }


def _answer(answer: Answered, waited: float) -> dict[str, Any]:
    assert answer.stats is not None
    return {
        "text": answer.text,
        "citations": [source.number for source in answer.cited],
        "unknown_citations": list(answer.unknown_citations),
        "finish_reason": answer.finish_reason,
        "notes": list(answer.notes),
        "usage": {"prompt_tokens": answer.stats.prompt_tokens, "completion_tokens": answer.stats.new_tokens},
        "timings": timings(answer.stats, waited),
    }
