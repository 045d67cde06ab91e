"""Sentences in other scripts, with accents and emoji: random letters, so that any text is copied and ends."""

import random

from training.answers import ABSENT, Example, cite
from training.entries import Entry, draw_date

_ALPHABETS = (
    "あいうえおかきくけこさしすせそたちつてとなにのはひふへほまみむめもやゆよらりるれわをん",
    "日月火水木金土山川田人口目手足花雨雪海空猫犬鍵机車町家道本友",
    "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "абвгдежзийклмнопрстуфхцчшщыэюя",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "אבגדהוזחטיכלמנסעפצקרשת",
    "अआइईउऊकखगघचजटडतदनपबमयरलवसह",
    "aàâçéèêëîïôùûüñöäßøåæłżśćń",
    "🎂🎉🐱🚲☕🌧❄🔑📚🎵",
)
_ENDS = (".", ".", "!", "。", "")


def _word(rng: random.Random, letters: str) -> str:
    return "".join(rng.choice(letters) for _ in range(rng.randint(1, 5)))


def _sentence(rng: random.Random, letters: str) -> list[str]:
    return [_word(rng, letters) for _ in range(rng.randint(1, 5))]


def _entry(rng: random.Random, sentence: str) -> Entry:
    title = "" if rng.random() < 0.5 else sentence[:12].strip()
    return Entry(draw_date(rng), title, (sentence,), sentence)


def draw_foreign(rng: random.Random) -> Example:
    """Returns a question in some script that repeats words of one entry, or of none."""
    letters = rng.choice(_ALPHABETS)
    told = [_sentence(rng, letters) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.25:
        told[0] = [told[0][0]] * rng.randint(2, 5)
    shown = [(" " if rng.random() < 0.7 else "").join(words) + rng.choice(_ENDS) for words in told]
    entries = tuple(_entry(rng, sentence) for sentence in shown)
    if rng.random() < 0.4:
        return Example(" ".join(_sentence(rng, letters)) + rng.choice(("?", "")), entries, ABSENT)
    at = rng.randrange(len(told))
    asked = rng.sample(told[at], min(len(told[at]), rng.randint(1, 3)))
    question = " ".join(asked) if rng.random() < 0.7 else f"Where is {asked[0]}"
    return Example(question + rng.choice(("?", "", "?")), entries, cite(shown[at], at + 1), source=shown[at])
