"""Examples from the grammar: a question to one of its events among others, small talk, and what came before."""

import random
from collections.abc import Sequence

from training import words
from training.answers import ABOUT, ABSENT, GOODBYE, GREETING, HELP, THANKS, Example, cite, dated, said
from training.entries import Entry, Event, World, draw_date, draw_entry, draw_event, frames, tidy
from training.stages import Stage

_SMALL_TALK = {
    GREETING: "talk_greeting",
    HELP: "talk_help",
    ABOUT: "talk_about",
    THANKS: "talk_thanks",
    GOODBYE: "talk_goodbye",
}
_MONTHS = words.VALUES["month"]
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


def noise(question: str, rng: random.Random) -> str:
    """Returns the question as people type: with a preface, in lower case, without its mark."""
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


def draw_dates(rng: random.Random, count: int) -> list[str]:
    """Returns `count` different dates as YYYY-MM-DD."""
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
    dates = draw_dates(rng, len(sizes))
    entries = []
    for group, date in zip(groups, dates, strict=True):
        rng.shuffle(group)
        entries.append(draw_entry(rng, group, sum(rng.random() < stage.fillers for _ in range(2)), date))
    return tuple(entries), home + 1


def lookup(world: World, stage: Stage) -> Example:
    """Returns a question to one event of the grammar, with its answer or, if it was left out, without."""
    rng = world.rng
    target = draw_event(world)
    question, named, kind = _ask(target, rng)
    sizes = _spread(rng, stage, rng.randint(*stage.entries))
    others = _distractors(world, target, named, question, sum(sizes) - 1)
    absent = rng.random() < stage.absent
    if absent and kind == "plain" and rng.random() < 0.12 and question.startswith("Where did ") and not target.because:
        return Example(noise("Why" + question[5:], rng), _arrange(world, stage, target, others, sizes)[0], ABSENT)
    if absent and rng.random() < 0.15:
        return Example(noise(question, rng), (), ABSENT)
    if absent:
        extra = _distractors(world, target, named, question, 1) if rng.random() < 0.7 else []
        return Example(noise(question, rng), _arrange(world, stage, None, others + extra, sizes)[0], ABSENT)
    entries, number = _arrange(world, stage, target, others, sizes)
    draw = rng.random()
    keyword = _keyword(target, entries, rng) if draw < (0.3 if world.plain else 0.12) else None
    if keyword:
        question = keyword
        kind = "when" if question.startswith("When") else "plain"
    date = entries[number - 1].date
    if draw > 0.97 and len(entries[number - 1].sentences) == 1:
        question, kind = _date_question(date, rng), "plain"
    answer = dated(target.full, date, number) if kind == "when" else cite(target.full, number)
    return Example(noise(question, rng), entries, answer, source=target.text)


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


def talk(world: World, stage: Stage) -> Example:
    """Returns a greeting, thanks, a question about the model, or one that no journal answers."""
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


def history(world: World, stage: Stage) -> tuple[tuple[str, str], ...]:
    """Returns a turn that has nothing to do with the one that follows."""
    if world.rng.random() < 0.3:
        before = talk(world, stage)
        return ((before.question, before.answer),)
    event = draw_event(world)
    question, _, _ = _ask(event, world.rng)
    return ((question, said(event.full) if world.rng.random() < 0.8 else ABSENT),)
