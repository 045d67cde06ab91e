"""A conversation over a journal: search, prompt, stream, and what the answer drew on.

A question that does not stand alone ("And when did she arrive?") is searched together with the one before it. What does
not fit the model's context is left out in this order, and said in `Answer.notes`: earlier turns, oldest first; then the
passages are cut to the parts that match; then there are fewer of them. The question itself is never cut: one that is
too long is an error.

A stream that is closed early, interrupted, or out of memory for good, keeps what came as a turn whose `finish_reason`
is "interrupted". Any other error leaves the conversation as it was before the question.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lyra_emergence.errors import DoesNotFitError, GenerationError
from lyra_emergence.journal.index import Found
from lyra_emergence.journal.search import asks_for_overview, best_part, terms
from lyra_emergence.journal.text import flowing, plain, words
from lyra_emergence.prompting import Excerpt, Exchange, PromptWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from lyra_emergence.generation import Chunk, GenerationOptions, GenerationStats
    from lyra_emergence.journal import Hit, JournalIndex
    from lyra_emergence.loading import LoadedModel

    Stream = Callable[[LoadedModel, list[int], GenerationOptions], Iterator[Chunk]]

__all__ = ["DEFAULT_PASSAGES", "Answer", "ChatChunk", "ChatSession", "Source", "Turn", "plain"]

DEFAULT_PASSAGES = 4
"""Journal passages that a model is given with a question."""

_PASSAGE_LIMITS = (400, 250, 150)
"""Characters that passages are cut to, one after the other, where the context is short."""
_LEAST_ANSWER = 32
"""Tokens of an answer that are kept free even for the longest question."""
_CITATION = re.compile(r"\s*\[(\d{1,3}(?:\s*[,;]\s*\d{1,3})*)\]")
_REFERRING = frozenset(
    ["he", "her", "hers", "him", "his", "it", "its", "she", "that", "their", "them", "these", "they", "this"]
)
_FEW_TERMS = 2
"""Telling words of a question that leans on the one before, at most: with more, "she" is likely someone it names."""
_CONTINUING = frozenset(["and", "but", "so", "then", "why"])


@dataclass(frozen=True, slots=True)
class Source:
    """A journal passage that an answer could draw on.

    Attributes:
        number: What the answer cites it by, from 1.
        entry_id: The entry's id.
        date: The entry's day, such as "2025-03-02".
        title: Its title or first words, safe to print.
        passage: The passage that the model was given, safe to print.
        cited: Whether the answer cites it.
    """

    number: int
    entry_id: str
    date: str
    title: str
    passage: str
    cited: bool = False

    def label(self) -> str:
        """Return "[1] 2025-03-02 · Garden plans"."""
        return f"[{self.number}] {self.heading()}"

    def heading(self) -> str:
        """Return "2025-03-02 · Garden plans"."""
        return f"{self.date} · {self.title}"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, whole or interrupted.

    Attributes:
        text: As the model wrote it; `plain` makes it safe to print.
        sources: The passages that the model was given, by number.
        unknown_citations: Numbers that it cites and that name no source.
        finish_reason: "stop", "length" (the token limit was reached), "loop" (it only repeated itself) or
            "interrupted".
        stats: Tokens and seconds; None when interrupted.
        notes: What was left out to fit the context and the like, a line each.
    """

    text: str
    sources: tuple[Source, ...]
    unknown_citations: tuple[int, ...]
    finish_reason: str
    stats: GenerationStats | None
    notes: tuple[str, ...] = ()

    @property
    def cited(self) -> tuple[Source, ...]:
        """The sources that the answer cites."""
        return tuple(source for source in self.sources if source.cited)


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: Answer


@dataclass(frozen=True, slots=True)
class ChatChunk:
    """A piece of an answer.

    Attributes:
        text: What is new; may be empty.
        answer: The whole answer, on the last chunk only.
    """

    text: str
    answer: Answer | None = None


@dataclass(frozen=True, slots=True)
class _Request:
    question: str
    prompt: list[int]
    sources: tuple[Source, ...]
    notes: tuple[str, ...]


