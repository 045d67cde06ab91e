"""Journal entries by grammar: frames, the events that fill them, and entries made of events."""

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from training import words
from training.wild import draw_wild

# Words without weight when a question is matched with a sentence, and the verbs whose past hides their stem.
_STOP = frozenset(words.VALUES["stop_word"])
_IRREGULAR = dict(pair.split(":") for pair in words.VALUES["irregular"])
_SHAPES = (
    ("I {past} {obj} at {place}", ("What did I {base} at {place}?", "Where did I {base} {obj}?")),
    (
        "I {past} {obj} with {person}",
        ("What did I {base} with {person}?", "(Who|With whom) did I {base} {obj}( with|)?"),
    ),
    ("I {past} {obj} {spot}", ("What did I {base} {spot}?", "Where did I {base} {obj}?")),
    (
        "{person} {past} {obj} at {place}",
        ("What did {person} {base}( at {place}|)?", "Where did {person} {base} {obj}?", "Who {past} {obj}?"),
    ),
    (
        "{person} {past} {obj} {spot}",
        ("What did {person} {base}( {spot}|)?", "Where did {person} {base} {obj}?", "Who {past} {obj}?"),
    ),
    (
        "I {past} {obj} for {duration}",
        ("(For how long|How long) did I {base} {obj}?", "What did I {base} for {duration}?"),
    ),
    ("{person} and I {past} {obj}", ("What did {person} and I {base}?", "Who {past} {obj} with me?")),
    (
        "I {past} {obj} for {person}",
        ("What did I {base} for {person}?", "For whom did I {base} {obj}?", "Who did I {base} {obj} for?"),
    ),
    (
        "I {past} {number} {made}s at {place}",
        (
            "How many {made}s did I {base}( at {place}|)?",
            "What did I {base} at {place}?",
            "Where did I {base} the {made}s?",
        ),
    ),
    (
        "{person} {past} a {adj} {made} {spot}",
        ("What did {person} {base}?", "Where did {person} {base} the {made}?", "Who {past} the {made}?"),
    ),
    ("I {past} a {made} {made2}", ("What did I {base}?", "Did I {base} anything?", "Which {made2} did I {base}?")),
    ("The {made} is {spot}", ("Where is the {made}?", "What is {spot}?", "Where can I find the {made}?")),
    (
        "The {made} is {adj} and {adj2}",
        ("(What is|Describe) the {made}( like|)?", "What is {adj2}?", "How does the {made} look?"),
    ),
    (
        "The {made} {made2} belongs to {person}",
        ("Who owns the {made2}?", "What belongs to {person}?", "Whose is the {made} {made2}?"),
    ),
)


@dataclass(frozen=True, slots=True)
class Frame:
    """A kind of event: sentence templates, and for each the question templates it answers."""

    key: str
    topics: tuple[str, ...]
    statements: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class Event:
    """One stated fact: its sentence as the diary has it, and what can be asked of it."""

    frame: str
    topics: tuple[str, ...]
    values: Mapping[str, str]
    text: str
    full: str
    asks: tuple[str, ...]
    because: bool

    def kinds(self) -> dict[str, str]:
        """Returns the slot values by key, persons and made-up words included."""
        return dict(self.values)


@dataclass(slots=True)
class World:
    """The few people, places and things one journal keeps coming back to, so that distractors share them.

    In a plain one every sentence is short: no opening, no tail, a single clause.
    """

    rng: random.Random
    plain: bool = False
    pools: dict[str, list[str]] = field(default_factory=dict)

    def value(self, kind: str) -> str:
        """Returns a value for a slot of `kind`: a recurring one, or one time in two a fresh one."""
        pool = self.pools.setdefault(kind, [])
        if pool and self.rng.random() < 0.5:
            return self.rng.choice(pool)
        fresh = words.value(kind, self.rng)
        if len(pool) < 3:
            pool.append(fresh)
        return fresh


def _stems(text: str) -> set[str]:
    plain = re.findall(r"[a-z]+", re.sub(r"\{[^}]*\}", " ", text).lower())
    return {_IRREGULAR.get(word, re.sub(r"(ing|ed|es|s|d|e)$", "", word))[:5] for word in plain if word not in _STOP}


def _answers(statement: str, question: str, *, mixed: bool) -> bool:
    stated = {key for key, _ in words.slots(statement)}
    asked = {key for key, _ in words.slots(question)}
    if not asked <= stated or (asked == stated and len(stated) == 1 and question.startswith(("Wh", "How"))):
        return False
    return not mixed or bool(_stems(statement) & _stems(question))


@cache
def frames() -> tuple[Frame, ...]:
    """Reads the frames of ``frames.txt`` (see its head for the form)."""
    blocks = Path(__file__).with_name("frames.txt").read_text(encoding="utf-8").split("\n\n")
    found = []
    for number, block in enumerate(blocks):
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        if not lines:
            continue
        mixed, topics = lines[0].startswith("=*"), tuple(lines[0].lstrip("=* ").split("|"))
        questions = [line.removeprefix("?").strip() for line in lines if line.startswith("?")]
        statements = [line for line in lines[1:] if not line.startswith("?")]
        pairs = ((s, tuple(q for q in questions if _answers(s, q, mixed=mixed))) for s in statements)
        found.append(Frame(f"{number}:{topics[0]}", topics, tuple(pair for pair in pairs if pair[1])))
    return tuple(found)


