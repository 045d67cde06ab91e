"""The grammar's vocabulary: word lists, made-up words, and the expansion of templates over them.

A template is text with ``{slot}`` names and ``(one|other|)`` choices. A slot's values may be templates themselves.
"""

import random
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

_SLOT = re.compile(r"\{([A-Za-z_]+)(\d?)\}")
_CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")


def _read(path: Path) -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    for block in path.read_text(encoding="utf-8").split("\n= ")[1:]:
        name, listing = block.split("\n", 1)
        sections[name] = [_unquote(value.strip()) for value in listing.replace("\n", " ").split("|")]
    return sections


def _unquote(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value


VALUES: Mapping[str, list[str]] = _read(Path(__file__).with_name("vocabulary.txt"))


def made_up(rng: random.Random) -> str:
    """Returns a pronounceable word that is (almost surely) in no dictionary, so that it can only be copied."""
    syllables = (
        rng.choice(VALUES["onset"]) + rng.choice(VALUES["nucleus"]) + rng.choice(VALUES["coda"])
        for _ in range(rng.choice((1, 1, 2, 2, 2, 3)))
    )
    return "".join(syllables) + rng.choice(VALUES["suffix"])


def name(rng: random.Random) -> str:
    """Returns a given name, made up one time in three."""
    return made_up(rng).capitalize() if rng.random() < 0.35 else rng.choice(VALUES["first_name"])


def _person(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.55:
        return name(rng)
    if kind < 0.75:
        return f"{rng.choice(('my', 'my', 'my', 'our'))} {rng.choice(VALUES['relation'])} {name(rng)}"
    if kind < 0.87:
        return f"my {rng.choice(VALUES['relation'])}"
    return f"{rng.choice(('Dr.', 'Mr.', 'Mrs.', 'Ms.', 'Aunt', 'Uncle', 'Professor'))} {name(rng)}"


def _place(rng: random.Random) -> str:
    word = rng.choice(VALUES["placeword"])
    return rng.choice(
        (f"the {word}", f"the {word}", f"the {made_up(rng)} {word}", f"the {rng.choice(VALUES['adj'])} {word}")
    )


def _thing(rng: random.Random) -> str:
    noun = made_up(rng) if rng.random() < 0.15 else rng.choice(VALUES["bare"])
    return f"{rng.choice(VALUES['adj'])} {noun}" if rng.random() < 0.5 else noun


def _clock(rng: random.Random) -> str:
    hour, minute = rng.randint(1, 23), rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50))
    half = rng.choice(("a.m.", "p.m.", "in the morning"))
    forms = (
        f"{hour}:{minute:02d}",
        f"{hour:02d}:{minute:02d}",
        f"{hour % 12 + 1} {half}",
        f"half past {rng.choice(VALUES['number_word'][:10])}",
    )
    return rng.choice(forms)


def _money(rng: random.Random) -> str:
    amount = rng.choice((rng.randint(2, 99), rng.randint(100, 990), rng.randint(10, 99) * 100))
    cents = f".{rng.randint(10, 99)}" if rng.random() < 0.2 else ""
    return rng.choice(
        (
            f"{amount}{cents} euros",
            f"{amount}{cents} dollars",
            f"${amount}{cents}",
            f"{amount} crowns",
            f"{amount}{cents} pounds",
        )
    )


def _number(rng: random.Random) -> str:
    return rng.choice((str(rng.randint(2, 30)), str(rng.randint(31, 999)), rng.choice(VALUES["number_word"])))


def _duration(rng: random.Random) -> str:
    unit = rng.choice(("minutes", "hours", "days", "weeks", "months", "years"))
    return rng.choice(
        (f"{_number(rng)} {unit}", f"{_number(rng)} {unit}", "half an hour", "an hour", "a whole day", "a week")
    )


def _ordinal(day: int) -> str:
    suffix = "th" if 10 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


def _day(rng: random.Random) -> str:
    month, day = rng.choice(VALUES["month"]), rng.randint(1, 28)
    return rng.choice(
        (f"{month} {day}", f"{day} {month}", f"the {_ordinal(day)} of {month}", f"{month} {_ordinal(day)}")
    )


