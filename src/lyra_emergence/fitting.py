"""Fitting a question, journal passages and earlier turns into a model's context, by the rule that `chat` states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from lyra_emergence.errors import GenerationError
from lyra_emergence.journal.search import best_part
from lyra_emergence.prompting import Excerpt, Exchange

if TYPE_CHECKING:
    from collections.abc import Sized

    from lyra_emergence.speaker import Writer
    from lyra_emergence.turns import Source

__all__ = ["Fitting", "Request"]

_PASSAGE_LIMITS: Final = (400, 250, 150)
"""Characters that passages are cut to, one after the other, where the context is short."""
_LEAST_ANSWER: Final = 32
"""Tokens of an answer that are kept free even for the longest question."""


@dataclass(frozen=True, slots=True)
class Request:
    """A question with all that goes into its prompt.

    Attributes:
        question: The question.
        prompt: What the speaker's writer made; its `len` is its tokens.
        sources: The passages in it.
        notes: What was left out, a line each.
    """

    question: str
    prompt: Sized
    sources: tuple[Source, ...]
    notes: tuple[str, ...]


class Fitting:
    """Fits a prompt into a context of `context` tokens, keeping room for the answer."""

    def __init__(self, writer: Writer, question: str, context: int) -> None:
        self._writer = writer
        self._question = question
        self._context = context

    def fit(
        self, sources: tuple[Source, ...], earlier: tuple[Exchange, ...], notes: tuple[str, ...], answer: int
    ) -> Request:
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
        return Request(self._question, prompt, sources, notes)

    def _most_turns(
        self, sources: tuple[Source, ...], earlier: tuple[Exchange, ...], budget: int
    ) -> tuple[int, Sized | None]:
        """Return how many of the latest turns fit, by bisection, with the prompt; (0, None) if not even none do."""
        prompt = self._write(sources, earlier)
        if len(prompt) <= budget:
            return len(earlier), prompt
        best: tuple[int, Sized | None] = (0, None)
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
    ) -> tuple[tuple[Source, ...], Sized, tuple[str, ...]]:
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

    def _bare(self) -> Sized:
        prompt = self._write(())
        if len(prompt) > self._context - min(_LEAST_ANSWER, self._context // 2):
            raise GenerationError(
                f"the question takes {len(prompt)} tokens, and the model's context has {self._context}",
                hint="shorten it, or use a model with a longer context",
            )
        return prompt

    def _write(self, sources: tuple[Source, ...], earlier: tuple[Exchange, ...] = ()) -> Sized:
        excerpts = tuple(Excerpt(source.number, source.heading(), source.passage) for source in sources)
        return self._writer.write(self._question, excerpts, earlier)
