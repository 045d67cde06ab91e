"""What a question asks an index for: its telling words as a full-text expression that nothing in them can break."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lyra_emergence.journal.text import passages, words

if TYPE_CHECKING:
    from lyra_emergence.journal.entries import JournalEntry

__all__ = ["Hit", "asks_for_overview", "beginning_with", "best_part", "quoted", "terms"]

# Bounds for a text pasted as a question: FTS5 takes longer with every term, and the first ones say what is meant.
_MAX_TERMS = 32
_MAX_TERM_LENGTH = 64
_MAX_QUESTION = 4_000

_DIGIT_DATE = re.compile(r"\b(?:19|20)[0-9]{2}-[01][0-9](?:-[0-3][0-9])?\b")
# "What is the dog called?" asks for a name; "Who called?" for a call.
_NAMING = re.compile(r"\bwhat(?:'s| is| are| was| were)\b(.*) called\s*\??\s*\Z", re.IGNORECASE | re.DOTALL)
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+")

# Words of English that carry no topic, and the words of small talk and of asking itself.
_STOP_WORD_LIST = """
a about after again all also am an and any are aren as at be because been before being between both but by can
could couldn d did didn do does doesn doing don done during each else ever for from further get gets getting go
goes going gone got had hadn has hasn have haven having he her here hers herself him himself his how i if in into
is isn it its itself just let ll m many may me might more most much must my myself no nor not now of off often on
once one only or other our ours ourselves out over own per re s said same say says shall she should shouldn so some
something such t than that the their theirs them themselves then there these they thing things this those though
through to too under until up upon us ve very was wasn we were weren what when where which while who whom whose why
will with within without won would wouldn yes yet you your yours yourself
anything ask asked bye could explain find give hello help hey hi journal know like list look lyra mean mention
mentioned need ok okay please question read recall remember show sorry sure tell thank thanks think want wanted
wonder wondering write written wrote diary entries entry
"""
_STOP_WORDS = frozenset(_STOP_WORD_LIST.split())


_OVERVIEW = re.compile(
    r"\b(?:summar(?:y|ies|i[sz]e[ds]?|i[sz]ing)|sum(?: it)? up|recap|overview|catch me up|what(?:'s| is) new"
    r"|been (?:up to|going on|doing)|(?:happen(?:ed|ing)|written) (?:lately|recently))\b",
    re.IGNORECASE,
)
# What may stand in a question for an overview without naming anything in the journal.
_OVERVIEW_WORD_LIST = """
been bring brief catch day days doing everything happened happening last lately latest life month new news overview
quick quickly recap recent recently short sum summaries summarise summarize summary today up week weeks
"""
_OVERVIEW_WORDS = frozenset(_OVERVIEW_WORD_LIST.split())


@dataclass(frozen=True, slots=True)
class Hit:
    """An entry that a search found.

    Attributes:
        entry: The entry.
        score: How well it matches, greater being better; comparable within one search only.
        passage: The part of its text that matches best, 600 characters at most; a short entry's whole text.
    """

    entry: JournalEntry
    score: float
    passage: str


def terms(question: str) -> tuple[str, ...]:
    """Return the telling words of `question`, lower case, each once; none if it has stop words only.

    A stop word with a capital inside a sentence is a name: "What did Will say?". Dates in digits are left to
    `dates.named_dates`: their numbers would match any other.
    """
    question = _NAMING.sub(r"\1", _DIGIT_DATE.sub(" ", question[:_MAX_QUESTION]))
    names = {name.lower() for name in _NAME.findall(question)}
    telling = (word for word in words(question) if _tells(word) or word in names)
    return tuple(dict.fromkeys(telling))[:_MAX_TERMS]


def asks_for_overview(question: str) -> bool:
    """Return whether `question` asks what has been happening at large and names nothing: "Summarize my week."."""
    return bool(_OVERVIEW.search(question[:_MAX_QUESTION])) and _OVERVIEW_WORDS.issuperset(terms(question))


def _tells(word: str) -> bool:
    return word not in _STOP_WORDS and len(word) <= _MAX_TERM_LENGTH and not (len(word) == 1 and word.isascii())


def quoted(term: str) -> str:
    """Return `term` as an FTS5 string: in quotes, its own quotes doubled, without NUL, so it is never an operator."""
    return '"' + term.replace("\0", "").replace('"', '""') + '"'


def beginning_with(term: str) -> str:
    """Return the FTS5 expression that matches the words that begin with `term`."""
    return f"{quoted(term)}*"


def best_part(passage: str, question: str, limit: int) -> str:
    """Return the part of `passage`, `limit` characters at most, that shares most words with `question`."""
    telling = set(terms(question))
    parts = passages(passage, limit)
    return max(parts, key=lambda part: len(telling.intersection(words(part))), default="")
