from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyra_emergence.units import format_bytes, parse_bytes, parse_fraction, parse_rate


@pytest.mark.parametrize(
    ("written", "count"),
    [
        (0, 0),
        (6_000_000_000, 6_000_000_000),
        ("0", 0),
        ("17", 17),
        ("17B", 17),
        ("6GB", 6 * 10**9),
        ("6 GB", 6 * 10**9),
        (" 6GB\n", 6 * 10**9),
        ("6gB", 6 * 10**9),
        ("6GiB", 6 * 2**30),
        ("6giB", 6 * 2**30),
        ("1.5KB", 1500),
        ("1.5KiB", 1536),
        ("500 MB", 500 * 10**6),
        ("512MiB", 512 * 2**20),
        ("2TB", 2 * 10**12),
        ("2TiB", 2 * 2**40),
        ("0.1GB", 10**8),
    ],
)
def test_amounts(written: str | int, count: int) -> None:
    assert parse_bytes(written) == count


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("6Gb", "'6Gb' is bits; write '6GB'"),
        ("6gb", "'6gb' is bits; write '6GB'"),
        ("6Gib", "'6Gib' is bits; write '6GiB'"),
        ("6gIb", "'6gIb' is bits; write '6GiB'"),
        ("6b", "'6b' is bits; write '6B'"),
        ("6G", "'6G' has no unit; write '6GB' or '6GiB'"),
        ("1.5mi", "'1.5mi' has no unit; write '1.5MB' or '1.5MiB'"),
        ("6XB", "'6XB' has an unknown unit; write '6GB' or '6GiB'"),
        ("6 gigabytes", "'6 gigabytes' has an unknown unit; write '6GB' or '6GiB'"),
        ("", "'' is not an amount of memory; write '6GB' or '6GiB'"),
        ("GB", "'GB' is not an amount of memory; write '6GB' or '6GiB'"),
        ("-6GB", "'-6GB' is not an amount of memory; write '6GB' or '6GiB'"),
        ("6,5GB", "'6,5GB' is not an amount of memory; write '6GB' or '6GiB'"),
        ("1e9", "'1e9' is not an amount of memory; write '6GB' or '6GiB'"),
        ("90%", "'90%' is not an amount of memory; write '6GB' or '6GiB'"),
        (-1, "-1 is negative; write '6GB'"),
        (True, "True is not an amount of memory; write '6GB'"),
    ],
)
def test_what_is_no_amount(written: str | int, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is asserted
        parse_bytes(written)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("written", "fraction"),
    [("90%", 0.9), ("12.5 %", 0.125), (" 0% ", 0.0), ("100%", 1.0), ("6GB", None), ("-5%", None), ("90", None)],
)
def test_percentages(written: str, fraction: float | None) -> None:
    assert parse_fraction(written) == fraction


def test_more_than_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^'101%' is more than the device has; write at most '100%'$"):
        parse_fraction("101%")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_995, "10.0 kB"),
        (99_949, "99.9 kB"),
        (99_950, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (5_370_000_000, "5.37 GB"),
        (999_600_000_000, "1.00 TB"),
        (12_345 * 10**12, "12345 TB"),
        (-5_370_000_000, "-5.37 GB"),
    ],
)
def test_format(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 10**15))
def test_what_is_written_is_read_back_to_three_digits(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.005)


@pytest.mark.parametrize(
    ("written", "rate"),
    [
        ("10Gbit", 1_250_000_000),
        ("10 Gbit/s", 1_250_000_000),
        ("10gbit", 1_250_000_000),
        ("10Gbps", 1_250_000_000),
        ("400Mbit", 50_000_000),
        ("2.5Gbit/s", 312_500_000),
        ("64GB/s", 64 * 10**9),
        ("64GB", 64 * 10**9),
        ("31.5 GB/s", 31_500_000_000),
        ("1TB/s", 10**12),
        ("1GiB/s", 2**30),
        ("8bit", 1),
    ],
)
def test_rates(written: str, rate: int) -> None:
    assert parse_rate(written) == rate


@pytest.mark.parametrize(
    "written", ["10Gb", "10G", "10", "", "fast", "-1GB/s", "10Gbit/min", "1e9B/s", "9" * 50 + "GB/s"]
)
def test_what_is_no_rate(written: str) -> None:
    with pytest.raises(ValueError, match=r"is no rate; write '10Gbit/s' for bits or '10GB/s' for bytes"):
        parse_rate(written)


def test_a_rate_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"'0Gbit' carries nothing; write a rate such as '10Gbit/s'"):
        parse_rate("0Gbit")
