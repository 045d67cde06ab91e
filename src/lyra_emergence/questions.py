"""From a question over a journal to a prompt, and from what a model wrote to an answer with its sources.

What `chat.ChatSession` does for one conversation and `server.conversing` for those of many pages: neither keeps
anything here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lyra_emergence.errors import GenerationError
from lyra_emergence.fitting import Fitting, Request
from lyra_emergence.journal.index import Found
from lyra_emergence.journal.search import asks_for_overview, terms
from lyra_emergence.journal.text import flowing, words
from lyra_emergence.prompting import Exchange
from lyra_emergence.turns import CITATION, Answer, Source, citations

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lyra_emergence.chunks import GenerationOptions, GenerationStats
    from lyra_emergence.journal import Hit, JournalIndex
    from lyra_emergence.speaker import Writer

__all__ = ["answer_of", "options_within", "request_for"]

_REFERRING = frozenset(
    ["he", "her", "hers", "him", "his", "it", "its", "she", "that", "their", "them", "these", "they", "this"]
)
_FEW_TERMS = 2
"""Telling words of a question that leans on the one before, at most: with more, "she" is likely someone it names."""
_CONTINUING = frozenset(["and", "but", "so", "then", "why"])


def request_for(
    question: str,
    earlier: Sequence[Exchange],
    writer: Writer,
    journal: JournalIndex | None,
    *,
    passages: int,
    context: int,
    answer: int,
) -> Request:
    """Search the journal for a question, and write its prompt.

    Args:
        question: The question.
        earlier: The conversation so far, oldest first; answers as they were given, with their citations.
        writer: Writes prompts.
        journal: What the answer draws on; None for a conversation without.
        passages: Journal passages, at most.
        context: Tokens that the prompt and the answer may have together.
        answer: Tokens that the answer may have.

    Raises:
        GenerationError: The question is empty, or too long for the context.
        JournalError: The journal's index cannot be used.
    """
    question = question.strip()
    if not question:
        raise GenerationError("the question is empty", hint="type a question")
    sources, notes = _search(question, earlier, journal, passages)
    # Without their citations: the numbers meant other passages.
    said = ((turn.question, CITATION.sub("", turn.answer).strip()) for turn in earlier)
    kept = tuple(Exchange(asked, answered) for asked, answered in said if answered)
    return Fitting(writer, question, context).fit(sources, kept, notes, answer)


def options_within(options: GenerationOptions, request: Request, writer: Writer, context: int) -> GenerationOptions:
    """Return `options` with the writer's stops, and no more tokens than the prompt leaves of the context."""
    room = context - len(request.prompt)
    return replace(options, max_new_tokens=min(options.max_new_tokens, room), stop=(*options.stop, *writer.stops))


def answer_of(request: Request, text: str, reason: str, stats: GenerationStats | None) -> Answer:
    """Return the answer that a model's text comes to.

    Args:
        request: What was asked.
        text: What the model wrote.
        reason: Why it ended, as `Answer.finish_reason`.
        stats: Tokens and seconds; None where it was interrupted.
    """
    text = text.rstrip()
    cited = citations(text)
    numbers = {source.number for source in request.sources}
    return Answer(
        text=text,
        sources=tuple(replace(source, cited=source.number in cited) for source in request.sources),
        unknown_citations=tuple(number for number in cited if number not in numbers),
        finish_reason=reason,
        stats=stats,
        notes=(*request.notes, *_memory_notes(stats)),
    )


def _search(
    question: str, earlier: Sequence[Exchange], journal: JournalIndex | None, passages: int
) -> tuple[tuple[Source, ...], tuple[str, ...]]:
    if journal is None:
        return (), ()
    if not journal.count:
        return (), ("the journal holds no entries yet",)
    if asks_for_overview(question):
        found = Found(journal.latest(passages))
    else:
        found = journal.find(_standalone(question, earlier), passages)
    return tuple(_source(number, hit) for number, hit in enumerate(found.hits, start=1)), found.said


def _standalone(question: str, earlier: Sequence[Exchange]) -> str:
    """Return the question, with the one before it where it seems to refer back."""
    said = words(question)
    refers = said[:1] and (said[0] in _CONTINUING or not _REFERRING.isdisjoint(said))
    if not (earlier and refers and len(terms(question)) <= _FEW_TERMS):
        return question
    return f"{question}\n{earlier[-1].question}"


def _memory_notes(stats: GenerationStats | None) -> Iterator[str]:
    """Yield a line on memory that ran out, where something was moved or changed for it, and on what is short."""
    yield from stats.warnings if stats else ()
    told = [recovery for recovery in (stats.recoveries if stats else ()) if recovery.blocks]
    if told:
        moved = sum(len(recovery.blocks) for recovery in told)
        blocks = "1 block" if moved == 1 else f"{moved} blocks"
        yield (
            f"memory ran out on {told[0].device} after {told[0].tokens} tokens: {blocks} of the model went to the CPU, "
            "and come back when there is room"
        )


def _source(number: int, hit: Hit) -> Source:
    return Source(number, hit.entry.id, hit.entry.date, hit.entry.label, flowing(hit.passage))
