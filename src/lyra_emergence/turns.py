"""What a conversation is made of: questions, answers, and the journal passages behind them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from lyra_emergence.chunks import GenerationStats

__all__ = ["CITATION", "Answer", "ChatChunk", "Source", "Turn", "citations"]

CITATION: Final = re.compile(r"\s*\[(\d{1,3}(?:\s*[,;]\s*\d{1,3})*)\]")
"""A citation such as "[2]" or "[1, 3]", with the white space before it."""


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


def citations(text: str) -> tuple[int, ...]:
    """Return the numbers that `text` cites, as in "[2]" and "[1, 3]", each once, in order of appearance."""
    groups = (re.findall(r"\d+", match[1]) for match in CITATION.finditer(text))
    return tuple(dict.fromkeys(int(number) for group in groups for number in group))
