"""Scenes: hand-written stretches of diaries with slots, and questions that each of their sentences answers.

The files of ``scenes/`` hold them in this form, a blank line between two scenes::

    = Dentist | Teeth                                   titles that the entry may have
    Saw Dr. {Name} about the left molar.                a sentence of the diary
    ? Which doctor looked at my molar?                  a question that this sentence answers
    ! What is the dentist's phone number?               a question that no sentence of the scene answers

A later sentence may lean on an earlier one, so a scene is told from its first sentence on.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from training import words

_FOLDER = Path(__file__).with_name("scenes")
_SLOT = re.compile(r"(?:\b(?P<article>[Aa]|[Tt]he|[Mm]y|[Oo]ur) )?\{(?P<key>[A-Za-z]+\d?)\}")
_PRONOUNS = (("he", "him", "his"), ("she", "her", "her"))
_NAMED = ("name", "Name", "person")
_AFTER_SUBJECT = frozenset(("did", "does", "do", "is", "was", "has", "had", "will", "can", "would", "should", "could"))
_SWAPPED = 0.3
"""Share of scenes in which a common noun becomes another or a made-up one, so that it must be read, not remembered."""


@dataclass(frozen=True, slots=True)
class Line:
    """A sentence and the questions that it answers, as templates or told."""

    text: str
    asks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """Templates of sentences that belong together; `absent` are questions that none of them answers."""

    key: str
    titles: tuple[str, ...]
    lines: tuple[Line, ...]
    absent: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Told:
    """A scene with its slots filled.

    `leaning` holds (line, question) pairs that name a person by a pronoun, for a conversation that has named them.
    """

    scene: Scene
    title: str
    lines: tuple[Line, ...]
    absent: tuple[str, ...]
    leaning: tuple[tuple[int, str], ...]


@cache
def scenes(folder: Path = _FOLDER) -> tuple[Scene, ...]:
    """Reads all scenes, in the order of the files' names.

    Raises:
        ValueError: A scene is not in the form; the message says where.
    """
    found: list[Scene] = []
    for path in sorted(folder.glob("*.txt")):
        blocks = re.split(r"\n\s*\n", path.read_text(encoding="utf-8").strip())
        found += [_parse(block, f"{path.stem}:{number}") for number, block in enumerate(blocks, start=1)]
    return tuple(found)


@cache
def lower_words() -> frozenset[str]:
    """Returns the words that stand in some scene with a small first letter."""
    texts = " ".join(re.sub(r"\{\w+\}", " ", line.text) for scene in scenes() for line in scene.lines)
    return frozenset(re.findall(r"(?<![A-Za-z'])[a-z]+", texts))


def _parse(block: str, key: str) -> Scene:
    head, *rest = [line.strip() for line in block.splitlines() if not line.startswith("#")]
    if not head.startswith("= ") or not rest:
        raise ValueError(f"scene {key} begins with {head!r} instead of '= title' and sentences")
    texts: list[str] = []
    asks: list[list[str]] = []
    absent: list[str] = []
    for line in rest:
        if line.startswith("! "):
            absent.append(line[2:])
        elif not line.startswith("? "):
            texts.append(line)
            asks.append([])
        elif asks:
            asks[-1].append(line[2:])
        else:
            raise ValueError(f"scene {key} asks before it says anything: {line!r}")
    _check_slots(key, rest)
    lines = tuple(Line(text, tuple(asked)) for text, asked in zip(texts, asks, strict=True))
    return Scene(key, tuple(title.strip() for title in head[2:].split("|")), lines, tuple(absent))


def _check_slots(key: str, lines: list[str]) -> None:
    known = {"They", "they", "them", "Their", "their"} | words.kinds()
    for line in lines:
        for match in _SLOT.finditer(line):
            if match["key"].rstrip("0123456789") not in known:
                raise ValueError(f"scene {key} has an unknown slot {{{match['key']}}} in {line!r}")


def tell(scene: Scene, rng: random.Random, most: int = 9) -> Told:
    """Fills the slots of the first lines of `scene`, `most` at most."""
    values = _values(scene, rng)
    swap = _swap(scene, rng) if rng.random() < _SWAPPED else {}

    def put(template: str) -> str:
        text = _fill(words.choose(template, rng), values)
        return re.sub(r"[a-z]+", lambda match: _swapped(match[0], swap), text) if swap else text

    lines = tuple(Line(_capital(put(line.text)), line.asks) for line in scene.lines[:most])
    leaning = tuple(
        (index, _capital(put(_lean(ask, values))))
        for index, line in enumerate(lines)
        for ask in line.asks
        if _leans(ask)
    )
    lines = tuple(Line(line.text, tuple(_capital(put(ask)) for ask in line.asks)) for line in lines)
    absent = tuple(_capital(put(ask)) for ask in scene.absent)
    return Told(scene, rng.choice((*scene.titles, *scene.titles, "")), lines, absent, leaning)


def _values(scene: Scene, rng: random.Random) -> Mapping[str, str]:
    they, them, their = rng.choice(_PRONOUNS)
    values = {"They": they.capitalize(), "they": they, "them": them, "Their": their.capitalize(), "their": their}
    texts = [*(line.text for line in scene.lines), *(ask for line in scene.lines for ask in line.asks), *scene.absent]
    for text in texts:
        for match in _SLOT.finditer(text):
            if (key := match["key"]) not in values:
                values[key] = words.value(key.rstrip("0123456789"), rng)
    return values


def _fill(template: str, values: Mapping[str, str]) -> str:
    return _SLOT.sub(lambda match: _with_article(match["article"], values[match["key"]]), template)


def _with_article(article: str | None, value: str) -> str:
    if article is None:
        return value
    if value.startswith(("the ", "my ", "our ", "a ", "an ")):
        return value if article[0].islower() else _capital(value)
    if article in {"a", "A"} and value[:1].lower() in "aeiou":
        return f"{article}n {value}"
    return f"{article} {value}"


def _swap(scene: Scene, rng: random.Random) -> dict[str, str]:
    literal = " ".join(re.sub(r"\{\w+\}", " ", line.text) for line in scene.lines)
    nouns = sorted({word for word in re.findall(r"[a-z]{4,}", literal) if word in words.common_nouns()})
    chosen = rng.sample(nouns, min(len(nouns), rng.choice((1, 1, 2, 3))))
    return {word: words.made_up(rng) if rng.random() < 0.5 else rng.choice(words.VALUES["noun"]) for word in chosen}


def _swapped(word: str, swap: Mapping[str, str]) -> str:
    if word in swap:
        return swap[word]
    return swap[word[:-1]] + "s" if word.endswith("s") and word[:-1] in swap else word


def _leans(ask: str) -> bool:
    return sum(f"{{{key}}}" in ask for key in _NAMED) == 1


def _lean(ask: str, values: Mapping[str, str]) -> str:
    """Returns the question with its person as a pronoun: "Where does {name} live?" is "Where does she live?"."""

    def pronoun(match: re.Match[str]) -> str:
        if match["own"]:
            return values["their"]
        return values["they"] if (match["before"] or "").lower() in _AFTER_SUBJECT else values["them"]

    pattern = r"(?P<before>\w+)?(?P<gap> ?)(?:Dr\. |Mr\. |Mrs\. |Aunt |Uncle )?\{(?:name|Name|person)\}(?P<own>'s)?"
    return re.sub(pattern, lambda match: (match["before"] or "") + match["gap"] + pronoun(match), ask)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
