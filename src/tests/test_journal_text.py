"""Text made safe for a terminal, split into passages and words."""

from __future__ import annotations

import pytest

from lyra_emergence.journal.text import flowing, one_line, passages, plain, shorten, without_runs, words


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;owned\x07title", "title"),
        ("\x1b]8;;http://example.test\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b2Jcleared", "cleared"),
        ("\x1bPpayload\x1b\\after", "after"),
        ("\x1bcreset", "reset"),
        ("lone \x1b", "lone "),
        ("bell\x07 back\x08 nul\x00 del\x7f", "bell back nul del"),
        ("a\u202egnp.exe\u2066b", "agnp.exeb"),
        ("over\rwritten\r\nnext\u2028last", "over\nwritten\nnext\nlast"),
        ("tab\tand\nline stay: Grüße 🌱 日本", "tab\tand\nline stay: Grüße 🌱 日本"),
    ],
)
def test_plain(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_an_escape_cannot_be_assembled_from_what_is_left() -> None:
    assert "\x1b" not in plain("\x1b\x1b[[31m")
    assert "\x1b" not in plain("\x1b\x00[31m")


def test_one_line_and_shorten() -> None:
    assert one_line(" a\n\n[2] b\t\x1b[1mc ") == "a [2] b c"
    assert shorten("short", 5) == "short"
    assert shorten("the quick brown fox", 12) == "the quick…"
    assert shorten("abcdefghij", 5) == "abcd…"


def test_a_list_flows_as_sentences() -> None:
    assert flowing("- milk\n- call Dana!\n  \u2022 [2] rent") == "milk. call Dana! [2] rent."
    assert flowing("Today:\n1. swim\n2) sleep") == "Today: swim. sleep."
    assert flowing("a line\nthat goes on - as text does") == "a line that goes on - as text does"
    assert flowing("") == flowing("\n") == ""


def test_passages_keep_sentences_whole() -> None:
    text = "One is here. Two is here! Three is here?"
    assert passages(text, 40) == (text,)
    assert passages(text, 26) == ("One is here. Two is here!", "Three is here?")
    assert passages(text, 25) == ("One is here. Two is here!", "Three is here?")
    assert passages(text, 24) == ("One is here.", "Two is here!", "Three is here?")


def test_passages_do_not_end_at_an_abbreviation() -> None:
    assert passages("We saw Dr. Okafor at 9 a.m. sharp. Then home.", 36) == (
        "We saw Dr. Okafor at 9 a.m. sharp.",
        "Then home.",
    )


def test_passages_of_text_without_sentences() -> None:
    assert passages("", 10) == ()
    assert passages("x" * 25, 10) == ("x" * 10, "x" * 10, "x" * 5)
    assert passages("aaaa bbbb cccc dddd", 10) == ("aaaa bbbb", "cccc dddd")


def test_no_passage_is_longer_than_asked_and_nothing_is_lost() -> None:
    text = "Word after word, and then some. " * 700
    split = passages(text, 600)
    assert max(map(len, split)) <= 600
    assert " ".join(split) == text.strip()


def test_words() -> None:
    assert words("Biscuit's café, DON'T stop: 2025-03") == ["biscuit", "café", "don", "t", "stop", "2025", "03"]
    assert words("e\u0301te\u0301") == ["été"]
    assert words("हिन्दी में") == ["हिन्दी", "में"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("x" * 50_000, "xxx"),
        ("It rang and rang and rang and rang and rang and rang.", "It rang and rang and rang and rang."),
        ("No, no, no, NO, no! I said.", "No, no, no! I said."),
        ("🎂🎂🎂🎂🎂 for Dana", "🎂🎂🎂 for Dana"),
        ("-------- hahahahahaha ...... !!!!!!", "--- hahaha ... !!!"),
        ("so so so it goes so so so", "so so so it goes so so so"),
        # Numbers mean what they say.
        ("I owe 10000000 and 0000 0000 0000 0000 0000.", "I owe 10000000 and 0000 0000 0000 0000 0000."),
        ("7 7 7 7 7 7", "7 7 7 7 7 7"),
        ("- - - - - -", "- - -"),
        ("", ""),
    ],
)
def test_runs_are_cut_to_three(text: str, shown: str) -> None:
    assert without_runs(text) == shown
