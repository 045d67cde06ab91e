"""Training examples: entries with distractors, a question, and the answer that the model should give."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from training import words
from training.entries import Entry, Event, World, draw_date, draw_entry, draw_event, frames, tidy

ABSENT = "The journal entries I was given do not say."
GREETING = "Hello! Ask me something about your journal, and I will look it up in your entries."
HELP = "I answer questions from the journal entries I am given and cite them. Ask me who, what, where or when."
ABOUT = (
    "I am the small model that ships with Lyra. I can look things up in your journal entries, and I know nothing else."
)
THANKS = "You are welcome."
GOODBYE = "Goodbye."
_SMALL_TALK = {
    GREETING: "talk_greeting",
    HELP: "talk_help",
    ABOUT: "talk_about",
    THANKS: "talk_thanks",
    GOODBYE: "talk_goodbye",
}
_MONTHS = words.VALUES["month"]
_PRONOUNS = dict(pair.split(":") for pair in words.VALUES["second_person"])
_WORD = re.compile(r"[A-Za-z]+(?:['\u2019][a-z]+)?")
_KEY_KINDS = (
    "subject",
    "object",
    "bare",
    "person",
    "thing",
    "place",
    "made",
    "plant",
    "city",
    "event",
    "project",
    "title",
    "company",
    "Name",
    "name",
    "pet",
    "worktask",
    "dish",
)


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


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the curriculum: entries, events per entry, filler sentences, and the share of odd cases."""

    entries: tuple[int, int]
    events: tuple[int, int]
    fillers: float
    absent: float
    talk: float
    plain: float = 0.0


# From copying to choosing, the weak half: in the stages of short sentences, choosing is most of the loss.
STAGES = (
    Stage((1, 1), (1, 1), 0.0, 0.0, 0.0),
    Stage((1, 1), (2, 2), 0.0, 0.0, 0.0, plain=1.0),
    Stage((1, 2), (1, 3), 0.0, 0.05, 0.02, plain=1.0),
    Stage((1, 3), (1, 3), 0.0, 0.15, 0.02, plain=0.8),
    Stage((1, 3), (1, 3), 0.2, 0.2, 0.05, plain=0.4),
    Stage((1, 4), (1, 4), 0.4, 0.25, 0.08, plain=0.3),
)


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


def cite(sentence: str, number: int) -> str:
    """Returns the sentence in the second person with its citation before a full stop."""
    return f"{second_person(sentence).rstrip().rstrip('.!?…')} [{number}]."


def _dated(sentence: str, date: str, number: int) -> str:
    text = cite(sentence, number)
    lowered = (
        text[0].lower() + text[1:]
        if text.split()[0] in {"You", "Your", "The", "A", "An", "In", "At", "On", "It"}
        else text
    )
    return (
        f"On {date} {lowered}" if lowered.startswith(("you ", "your ", "the ", "a ", "an ")) else f"On {date}: {text}"
    )


def _short(value: str, rng: random.Random) -> str:
    """Returns a value as a question may put it: a person by the bare name, a thing without its adjective."""
    parts = value.split()
    if parts[0] in {"my", "our"} and len(parts) == 3 and rng.random() < 0.4:
        return parts[2]
    if parts[0] == "the" and rng.random() < 0.15:
        return " ".join(parts[1:])
    if parts[0] in words.VALUES["adj"] and len(parts) == 2 and rng.random() < 0.25:
        return parts[1]
    return value


def _ask(event: Event, rng: random.Random) -> tuple[str, frozenset[str], str]:
    """Returns a question the event answers, the slot keys it names, and its kind ("plain", "when", "why")."""
    template = words.choose(rng.choice(event.asks), rng)
    kind, draw = "plain", rng.random()
    if template.startswith("Where did ") and not template.endswith((" go?", "from?")):
        if draw < 0.15:
            template, kind = "When" + template[5:], "when"
        elif draw < 0.25:
            template = "D" + template[7:]
        elif draw < 0.45 and event.because:
            template, kind = "Why" + template[5:], "why"
    named = frozenset(key for key, _ in words.slots(template))
    text = words.fill(template, {key: _short(event.values[key], rng) for key in named})
    return tidy(text), named, kind