def _title(rng: random.Random) -> str:
    words = (made_up(rng), rng.choice(VALUES["bare"]), rng.choice(VALUES["animal"]), rng.choice(VALUES["placeword"]))
    noun, other = (word.title() for word in rng.sample(words, 2))
    adjective = rng.choice(VALUES["adj"]).title()
    form = rng.choice(
        (f"The {adjective} {noun}", f"{noun} and {other}", f"The {noun} of {other}", f"{adjective} {noun}s")
    )
    return f'"{form}"' if rng.random() < 0.3 else form


def _distance(rng: random.Random) -> str:
    return f"{_number(rng)} {rng.choice(('kilometers', 'miles', 'km', 'laps', 'steps', 'meters'))}"


def _code(rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHKLMNPRSTUVWXYZ") for _ in range(rng.randint(0, 3)))
    return letters + "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 5)))


_MAKERS: Mapping[str, Callable[[random.Random], str]] = {
    "made": made_up,
    "name": name,
    "Name": lambda rng: made_up(rng).capitalize(),
    "person": _person,
    "place": _place,
    "thing": _thing,
    "clock": _clock,
    "money": _money,
    "number": _number,
    "duration": _duration,
    "day": _day,
    "title": _title,
    "distance": _distance,
    "code": _code,
    "company": lambda rng: rng.choice(("{} Ltd", "{} & Sons", "{}", "the {} group", "{} Bank")).format(
        made_up(rng).capitalize()
    ),
    "project": lambda rng: rng.choice(("the {} project", "project {}", "the {} account")).format(
        made_up(rng).capitalize()
    ),
    "percent": lambda rng: f"{rng.randint(2, 98)} percent",
    "year": lambda rng: str(rng.randint(1950, 2030)),
}
# Half of these may be a word nobody has seen, so that the position decides and not the vocabulary.
_OPEN = {
    "plant": 0.15,
    "food": 0.15,
    "dish": 0.12,
    "city": 0.35,
    "pet": 0.1,
    "medicine": 0.25,
    "job": 0.05,
    "event": 0.05,
    "symptom": 0.03,
}


@cache
def kinds() -> frozenset[str]:
    """Returns the names that a slot may have."""
    return frozenset({*_MAKERS, *VALUES})


@cache
def common_nouns() -> frozenset[str]:
    """Returns single words that name things, places, animals and food."""
    listed = (word for kind in ("noun", "bare", "placeword", "animal", "pet", "food", "plant") for word in VALUES[kind])
    return frozenset(word for word in listed if word.isalpha())


def value(slot: str, rng: random.Random) -> str:
    """Returns one value of `slot`, fully expanded; KeyError for an unknown slot."""
    if slot in _MAKERS:
        return _MAKERS[slot](rng)
    if rng.random() < _OPEN.get(slot, 0.0):
        word = made_up(rng)
        return {"city": word.capitalize(), "dish": f"{word} soup"}.get(slot, word)
    return expand(rng.choice(VALUES[slot]), rng)


def choose(template: str, rng: random.Random) -> str:
    """Resolves every ``(one|other)`` of `template`, innermost first, leaving its slots."""
    while match := _CHOICE.search(template):
        template = template[: match.start()] + rng.choice(match[1].split("|")) + template[match.end() :]
    return re.sub(r"  +", " ", template).replace(" ,", ",").replace(" .", ".").replace(" ?", "?").strip()


def slots(template: str) -> list[tuple[str, str]]:
    """Returns the slots of `template` as (key, kind): ``{person2}`` is ("person2", "person")."""
    return [(match[1] + match[2], match[1]) for match in _SLOT.finditer(template)]


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replaces each slot of `template` by its value."""
    return _SLOT.sub(lambda match: values[match[1] + match[2]], template)


def expand(template: str, rng: random.Random) -> str:
    """Resolves choices and fills every slot with a value of its own."""
    return _SLOT.sub(lambda match: value(match[1], rng), template)
