"""Examples from scenes: a question to one sentence of a diary, among entries that a search might bring with it."""

import random
import re
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from training import words
from training.answers import ABSENT, Example, cite, dated, said
from training.entries import Entry, World, draw_entry, draw_event
from training.questions import draw_dates, noise
from training.scenes import Line, Told, lower_words, scenes, tell
from training.stages import Stage

_STOP = frozenset(words.VALUES["stop_word"])
_POOL = 240
_LOOKED_AT = 40
_LABEL = 30
_SIGNS = ("!", "?", "🎉", "❤", "😂", "-", "*", "ha")
_JOINTS = ("; ", ", and ", " - ", ", but ", ": ", ", so ")
_SUMMARIES = words.VALUES["summary_question"]
_LATER = words.VALUES["later_question"]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of an entry that may stand beside the one that answers; `scene` is None for the grammar's."""

    scene: str | None
    title: str
    sentences: tuple[str, ...]
    stems: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question to line `at` of `lines`, and whether the answer gives the day of the entry."""

    question: str
    lines: tuple[Line, ...]
    at: int
    dated: bool = False


class Recall:
    """Draws examples; entries drawn before come back as distractors, often those that share the question's words.

    Args:
        rng: What decides everything.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._pool: deque[_Piece] = deque(maxlen=_POOL)
        self._counts: Counter[str] = Counter()
        for _ in range(_POOL // 2):
            told = self._told()
            self._remember(told.scene.key, told.title, [line.text for line in told.lines[:4]])

    def draw(self, stage: Stage) -> Example:
        """Returns one example of `stage`."""
        told = self._told()
        while not any(line.asks for line in told.lines):
            told = self._told()
        example = self._odd(told, stage) if self._rng.random() < stage.odd else self._plain(told, stage)
        self._remember(told.scene.key, told.title, [line.text for line in told.lines[:4]])
        return example

    def _told(self) -> Told:
        told = tell(self._rng.choice(scenes()), self._rng)
        if self._rng.random() < 0.12 and len(told.lines) > 1:
            return _joined(told, self._rng)
        return told

    def _remember(self, scene: str | None, title: str, sentences: Sequence[str]) -> None:
        if len(self._pool) == _POOL:
            self._counts.subtract(self._pool[0].stems)
        piece = _Piece(scene, title, tuple(sentences), _stems(" ".join((title, *sentences))))
        self._pool.append(piece)
        self._counts.update(piece.stems)

    # Questions

    def _plain(self, told: Told, stage: Stage) -> Example:
        rng = self._rng
        asked = _asked(_slice(told, rng.randint(*stage.events), rng), rng)
        if asked is None or rng.random() >= stage.absent:
            if asked and rng.random() < stage.runs:
                asked = _with_a_run(asked, rng)
            return self._present(told, asked, stage) if asked else self._plain(told, replace(stage, events=(9, 9)))
        draw = rng.random()
        if draw < 0.65 and told.absent:
            question = noise(rng.choice(told.absent), rng)
            return Example(question, self._entries(told, asked.lines, question, stage)[0], ABSENT)
        question, lines = noise(asked.question, rng), ()
        if draw < 0.85:
            lines = tuple(line for index, line in enumerate(asked.lines) if index != asked.at)
        if draw > 0.94:
            return Example(question, (), ABSENT)
        return Example(question, self._entries(told, lines, question, stage)[0], ABSENT)

    def _present(self, told: Told, asked: _Asked, stage: Stage, turns: tuple[tuple[str, str], ...] = ()) -> Example:
        entries, number = self._entries(told, asked.lines, asked.question, stage)
        source = asked.lines[asked.at].text
        answer = dated(source, entries[number - 1].date, number) if asked.dated else cite(source, number)
        return Example(noise(asked.question, self._rng), entries, answer, turns, source)

    def _odd(self, told: Told, stage: Stage) -> Example:
        kinds: tuple[tuple[float, Callable[[Told, Stage], Example | None]], ...] = (
            (0.25, self._summary),
            (0.45, self._following),
            (0.55, self._later),
            (0.72, self._by_title),
            (1.0, self._by_word),
        )
        draw = self._rng.random()
        kind = next(kind for bound, kind in kinds if draw < bound)
        return kind(told, stage) or self._plain(told, stage)

    def _summary(self, told: Told, stage: Stage) -> Example:
        entries, _ = self._entries(told, told.lines[: self._rng.randint(1, 3)], "", stage)
        named = [(entry.sentences[0], number) for number, entry in enumerate(entries, start=1)][:3]
        answer = " ".join(cite(sentence, number) for sentence, number in named)
        return Example(noise(self._rng.choice(_SUMMARIES), self._rng), entries, answer)

    def _following(self, told: Told, stage: Stage) -> Example | None:
        """A question that names a person of the turn before by a pronoun."""
        rng = self._rng
        lean = [(at, ask) for at, ask in told.leaning if at > 0 and told.lines[0].asks]
        if not lean:
            return None
        at, question = rng.choice(lean)
        before = told.lines[0]
        turn = (rng.choice(before.asks), said(before.text) if rng.random() < 0.85 else ABSENT)
        lines = told.lines[: max(at + 1, rng.randint(*stage.events))]
        return self._present(told, _Asked(question, lines, at), stage, (turn,))

    def _later(self, told: Told, stage: Stage) -> Example | None:
        """A question for the day of the answer before: "When was that?"."""
        rng = self._rng
        asked = _asked(_slice(told, rng.randint(*stage.events), rng), rng)
        if asked is None or asked.dated:
            return None
        turn = (asked.question, said(asked.lines[asked.at].text))
        return self._present(told, replace(asked, question=rng.choice(_LATER), dated=True), stage, (turn,))

    def _by_title(self, told: Told, stage: Stage) -> Example | None:
        if not told.title:
            return None
        question = self._rng.choice(words.VALUES["keyword_question"]).format(told.title.lower())
        lines = told.lines[: self._rng.randint(*stage.events)]
        return self._present(told, _Asked(question, lines, 0, question.startswith("When")), stage)

    def _by_word(self, told: Told, stage: Stage) -> Example | None:
        """A question by a word of one sentence only."""
        lines = _slice(told, self._rng.randint(*stage.events), self._rng)
        at = self._rng.randrange(len(lines))
        others = " ".join((told.title, *(line.text for index, line in enumerate(lines) if index != at))).lower()
        telling = [word for word in re.findall(r"[A-Za-z]{5,}", lines[at].text) if word.lower()[:5] not in others]
        if not telling:
            return None
        question = self._rng.choice(words.VALUES["keyword_question"]).format(self._rng.choice(telling))
        return self._present(told, _Asked(question, lines, at, question.startswith("When")), stage)

    # Entries

    def _entries(self, told: Told, lines: Sequence[Line], question: str, stage: Stage) -> tuple[tuple[Entry, ...], int]:
        """Returns entries, and the 1-based number of the one with `lines`; 0 if there are no lines."""
        rng = self._rng
        count = rng.randint(*stage.entries) - bool(lines)
        others = [self._twin(told, question, stage)] if lines and count and rng.random() < 0.06 else []
        asked = _stems(question)
        for _ in range(200):
            if len(others) >= count:
                break
            piece = self._beside(asked, stage) if rng.random() < 0.75 else self._grammar(stage)
            if piece and piece.scene != told.scene.key and piece not in others:
                others.append(piece)
        pieces: list[_Piece | None] = [piece for piece in others if piece]
        number = 0
        if lines:
            number = rng.randint(1, len(pieces) + 1)
            own = _Piece(told.scene.key, told.title, tuple(line.text for line in lines), frozenset())
            pieces.insert(number - 1, own)
        dates = draw_dates(rng, len(pieces))
        return tuple(self._entry(piece, date) for piece, date in zip(pieces, dates, strict=True) if piece), number

    def _entry(self, piece: _Piece, date: str) -> Entry:
        text = " ".join(piece.sentences)
        title = piece.title
        if not title and self._rng.random() < 0.6:
            kept = text[:_LABEL].rsplit(" ", 1)[0]
            title = f"{kept.rstrip(' ,;:')}…" if len(text) > _LABEL else text
        return Entry(date, title, piece.sentences, text)

    def _beside(self, asked: frozenset[str], stage: Stage) -> _Piece:
        """Returns an entry drawn before, cut to the stage's length; two in three times one close to the question."""
        rng = self._rng
        found = rng.choice(self._pool)
        if rng.random() < 0.66:
            some = rng.sample(self._pool, min(_LOOKED_AT, len(self._pool)))
            found = max(some, key=lambda piece: sum(1 / (1 + self._counts[stem]) for stem in asked & piece.stems))
        return replace(found, sentences=found.sentences[: rng.randint(*stage.events)])

    def _twin(self, told: Told, question: str, stage: Stage) -> _Piece | None:
        """Returns the same scene with other values, if the question holds for only one of the two."""
        other = tell(told.scene, self._rng)
        if any(question == ask for line in other.lines for ask in line.asks) or not _names(question):
            return None
        size = self._rng.randint(*stage.events)
        return _Piece("twin", other.title, tuple(line.text for line in other.lines[:size]), frozenset())

    def _grammar(self, stage: Stage) -> _Piece:
        world = World(self._rng, plain=self._rng.random() < stage.plain)
        events = [draw_event(world) for _ in range(self._rng.randint(*stage.events))]
        entry = draw_entry(self._rng, events, int(self._rng.random() < stage.fillers), "")
        return _Piece(None, entry.title, entry.sentences, frozenset())


def _asked(lines: tuple[Line, ...], rng: random.Random) -> _Asked | None:
    askable = [(at, ask) for at, line in enumerate(lines) for ask in line.asks]
    if not askable:
        return None
    at, question = rng.choice(askable)
    # "Where did I see the heron?" is also "When did I see the heron?": the entry's day answers it.
    if question.startswith(("Where did I ", "Where did we ")) and not question.endswith((" go?", "from?", "to?")):
        if rng.random() < 0.2:
            return _Asked("When" + question[5:], lines, at, dated=True)
    elif question.startswith(("Did I ", "Did we ")) and rng.random() < 0.3:
        return _Asked("When d" + question[1:], lines, at, dated=True)
    return _Asked(question, lines, at)


def _with_a_run(asked: _Asked, rng: random.Random) -> _Asked:
    """Returns the question with a sentence to answer it in which a word or a sign stands many times in a row."""
    line, count = asked.lines[asked.at], rng.randint(4, 60)
    words_of = line.text.split()
    if rng.random() < 0.3:
        text = f"{line.text.rstrip('.!?')} {rng.choice(_SIGNS) * count}"
    else:
        at = rng.randrange(len(words_of))
        word = rng.choice(("very", "so", "ha", "no", "again", "and on", words_of[at].strip(".,;:!?").lower() or "so"))
        text = " ".join((*words_of[:at], *[word] * count, *words_of[at:]))
    lines = (*asked.lines[: asked.at], replace(line, text=text), *asked.lines[asked.at + 1 :])
    return replace(asked, lines=lines)


def _slice(told: Told, size: int, rng: random.Random) -> tuple[Line, ...]:
    start = 0 if rng.random() < 0.6 else rng.randrange(max(1, len(told.lines) - size + 1))
    return told.lines[start : start + size]


def _joined(told: Told, rng: random.Random) -> Told:
    """Returns the scene with two neighboring sentences made one long one."""
    at = rng.randrange(len(told.lines) - 1)
    first, second = told.lines[at], told.lines[at + 1]
    begin = second.text
    if begin.split()[0].strip(",.:").lower() in lower_words():
        begin = begin[0].lower() + begin[1:]
    joined = Line(first.text.rstrip(".!?") + rng.choice(_JOINTS) + begin, (*first.asks, *second.asks))
    lines = (*told.lines[:at], joined, *told.lines[at + 2 :])
    leaning = tuple((index - (index > at), ask) for index, ask in told.leaning)
    return replace(told, lines=lines, leaning=leaning)


def _names(question: str) -> bool:
    return bool(re.search(r"(?<!^)\b[A-Z][a-z]", question) or re.search(r"\d", question))


def _stems(text: str) -> frozenset[str]:
    return frozenset(word[:5] for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in _STOP)