def _noise(question: str, rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.08:
        start = words.value("preface", rng)
        return start + question[0].lower() + question[1:]
    if draw < 0.18:
        question = question.lower()
    elif draw < 0.22:
        question = question[0].lower() + question[1:]
    return question.rstrip("?") if rng.random() < 0.1 else question


def _clashes(event: Event, target: Event, named: frozenset[str], question: str) -> bool:
    """Whether `event` too could answer a question put to `target`."""
    kin = event.frame.split(":")[:2] == target.frame.split(":")[:2]
    if kin and all(_alike(event.values.get(key, target.values[key]), target.values[key]) for key in named):
        return True
    if target.frame.startswith("wild:") and all(_alike_in(target.values[key], event.text) for key in named):
        return True
    asked = question.lower()
    for ask in event.asks:
        if "(" not in ask and words.fill(ask, event.values).lower() == asked:
            return True
    return event.text == target.text


def _alike_in(value: str, text: str) -> bool:
    return value.rsplit(maxsplit=1)[-1].lower() in text.lower()


def _alike(left: str, right: str) -> bool:
    return left == right or left.rsplit(maxsplit=1)[-1] == right.rsplit(maxsplit=1)[-1]


def _distractors(world: World, target: Event, named: frozenset[str], question: str, count: int) -> list[Event]:
    rng = world.rng
    found: list[Event] = []
    by_key = {frame.key: frame for frame in frames()}
    for _ in range(count * 4):
        if len(found) == count:
            break
        draw, given, frame = rng.random(), {}, None
        if draw < 0.25 and target.frame in by_key:
            frame = by_key[target.frame]
        elif draw < 0.6 and named:
            key = rng.choice(sorted(named))
            given = {key.rstrip("0123456789"): target.values[key]}
        event = draw_event(world, given, frame)
        if not _clashes(event, target, named, question):
            found.append(event)
    return found


def _spread(rng: random.Random, stage: Stage, count: int) -> list[int]:
    return [rng.randint(*stage.events) for _ in range(count)]


def _dates(rng: random.Random, count: int) -> list[str]:
    dates: list[str] = []
    while len(dates) < count:
        if (date := draw_date(rng)) not in dates:
            dates.append(date)
    return dates


def _arrange(
    world: World, stage: Stage, target: Event | None, others: Sequence[Event], sizes: Sequence[int]
) -> tuple[tuple[Entry, ...], int]:
    """Returns the entries and the 1-based number of the one that holds `target` (0 without one)."""
    rng = world.rng
    groups: list[list[Event]] = [[] for _ in sizes]
    home = rng.randrange(len(sizes)) if target else -1
    if target:
        groups[home].append(target)
    rest = list(others)
    rng.shuffle(rest)
    for group, size in zip(groups, sizes, strict=True):
        while rest and len(group) < size:
            group.append(rest.pop())
    dates = _dates(rng, len(sizes))
    entries = []
    for group, date in zip(groups, dates, strict=True):
        rng.shuffle(group)
        entries.append(draw_entry(rng, group, sum(rng.random() < stage.fillers for _ in range(2)), date))
    return tuple(entries), home + 1


def _lookup(world: World, stage: Stage) -> Example:
    rng = world.rng
    target = draw_event(world)
    question, named, kind = _ask(target, rng)
    sizes = _spread(rng, stage, rng.randint(*stage.entries))
    others = _distractors(world, target, named, question, sum(sizes) - 1)
    absent = rng.random() < stage.absent
    if absent and kind == "plain" and rng.random() < 0.12 and question.startswith("Where did ") and not target.because:
        return Example(_noise("Why" + question[5:], rng), _arrange(world, stage, target, others, sizes)[0], ABSENT)
    if absent and rng.random() < 0.15:
        return Example(_noise(question, rng), (), ABSENT)
    if absent:
        extra = _distractors(world, target, named, question, 1) if rng.random() < 0.7 else []
        return Example(_noise(question, rng), _arrange(world, stage, None, others + extra, sizes)[0], ABSENT)
    entries, number = _arrange(world, stage, target, others, sizes)
    draw = rng.random()
    keyword = _keyword(target, entries, rng) if draw < (0.3 if world.plain else 0.12) else None
    if keyword:
        question = keyword
        kind = "when" if question.startswith("When") else "plain"
    date = entries[number - 1].date
    if draw > 0.97 and len(entries[number - 1].sentences) == 1:
        question, kind = _date_question(date, rng), "plain"
    answer = _dated(target.full, date, number) if kind == "when" else cite(target.full, number)
    return Example(_noise(question, rng), entries, answer, source=target.text)


def _keyword(target: Event, entries: Sequence[Entry], rng: random.Random) -> str | None:
    """Returns a question by one name of the sentence that no other sentence mentions."""
    sentences = [sentence.lower() for entry in entries for sentence in entry.sentences]
    for key, value in rng.sample(sorted(target.values.items()), len(target.values)):
        short = value.split()[-1].strip('"').lower()
        if key.rstrip("0123456789") in _KEY_KINDS and sum(short in sentence for sentence in sentences) == 1:
            return tidy(rng.choice(words.VALUES["keyword_question"]).format(_short(value, rng)))
    return None


def _date_question(date: str, rng: random.Random) -> str:
    year, month, day = date.split("-")
    name = _MONTHS[int(month) - 1]
    shown = rng.choice((date, f"{name} {int(day)}", f"{int(day)} {name}", f"{name} {int(day)}, {year}"))
    return rng.choice((f"What did I do on {shown}?", f"What happened on {shown}?", f"What did I write on {shown}?"))


def _talk(world: World, stage: Stage) -> Example:
    rng = world.rng
    entries: tuple[Entry, ...] = ()
    if rng.random() < 0.5:
        events = [draw_event(world) for _ in range(rng.randint(1, 3))]
        entries = _arrange(world, stage, None, events, _spread(rng, stage, rng.randint(*stage.entries)))[0]
    if rng.random() < 0.35:
        question, answer = words.expand(rng.choice(words.VALUES["off_topic"]), rng), ABSENT
        if any(word in entry.text for word in question.split() for entry in entries if len(word) > 4):
            entries = ()
        return Example(question, entries, answer)
    answer = rng.choice((GREETING, HELP, HELP, ABOUT, THANKS, GOODBYE))
    question = rng.choice(words.VALUES[_SMALL_TALK[answer]])
    return Example(tidy(question) if rng.random() < 0.6 else question, entries, answer)


def _history(world: World) -> tuple[tuple[str, str], ...]:
    if world.rng.random() < 0.3:
        talk = _talk(world, STAGES[0])
        return ((talk.question, talk.answer),)
    event = draw_event(world)
    question, _, _ = _ask(event, world.rng)
    return ((question, cite(event.full, world.rng.randint(1, 4)) if world.rng.random() < 0.8 else ABSENT),)


def draw_example(rng: random.Random, stage: int) -> Example:
    """Draws one example of the given stage; the later ones mix in one in eight of an earlier one."""
    if stage and rng.random() < 0.12:
        stage = rng.randrange(stage)
    setting = STAGES[stage]
    world = World(rng, plain=rng.random() < setting.plain)
    example = _talk(world, setting) if rng.random() < setting.talk else _lookup(world, setting)
    if stage >= 3 and rng.random() < 0.08:
        return replace(example, turns=_history(World(rng)))
    return example
