"""What the model should say: fixed sentences, and a diary's own sentence in the second person with its citation."""

import re
from dataclasses import dataclass

from training import words
from training.entries import Entry

ABSENT = "The journal entries I was given do not say."
GREETING = "Hello! Ask me something about your journal, and I will look it up in your entries."
HELP = "I answer questions from the journal entries I am given and cite them. Ask me who, what, where or when."
ABOUT = (
    "I am the small model that ships with Lyra. I can look things up in your journal entries, and I know nothing else."
)
THANKS = "You are welcome."
GOODBYE = "Goodbye."
_PRONOUNS = dict(pair.split(":") for pair in words.VALUES["second_person"])
_WORD = re.compile(r"[A-Za-z]+(?:['\u2019][a-z]+)?")
_RUN = re.compile(r"(((?:\b\w+\b|[^\w\s])[ ,]*)\2\2)\2+")
LONGEST_RUN = 3
"""How often in a row an answer may say one thing."""
_LOWERED = frozenset(("You", "Your", "The", "A", "An", "In", "At", "On", "It", "There", "This", "That"))


@dataclass(frozen=True, slots=True)
class Example:
    """What the model sees and what it should say; `turns` are earlier (question, answer) pairs.

    `source` is the sentence, as it stands in an entry, that answers the question.
    """

    question: str
    entries: tuple[Entry, ...]
    answer: str
    turns: tuple[tuple[str, str], ...] = ()
    source: str | None = None


def second_person(sentence: str) -> str:
    """Rewrites the first person into the second ("I met my aunt" -> "You met your aunt"), leaving quotations alone."""
    parts = sentence.split('"')
    return '"'.join(part if index % 2 else _rewrite(part) for index, part in enumerate(parts))


def _rewrite(text: str) -> str:
    def swap(match: re.Match[str]) -> str:
        word = match[0]
        new = _PRONOUNS.get(word.lower().replace("\u2019", "'"))
        if new is None or (word == "US") or (word == "Mine" and match.start() > 0):
            return word
        starts = match.start() == 0 or text[: match.start()].rstrip()[-1:] in {".", "!", "?"}
        return new[0].upper() + new[1:] if starts and word[0].isupper() else new

    text = re.sub(r"\bI am\b", "I are", text)
    text = re.sub(r"\b(I(?: also| really| still| just)?) was(n't)?\b", r"\1 were\2", text)
    return _WORD.sub(swap, text)


def said(sentence: str) -> str:
    """Returns the sentence in the second person with one full stop at its end, and no run of more than three."""
    return f"{second_person(collapsed(sentence)).rstrip().rstrip('.!?…')}."


def collapsed(sentence: str) -> str:
    """Returns the sentence with a word or sign that stands more than three times in a row standing three times.

    A model that copies does not count: it would go on with a long run until it is stopped.
    """
    return _RUN.sub(r"\1", sentence)


def cite(sentence: str, number: int) -> str:
    """Returns the sentence in the second person with its citation before a full stop."""
    return f"{said(sentence)[:-1]} [{number}]."


def dated(sentence: str, date: str, number: int) -> str:
    """Returns the cited sentence with the day of its entry before it."""
    text = cite(sentence, number)
    if text.split()[0] in _LOWERED:
        return f"On {date} {text[0].lower()}{text[1:]}"
    return f"On {date}: {text}"