def _verb_frame(rng: random.Random) -> Frame:
    *base, past, kind = _split_verb(rng.choice(words.VALUES["verb"]))
    shape, asks = rng.choice(_SHAPES)
    determiner = {
        "thing": "the ",
        "pet": "the ",
        "animal": "the ",
        "worktask": "the ",
        "event": "the ",
        "placeword_room": "the ",
    }.get(kind, "")
    slot = determiner + "{" + kind + ("2" if kind == "person" else "") + "}"

    def put(text: str) -> str:
        return text.replace("{past}", past).replace("{base}", base[0]).replace("{obj}", slot)

    return Frame(
        f"verb:{base[0]}:{shape[:9]}",
        ("Notes", "Day", kind.title()),
        ((put(shape) + ".", tuple(put(ask) for ask in asks)),),
    )


def _split_verb(line: str) -> tuple[str, str, str]:
    parts = line.split()
    middle = (len(parts) - 1) // 2
    return " ".join(parts[:middle]), " ".join(parts[middle:-1]), parts[-1]


def _article(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def tidy(text: str) -> str:
    """Returns `text` with a/an agreed, a double article removed and a capital first letter."""
    text = _article(re.sub(r"\b(the|my|a) (the|my|our|a) ", r"\2 ", text))
    return text[:1].upper() + text[1:]


def draw_event(world: World, given: Mapping[str, str] | None = None, frame: Frame | None = None) -> Event:
    """Draws one event; `given` fixes values by slot kind (the first slot of that kind takes it)."""
    rng, given = world.rng, dict(given or {})
    if frame is None and rng.random() < 0.4:
        return _wild_event(world, rng.choice(sorted(given.values())) if given else None)
    if frame is None:
        frame = _verb_frame(rng) if rng.random() < 0.22 else rng.choice(frames())
        for _ in range(12 if given else 0):
            if any(kind in given for s, _ in frame.statements for _, kind in words.slots(s)):
                break
            frame = _verb_frame(rng) if rng.random() < 0.3 else rng.choice(frames())
    statement, asks = rng.choice(frame.statements)
    values: dict[str, str] = {}
    for key, kind in words.slots(words.choose(statement, rng)) + words.slots(statement):
        if key not in values:
            values[key] = given.pop(kind) if kind in given else world.value(kind)
            if list(values.values()).count(values[key]) > 1:
                values[key] = words.value(kind, rng)
    full = tidy(words.fill(words.choose(statement, rng), values))
    text, full, because = (full, full, " because " in full) if world.plain else _decorate(full, rng)
    return Event(frame.key, frame.topics, values, text, full, asks, because)


def _wild_event(world: World, given: str | None) -> Event:
    if given is None and world.rng.random() < 0.3:
        given = world.value(world.rng.choice(("name", "person", "place", "bare", "made")))
    wild = draw_wild(world.rng, given, short=world.plain)
    while not wild.asks:
        wild = draw_wild(world.rng, given, short=world.plain)
    text = tidy(wild.text)
    return Event("wild:" + text, ("Notes", "Day", "Odds and ends"), wild.values, text, text, wild.asks, because=False)


def _decorate(text: str, rng: random.Random) -> tuple[str, str, bool]:
    """Returns the sentence as written, the sentence in full (with its subject), and whether it gives a reason."""
    because = False
    if text.endswith(".") and rng.random() < 0.34:
        because = rng.random() < 0.4 and "because" not in text
        tail = " because " + words.value("reason", rng) if because else words.value("tail", rng)
        text = _article(text[:-1] + tail + ".")
    because = because or " because " in text
    draw = rng.random()
    if draw < 0.24 and text.startswith(("I ", "The ", "My ", "We ")):
        opener = words.value("opener", rng)
        text = opener[:1].upper() + opener[1:] + (text if text.startswith("I ") else text[0].lower() + text[1:])
    elif draw < 0.3 and text.startswith("I ") and not text.startswith(("I a", "I w")):
        return text[2:3].upper() + text[3:], text, because
    if text.endswith(".") and rng.random() < 0.05:
        text = text[:-1] + "!"
    return text, text, because


@dataclass(frozen=True, slots=True)
class Entry:
    """One journal entry as the prompt shows it."""

    date: str
    title: str
    sentences: tuple[str, ...]
    text: str

    @property
    def heading(self) -> str:
        """The line the prompt shows: date, and title if there is one."""
        return f"{self.date} · {self.title}" if self.title else self.date


def draw_date(rng: random.Random) -> str:
    """Returns a date as YYYY-MM-DD."""
    return f"{rng.randint(2019, 2027)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def draw_entry(rng: random.Random, events: Iterable[Event], fillers: int, date: str) -> Entry:
    """Puts `events` and `fillers` sentences without facts into one entry, in random order."""
    listed = list(events)
    sentences = [event.text for event in listed]
    for _ in range(fillers):
        sentences.insert(rng.randint(0, len(sentences)), tidy(words.value("filler", rng)))
    if not listed:
        title = rng.choice(("", "Notes", "Evening"))
    else:
        title = rng.choice(
            (*rng.choice(listed).topics, rng.choice(listed).topics[0], words.made_up(rng).capitalize(), "")
        )
    joint = "\n" if rng.random() < 0.06 else " "
    text = joint.join(sentences)
    if rng.random() < 0.05:
        text = text[: -rng.randint(1, 12)].rstrip() + "…" if not listed or listed[-1].text != sentences[-1] else text
    return Entry(date, title, tuple(sentences), text)