class ChatSession:
    """A conversation with a loaded model, over a journal if there is one.

    Not for several threads at once.

    Args:
        loaded: The model.
        journal: What answers draw on, or None for a conversation without.
        options: How to generate; `max_new_tokens` is cut to what the context has left.
        system: A system message.
        passages: Journal passages for each question, at most.
        stream: What generates, called as `generation.stream_generate` is; that by default.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        journal: JournalIndex | None = None,
        *,
        options: GenerationOptions | None = None,
        system: str | None = None,
        passages: int = DEFAULT_PASSAGES,
        stream: Stream | None = None,
    ) -> None:
        from lyra_emergence.generation import GenerationOptions, PromptCache, stream_generate

        self._loaded = loaded
        self._journal = journal
        self._options = options or GenerationOptions()
        self._passages = passages
        self._kept = PromptCache()
        self._stream: Stream = stream or partial(stream_generate, kept=self._kept)
        self._writer = PromptWriter(loaded.tokenizer, system)
        self._turns: list[Turn] = []
        self._open: Generator[ChatChunk, None, None] | None = None

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The conversation so far."""
        return tuple(self._turns)

    @property
    def last(self) -> Answer | None:
        """The last answer."""
        return self._turns[-1].answer if self._turns else None

    def ask(self, question: str) -> Generator[ChatChunk, None, None]:
        """Answer `question`, a chunk at a time.

        The search and the prompt are made at once, the answer as it is drawn. An earlier answer still open is closed.

        Raises:
            GenerationError: The question is empty, or too long for the model's context.
        """
        self._close()
        question = question.strip()
        if not question:
            raise GenerationError("the question is empty", hint="type a question")
        self._open = self._answer(self._request(question))
        return self._open

    def undo(self) -> Turn | None:
        """Take back the last turn and return it; None if there is none."""
        self._close()
        return self._turns.pop() if self._turns else None

    def clear(self) -> None:
        """Forget the conversation."""
        self._close()
        self._turns.clear()
        self._kept.drop()

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _request(self, question: str) -> _Request:
        sources, notes = self._search(question)
        # Without their citations: the numbers meant other passages.
        said = ((turn.question, _CITATION.sub("", turn.answer.text).strip()) for turn in self._turns)
        earlier = tuple(Exchange(asked, answer) for asked, answer in said if answer)
        return _Fitting(self._writer, question, self._loaded.context_length).fit(
            sources, earlier, notes, self._options.max_new_tokens
        )

    def _search(self, question: str) -> tuple[tuple[Source, ...], tuple[str, ...]]:
        if self._journal is None:
            return (), ()
        if not self._journal.count:
            return (), ("the journal holds no entries yet",)
        if asks_for_overview(question):
            found = Found(self._journal.latest(self._passages))
        else:
            found = self._journal.find(self._standalone(question), self._passages)
        return tuple(_source(number, hit) for number, hit in enumerate(found.hits, start=1)), found.said

    def _standalone(self, question: str) -> str:
        """Return the question, with the one before it where it seems to refer back."""
        said = words(question)
        refers = said[:1] and (said[0] in _CONTINUING or not _REFERRING.isdisjoint(said))
        if not (self._turns and refers and len(terms(question)) <= _FEW_TERMS):
            return question
        return f"{question}\n{self._turns[-1].question}"

    def _answer(self, request: _Request) -> Generator[ChatChunk, None, None]:
        room = self._loaded.context_length - len(request.prompt)
        options = replace(
            self._options,
            max_new_tokens=min(self._options.max_new_tokens, room),
            stop=(*self._options.stop, *self._writer.stops),
        )
        chunks: Any = self._stream(self._loaded, request.prompt, options)
        text, last = "", None
        try:
            for chunk in chunks:
                new = chunk.text if text else chunk.text.lstrip()
                text += new
                if chunk.finish_reason is not None:
                    last = chunk
                    break
                if new:
                    yield ChatChunk(new)
        except (GeneratorExit, KeyboardInterrupt, DoesNotFitError):
            # What came stays, also where memory ran out for good.
            if text.strip():
                self._keep(request, text, "interrupted", None)
            raise
        finally:
            chunks.close()
        answer = self._keep(request, text, (last and last.finish_reason) or "stop", last and last.stats)
        yield ChatChunk(new if last else "", answer)

    def _keep(self, request: _Request, text: str, reason: str, stats: GenerationStats | None) -> Answer:
        text = text.rstrip()
        cited = _citations(text)
        numbers = {source.number for source in request.sources}
        answer = Answer(
            text=text,
            sources=tuple(replace(source, cited=source.number in cited) for source in request.sources),
            unknown_citations=tuple(number for number in cited if number not in numbers),
            finish_reason=reason,
            stats=stats,
            notes=(*request.notes, *_memory_notes(stats)),
        )
        self._turns.append(Turn(request.question, answer))
        return answer


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


