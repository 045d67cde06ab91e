"""Makes a journal of some 2,100 entries and its questions from `families.txt`: the same ones each time.

A family is a kind of day that comes again and again: 88 entries that differ in three details, which are near-duplicates
of each other. Each question is about two details of one family and is answered by the one or two entries that have
both. A third names them in the entries' own words, most paraphrase one or both, and a quarter names a month, since the
same details occurred on other days too. The families are divided in two halves, so that what is tuned on the one can be
judged on the other; all entries stand in the one journal.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from lyra_emergence.journal import Journal, JournalEntry

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Question", "make_set"]

FAMILIES = Path(__file__).with_name("families.txt")
SEED = 8
ENTRIES = 88
"""Entries of a family."""
FIRST, DAYS = datetime(2023, 3, 1, 21), 730  # noqa: DTZ001  # a diary has no offsets
MOST_ANSWERS = 2
_QUESTIONS = ("plain", "plain", "half", "half", "paraphrased", "paraphrased", "dated", "dated")


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its answers.

    Attributes:
        text: What is asked.
        answers: Ids of the entries that answer it.
        kind: How it words the details: "plain", "half", "paraphrased" or "dated".
        held_out: Whether it belongs to the half that nothing was tuned on.
    """

    text: str
    answers: frozenset[str]
    kind: str
    held_out: bool


@dataclass(frozen=True, slots=True)
class _Family:
    name: str
    titles: tuple[str, ...]
    entries: tuple[str, ...]
    questions: tuple[str, ...]
    dated: str
    slots: dict[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, slots=True)
class _Day:
    entry: JournalEntry
    details: dict[str, tuple[str, str]]


def make_set() -> tuple[Journal, tuple[Question, ...]]:
    """Return the journal and its questions."""
    families, asides = _read()
    chance = random.Random(SEED)  # the same set each time is the point
    days = {family.name: _days(family, asides, chance) for family in families}
    questions = [
        question
        for place, family in enumerate(families)
        for question in _questions(family, days[family.name], held_out=bool(place % 2), chance=chance)
    ]
    entries = sorted((day.entry for listed in days.values() for day in listed), key=lambda entry: entry.timestamp)
    return Journal(FAMILIES, tuple(entries)), tuple(questions)


def _read() -> tuple[list[_Family], list[str]]:
    blocks = re.split(r"^= ", FAMILIES.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    *families, asides = blocks
    return [_family(block) for block in families], [line[2:] for line in asides.splitlines() if line.startswith(". ")]


def _family(block: str) -> _Family:
    head, *lines = block.strip().splitlines()
    name, titles = head.split(" | ")
    slots = dict(line.split(": ", 1) for line in lines if line[1] != " ")
    pairs = {key: tuple(tuple(one.split(" ~ ")) for one in value.split(" / ")) for key, value in slots.items()}
    texts = defaultdict(list)
    for line in lines:
        texts[line[0] if line[1] == " " else ""].append(line[2:])
    return _Family(name, tuple(titles.split("; ")), tuple(texts["T"]), tuple(texts["Q"]), texts["D"][0], pairs)  # type: ignore[arg-type]


def _days(family: _Family, asides: list[str], chance: random.Random) -> list[_Day]:
    combinations = list(product(*family.slots.values()))
    made = []
    for number, combination in enumerate(chance.sample(combinations, ENTRIES)):
        details = dict(zip(family.slots, combination, strict=True))
        template = chance.choice(family.entries)
        parts = [_filled(template, {key: pair[0] for key, pair in details.items()})]
        for aside in chance.sample(asides, chance.choice((0, 1, 1, 2, 3))):
            parts.insert(chance.randint(0, len(parts)), aside)
        moment = FIRST + timedelta(days=chance.randrange(DAYS), minutes=chance.randrange(120))
        title = chance.choice((*family.titles, "", ""))
        said = {key: pair for key, pair in details.items() if f"{{{key}}}" in template}
        made.append(_Day(JournalEntry(f"{family.name}-{number}", moment, " ".join(parts), title), said))
    return made


def _filled(template: str, words: dict[str, str]) -> str:
    text = template.format(**words)
    return re.sub(r"(?:^|(?<=[.!] ))[a-z]", lambda match: match[0].upper(), text)


def _questions(family: _Family, days: list[_Day], *, held_out: bool, chance: random.Random) -> Iterator[Question]:
    asked: set[str] = set()
    for kind in _QUESTIONS:
        for day in chance.sample(days, len(days)):
            question = _question(family, day, days, kind, chance)
            if question is not None and question[0] not in asked:
                asked.add(question[0])
                yield Question(*question, kind, held_out)
                break


def _question(
    family: _Family, day: _Day, days: list[_Day], kind: str, chance: random.Random
) -> tuple[str, frozenset[str]] | None:
    template = family.dated if kind == "dated" else chance.choice(family.questions)
    named = re.findall(r"\{(\w+)\}", template)
    if not all(name in day.details for name in named):
        return None
    same = [other for other in days if all(other.details.get(name) == day.details[name] for name in named)]
    when = day.entry.timestamp
    if kind == "dated":
        # Without the month it would be any of several.
        within = [other for other in same if f"{other.entry.timestamp:%Y-%m}" == f"{when:%Y-%m}"]
        if len(same) == len(within):
            return None
        same = within
    if len(same) > MOST_ANSWERS:
        return None
    own = {"plain": set(named), "half": {chance.choice(named)}, "paraphrased": set(), "dated": set()}[kind]
    words = {name: _asked(*day.details[name], own=name in own) for name in named}
    text = template.format(**words)
    if kind == "dated":
        text = f"{text} in {when:%B %Y}?"
    return text, frozenset(other.entry.id for other in same)


def _asked(own_words: str, other_words: str, *, own: bool) -> str:
    """Return a detail as a question has it, within a sentence."""
    words = (own_words if own else other_words).rstrip(".")
    return words[0].lower() + words[1:] if words.split()[0] in _LOWERED else words


_LOWERED = frozenset(
    """
    A An All Best Blackfly Blisters Burnt Could Cried Cut Did Drew Dug Everybody Far Finally Fixed Flat Forty Found Full
    Gone Hail Half Homework It Lent Lost Lovely Met My Nobody Not Nothing One Paid Perfect Physiotherapy Pigeons Planted
    Postponed Probably Pruned Raw Sent She Signed Singing Skipped Slugs Somebody Sowed Steroid Stopped Stung The There
    They Thinned Tied Told Twice Under Undid We Wind Wrong Wrote
    """.split()  # noqa: SIM905  # a list of a hundred lines says no more
)
