"""Bytes from strangers, by hypothesis and the same every time; `benchmarks/fuzz.py` goes on as long as one likes."""

from __future__ import annotations

import json
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lyra_emergence.checkpoint.json_files import parse_object
from lyra_emergence.checkpoint.safetensors_header import parse_header
from lyra_emergence.errors import LyraError

from .fuzz_targets import SEEDS, TARGETS, WORDS

if TYPE_CHECKING:
    from collections.abc import Callable

STEADY = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, 2**64, 10**40, -(2**63), 1e308, 0.5, float("inf"), float("nan")]),
    st.sampled_from([*WORDS, "", "\0", "../x", "C:x", "/x", "9" * 5000, "\ud800", "a.b.c"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=6,
)


def leaves(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places in a JSON value that hold something, containers included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in inner for place in leaves(item, (*at, key)))]


def replaced(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    copy = value.copy()
    copy[at[0]] = replaced(value[at[0]], at[1:], new)
    return copy


@st.composite
def changed_values(draw: Any, seed: bytes) -> bytes:
    """A seed with one to three of its values replaced."""
    prefix, text = (seed[:1], seed[1:]) if seed[:1] in (b"\0", b"\2") else (b"", seed)
    value = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        value = replaced(value, draw(st.sampled_from(leaves(value))), draw(VALUES))
    return prefix + json.dumps(value).encode()


@st.composite
def changed_bytes(draw: Any, seed: bytes) -> bytes:
    """A seed with bytes changed, cut out, or put in."""
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        data[start : start + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(data)


def is_json(seed: bytes) -> bool:
    try:
        json.loads(seed[1:] if seed[:1] in (b"\0", b"\2") else seed)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", TARGETS)
def test_bytes_of_strangers_end_in_an_error_of_ours(name: str) -> None:
    strategies = [st.binary(max_size=64)]
    for seed in SEEDS[name]:
        TARGETS[name](seed)
        strategies.append(changed_bytes(seed))
        strategies += [changed_values(seed)] * 3 if is_json(seed) else []

    @STEADY
    @given(data=st.one_of(*strategies))
    def check(data: bytes) -> None:
        TARGETS[name](data)

    check()


# --- Memory ----------------------------------------------------------------------------------------

MOST_BYTES_FOR_ONE = 32
"""Memory that parsing may take for each byte of a file: Python's smallest objects are large beside their text."""
KB = 1024
GREEDY = {
    "empty objects": b'{"a":[' + b"{}," * (64 * KB) + b"{}]}",
    "empty lists": b'{"a":[' + b"[]," * (64 * KB) + b"[]]}",
    "short keys": b"{" + b",".join(b'"%x":1' % number for number in range(30 * KB)) + b"}",
    "numbers": b'{"a":[' + b"9999," * (40 * KB) + b"1]}",
    "fractions": b'{"a":[' + b".5,".join([b"1"] * (64 * KB)) + b"]}",
    "short texts": b'{"a":[' + b",".join(b'"%x"' % number for number in range(30 * KB)) + b"]}",
    "wide letters": b'{"a":"' + b"a" * (200 * KB) + "\U0001f600".encode() + b'"}',
    "nested": b'{"a":' * 900 + b"1" + b"}" * 900,
    "escapes": b'{"a":"' + b"\\u0041" * (40 * KB) + b'"}',
}


def peak(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
    except LyraError:
        pass
    finally:
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return taken


@pytest.mark.parametrize("text", GREEDY.values(), ids=GREEDY)
def test_parsing_takes_memory_in_proportion_to_the_file(text: bytes) -> None:
    for strict in (False, True):
        assert (
            peak(lambda strict=strict: parse_object(text, "w", strict=strict))
            < MOST_BYTES_FOR_ONE * len(text) + 64 * KB
        )
    assert (
        peak(lambda: parse_header(text, len(text), len(text) + 8, "w", "w")) < MOST_BYTES_FOR_ONE * len(text) + 64 * KB
    )
