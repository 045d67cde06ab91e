"""Sentences without a frame: words in loose order, so that only reading and copying can answer a question on them."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from training import words

_PARTS = ("subject", "object", "base", "past", "tail")


@dataclass(frozen=True, slots=True)
class Wild:
    """A sentence, the parts a question may name, and question templates whose parts it has."""

    text: str
    values: Mapping[str, str]
    asks: tuple[str, ...]


def _noun(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.3:
        return words.made_up(rng) + rng.choice(("", "", "s"))
    plural = rng.choice(("", "", "s"))
    return rng.choice(words.VALUES[rng.choice(("noun", "noun", "noun", "bare", "placeword", "animal", "job"))]) + plural


def _phrase(rng: random.Random) -> str:
    """Returns a noun phrase of one to four words."""
    draw = rng.random()
    if draw < 0.22:
        return words.name(rng)
    if draw < 0.3:
        return words.value("person", rng)
    if draw < 0.42:
        return f"{words.value(rng.choice(('number', 'number', 'code', 'year')), rng)} {_noun(rng)}"
    if draw < 0.5:
        return words.value(
            rng.choice(("money", "clock", "day", "duration", "weekday", "month", "percent", "title")), rng
        )
    describe = rng.choice(words.VALUES["adj"]) if draw < 0.7 else words.made_up(rng) if draw < 0.74 else ""
    start = rng.choice(("the", "the", "the", "a", "my", "our", "this", "no", "some", "every", "their", "her", ""))
    return " ".join(part for part in (start, describe, _noun(rng)) if part)


def _verb(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.15:
        base = words.made_up(rng)
        return base, base + "ed"
    base, past = rng.choice(words.VALUES["plain_verb"]).split(":")
    return base, past


def _clause(rng: random.Random) -> dict[str, str]:
    """Returns the parts of a clause; any of them may be missing."""
    base, past = _verb(rng)
    parts = {"base": base, "past": past}
    draw = rng.random()
    if draw < 0.4:
        parts["subject"] = rng.choice(("I", "I", "I", "we"))
    elif draw < 0.85:
        parts["subject"] = _phrase(rng)
    if rng.random() < 0.12:
        parts["being"] = rng.choice(words.VALUES["being"])
    if rng.random() < 0.75:
        parts["object"] = _phrase(rng)
    if rng.random() < 0.6:
        parts["tail"] = f"{rng.choice(words.VALUES['preposition'])} {_phrase(rng)}"
    if rng.random() < 0.15:
        parts["adverb"] = rng.choice(words.VALUES["adverb"])
    return parts


def _join(parts: Mapping[str, str], rng: random.Random) -> str:
    order = ["subject", "being" if "being" in parts else "past", "object", "adverb", "tail"]
    if rng.random() < 0.12:
        rng.shuffle(order)
    if rng.random() < 0.08 and len(parts) > 4:
        order = [key for key in order if key not in {"past", "being"}]
    return " ".join(parts[key] for key in order if key in parts)


def _punctuate(text: str, rng: random.Random) -> str:
    return text[:1].upper() + text[1:] + rng.choice((".", ".", ".", ".", ".", ".", "!", "…"))


def draw_wild(rng: random.Random, given: str | None = None, *, short: bool = False) -> Wild:
    """Draws a sentence of one to three loose clauses; it mentions `given` if there is one."""
    clauses = [_clause(rng) for _ in range(1 if short else rng.choice((1, 1, 1, 2, 2, 3)))]
    if given:
        rng.choice(clauses)[rng.choice(("subject", "object"))] = given
    text = _join(clauses[0], rng)
    for clause in clauses[1:]:
        joint = rng.choice(words.VALUES["joint"]).format(_join(clause, rng))
        text += joint if joint[0] in ",;:" else " " + joint
    asked = rng.choice(clauses)
    values = {key: asked[key] for key in _PARTS if key in asked and asked[key] in text}
    if "past" in values:
        values["base"] = asked["base"]
    fits = []
    for ask in words.VALUES["wild_question"]:
        keys = {key for key, _ in words.slots(ask)}
        telling = {key for key in keys if values.get(key, "I") not in {"I", "we"}}
        if keys <= values.keys() and telling:
            fits.append(ask)
    return Wild(_punctuate(text, rng), values, tuple(fits))
