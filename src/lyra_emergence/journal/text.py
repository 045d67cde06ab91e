"""Text of a journal as it is shown, split and searched: plain for a terminal, passages, the words of a question."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["flowing", "one_line", "passages", "plain", "shorten", "without_runs", "words"]

PASSAGE_LENGTH = 600
"""Characters of a passage at most: about 150 tokens, so that four of them fit a small model's context."""

# Escape sequences go whole, so that "\x1b[31mred" leaves "red" and not "[31mred": string commands (OSC, DCS, SOS,
# PM, APC) with their payload up to BEL or ST, then CSI, then two-character escapes.
_ESCAPES = re.compile(
    r"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|\x1b[ -/]*[0-~]?"
)
# C0 but tab and newline, DEL, C1, and the bidirectional overrides and isolates that reorder what a reader sees.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_LINE_ENDS = re.compile(r"\r\n?|[\x85\u2028\u2029]")

_BULLET = re.compile(r"\s*(?:[-*\u2022\u2013\u2014+]|\d{1,2}[.)])\s+")
_AROUND = ".,;:!?\u2026-\u2013\u2014'\"()"
_ENDS = ".!?\u2026:;,\u3002"

_RUN_KEPT = 3
"""How often in a row a word or sign is left standing by `without_runs`."""
_RUN_PERIOD = 6
"""Words of what is looked for as a run, at most."""
_RUN_OF_SIGNS = re.compile(rf"([^\s\d]{{1,8}}?)\1{{{_RUN_KEPT},}}")

_SENTENCE_END = re.compile(r"[.!?…]['\")\]’”]*\s+|[。！？]['\")\]’”」』]*\s*|\n\s*\n\s*")  # noqa: RUF001
_ABBREVIATION = re.compile(
    r"(?:\b(?:Dr|Mr|Mrs|Ms|St|Prof|Sr|Jr|No|vs|etc|approx|e\.g|i\.e)|\b[A-Za-z](?:\.[A-Za-z])*)\.\s+\Z"
)


def plain(text: str) -> str:
    r"""Return `text` without anything that a terminal would obey: escape sequences, controls, direction overrides.

    Tabs and line breaks stay, and every kind of line break becomes "\n".
    """
    return _CONTROLS.sub("", _ESCAPES.sub("", _LINE_ENDS.sub("\n", text)))


def one_line(text: str) -> str:
    """Return `text` plain and on one line, runs of white space being one space."""
    return " ".join(plain(text).split())


def flowing(text: str) -> str:
    r"""Return `text` on one line as sentences: a list's marks go, and its items end with a full stop.

    "- milk\n- call Dana" is "milk. call Dana."; text without such marks stays as `one_line` has it.
    """
    lines = plain(text).split("\n")
    if not any(_BULLET.match(line) for line in lines):
        return one_line(text)
    items = [one_line(_BULLET.sub("", line)) for line in lines]
    return " ".join(item if item[-1] in _ENDS else f"{item}." for item in items if item)


def without_runs(text: str) -> str:
    """Return a line of text in which nothing stands more than three times in a row, but for numbers.

    "no, no, no, no, no!" is "no, no, no!" and "🎂🎂🎂🎂🎂" is "🎂🎂🎂": a model that copies does not count, and
    would go on for ever. Up to six words are looked for as one.
    """
    line = _RUN_OF_SIGNS.sub(lambda match: match[1] * _RUN_KEPT, text).split(" ")
    keys = [word.strip(_AROUND).casefold() or word for word in line]
    kept: list[str] = []
    at = 0
    while at < len(line):
        period, times = _run_at(keys, at)
        end = at + period * times
        # The last one stays, for what stands behind it: "no, no, no!"
        kept += [*line[at : at + period * (_RUN_KEPT - 1)], *line[end - period : end]] if times > 1 else line[at:end]
        at = end
    return " ".join(kept)


def _run_at(keys: list[str], at: int) -> tuple[int, int]:
    """Return of how many words a run that begins at `at` is made, and how often they stand there; (1, 1) for none."""
    for period in range(1, _RUN_PERIOD + 1):
        unit = keys[at : at + period]
        if any(character.isdigit() for character in "".join(unit)):
            break
        times = 1
        while keys[at + times * period : at + (times + 1) * period] == unit:
            times += 1
        if times > _RUN_KEPT:
            return period, times
    return 1, 1


def shorten(text: str, limit: int) -> str:
    """Return `text` cut to at most `limit` characters, at a word where there is one, with "…" at the cut."""
    if len(text) <= limit:
        return text
    kept = text[: max(limit - 1, 0)]
    word_end = kept.rfind(" ")
    return (kept[:word_end] if word_end > limit // 2 else kept).rstrip(" ,;:") + "…"


def passages(text: str, limit: int = PASSAGE_LENGTH) -> tuple[str, ...]:
    """Split `text` at its sentences into passages of at most `limit` characters.

    Whole sentences are packed together. A sentence longer than `limit` is cut at a space, or anywhere if it has none.
    """
    text = text.strip()
    if len(text) <= limit:
        return (text,) if text else ()
    packed: list[str] = []
    current = ""
    for sentence in _sentences(text):
        for piece in _cut(sentence, limit):
            if current and len(current) + len(piece.rstrip()) > limit:
                packed.append(current.strip())
                current = ""
            current += piece
    packed.append(current.strip())
    return tuple(passage for passage in packed if passage)


def _sentences(text: str) -> list[str]:
    """Return the sentences of `text` with the white space that follows each; joined they are `text`."""
    found: list[str] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        if _ABBREVIATION.search(text, max(start, match.end() - 16), match.end()):
            continue
        found.append(text[start : match.end()])
        start = match.end()
    return [*found, text[start:]]


def _cut(sentence: str, limit: int) -> list[str]:
    pieces: list[str] = []
    while len(sentence.rstrip()) > limit:
        space = sentence.rfind(" ", limit // 2, limit)
        end = space + 1 if space > 0 else limit
        pieces.append(sentence[:end])
        sentence = sentence[end:]
    return [*pieces, sentence]


def words(text: str) -> list[str]:
    """Return the words of `text`, lower case: runs of letters, digits and marks, without a possessive "'s".

    FTS5's unicode61 separates at the same characters, so a word here is a token there or a run of tokens.
    """
    text = re.sub(r"['’]s\b", " ", unicodedata.normalize("NFC", text))  # noqa: RUF001
    return "".join(character if _in_word(character) else " " for character in text).lower().split()


def _in_word(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "LNM" or category == "Co"
