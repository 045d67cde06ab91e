"""Text as it comes: equal to the whole, however it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyra_emergence.text_stream import LoopDetector, StopScanner, TextDecoder

from .families import make_tokenizer

WORDS = st.text(alphabet="ab\n", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3).map(tuple)


@given(text=WORDS, stops=STOPS, cuts=st.lists(st.integers(1, 5), max_size=30))
def test_stop_texts_are_found_however_the_text_is_cut(text: str, stops: tuple[str, ...], cuts: list[int]) -> None:
    scanner = StopScanner(stops)
    passed, rest = "", text
    for cut in [*cuts, len(text)]:
        passed += scanner.push(rest[:cut])
        rest = rest[cut:]
        if scanner.found:
            break
    if not scanner.found:
        passed += scanner.finish(rest)
    # The first stop text to be complete ends the answer; the earliest of those complete at that point counts.
    ends = [text.find(stop) for stop in stops if stop in text]
    if not ends:
        assert passed == text
        assert not scanner.found
        return
    assert scanner.found
    assert text.startswith(passed)
    assert not any(stop in passed for stop in stops)
    assert any(text[len(passed) :].startswith(stop) for stop in stops)


def test_nothing_is_held_back_without_need() -> None:
    scanner = StopScanner(("\nUser:",))
    assert scanner.push("Hello") == "Hello"
    assert scanner.push(" there\nUs") == " there"
    assert scanner.push("e it") == "\nUse it"


@given(text=st.text(max_size=60))
def test_streamed_text_is_the_decoded_text(text: str) -> None:
    tokenizer = make_tokenizer()
    prompt = tokenizer("The river was high", add_special_tokens=False)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoder = TextDecoder(tokenizer, prompt)
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) + decoder.finish() == text


@pytest.mark.parametrize("text", ["naïve café", "日本語", "👩‍👩‍👧‍👦 family", "a\u0301"])
def test_no_piece_ends_in_half_a_character(text: str) -> None:
    tokenizer = make_tokenizer()
    decoder = TextDecoder(tokenizer, [])
    pieces = [decoder.push(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text


def loops_at(tokens: list[int], repeats: int) -> int | None:
    detector = LoopDetector(repeats)
    return next((at for at, token in enumerate(tokens, start=1) if detector.push(token)), None)


@given(
    start=st.lists(st.integers(0, 3), max_size=40),
    cycle=st.lists(st.integers(0, 3), min_size=1, max_size=20),
    repeats=st.integers(1, 4),
)
def test_a_loop_is_told_when_it_stands_once_more_than_it_may(start: list[int], cycle: list[int], repeats: int) -> None:
    found = loops_at([*start, *(cycle * 40)], repeats)
    assert found is not None
    assert found <= len(start) + max(len(cycle) * (repeats + 1), 12)
    # What it found: some sequence stands more than `repeats` times at the end of the tokens so far.
    seen = [*start, *(cycle * 40)][:found]
    periods = [p for p in range(1, 65) if len(seen) >= p * (repeats + 1) and _repeats(seen, p) > repeats]
    assert periods


def _repeats(tokens: list[int], period: int) -> int:
    times = 1
    while tokens[-period * (times + 1) : -period * times] == tokens[-period:]:
        times += 1
    return times


def test_what_repeats_too_little_is_no_loop() -> None:
    assert loops_at([7] * 11, 3) is None  # "00000000000"
    assert loops_at(list(range(20)) * 3, 3) is None
    assert loops_at([1, 2] * 500, 0) is None


def test_a_cycle_longer_than_what_is_looked_for_is_no_loop() -> None:
    assert loops_at(list(range(65)) * 5, 3) is None
    assert loops_at(list(range(64)) * 5, 3) == 256