def _citations(text: str) -> tuple[int, ...]:
    """Return the numbers that `text` cites, as in "[2]" and "[1, 3]", each once, in order of appearance."""
    groups = (re.findall(r"\d+", match[1]) for match in _CITATION.finditer(text))
    return tuple(dict.fromkeys(int(number) for group in groups for number in group))


class _Fitting:
    """Fits a prompt into a context of `context` tokens, keeping room for the answer."""

    def __init__(self, writer: PromptWriter, question: str, context: int) -> None:
        self._writer = writer
        self._question = question
        self._context = context

    def fit(
        self, sources: tuple[Source, ...], earlier: tuple[Exchange, ...], notes: tuple[str, ...], answer: int
    ) -> _Request:
        """Return the request with as much of the sources and the earlier turns as fits.

        Args:
            sources: What the search found, best first.
            earlier: The turns before, oldest first.
            notes: What to say beside what is left out here.
            answer: Tokens that the answer may have. A quarter of the context at most is kept free for them; what the
                prompt leaves beside that is theirs too.
        """
        budget = self._context - min(answer, self._context // 4)
        kept, prompt = self._most_turns(sources, earlier, budget)
        if prompt is None:
            sources, prompt, said = self._fewer_passages(sources, budget)
            notes = (*notes, *said)
        if kept < len(earlier):
            left = len(earlier) - kept
            notes = (*notes, f"{left} earlier turn{'s'[: left > 1]} left out: the context has {self._context} tokens")
        return _Request(self._question, prompt, sources, notes)

    def _most_turns(
        self, sources: tuple[Source, ...], earlier: tuple[Exchange, ...], budget: int
    ) -> tuple[int, list[int] | None]:
        """Return how many of the latest turns fit, by bisection, with the prompt; (0, None) if not even none do."""
        prompt = self._write(sources, earlier)
        if len(prompt) <= budget:
            return len(earlier), prompt
        best: tuple[int, list[int] | None] = (0, None)
        low, high = 0, len(earlier) - 1
        while low <= high:
            middle = (low + high) // 2
            prompt = self._write(sources, earlier[len(earlier) - middle :])
            if len(prompt) <= budget:
                best, low = (middle, prompt), middle + 1
            else:
                high = middle - 1
        return best

    def _fewer_passages(
        self, sources: tuple[Source, ...], budget: int
    ) -> tuple[tuple[Source, ...], list[int], tuple[str, ...]]:
        for limit in _PASSAGE_LIMITS:
            cut = tuple(replace(source, passage=best_part(source.passage, self._question, limit)) for source in sources)
            prompt = self._write(cut)
            if len(prompt) <= budget:
                return cut, prompt, (f"passages cut to {limit} characters: the context has {self._context} tokens",)
        for count in range(len(sources) - 1, 0, -1):
            prompt = self._write(cut[:count])
            if len(prompt) <= budget:
                return cut[:count], prompt, (f"only {count} of {len(sources)} entries fit the context",)
        return (), self._bare(), ("no journal entry fits the context beside the question",) if sources else ()

    def _bare(self) -> list[int]:
        prompt = self._write(())
        if len(prompt) > self._context - min(_LEAST_ANSWER, self._context // 2):
            raise GenerationError(
                f"the question takes {len(prompt)} tokens, and the model's context has {self._context}",
                hint="shorten it, or use a model with a longer context",
            )
        return prompt

    def _write(self, sources: tuple[Source, ...], earlier: tuple[Exchange, ...] = ()) -> list[int]:
        excerpts = tuple(Excerpt(source.number, source.heading(), source.passage) for source in sources)
        return self._writer.write(self._question, excerpts, earlier)
