"""Bytes and rates as people write them: parsing ("6GB", "6GiB", "90%", "10Gbit/s") and formatting."""

from __future__ import annotations

import re

__all__ = ["format_bytes", "parse_bytes", "parse_fraction", "parse_rate"]

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_AMOUNT = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>[A-Za-z]*)")
_PERCENT = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s*%")
_BITS = re.compile(r"(?:[kKmMgGtT][iI]?)?b")
_BARE_PREFIX = re.compile(r"[kKmMgGtT]i?")
_RATE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<prefix>[kKmMgGtT]i?)?(?P<unit>bit|b(?=ps)|B)(?:/s|ps)?")
_BITS_IN_A_BYTE = 8
_STEP = 1000
_MOST_DIGITS = 40
"""Digits of an amount: with more, it is beyond what floating point can show, and no machine has it."""


def parse_bytes(value: str | int) -> int:
    """Return the number of bytes that `value` names.

    Args:
        value: A whole number of bytes, or text such as "6GB" (6e9), "6GiB" (6 * 2**30) or "500 MB".

    Raises:
        ValueError: The text is no amount of bytes, or its unit means bits; the message says what to write.
    """
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not an amount of memory; write '6GB'")  # noqa: TRY004
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{value} is negative; write '6GB'")
        return value
    match = _AMOUNT.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not an amount of memory; write '6GB' or '6GiB'")
    number, unit = match["number"], match["unit"]
    if _BITS.fullmatch(unit):
        raise ValueError(f"{value!r} is bits; write '{number}{unit[:-1].upper().replace('I', 'i')}B'")
    if _BARE_PREFIX.fullmatch(unit):
        prefix = unit[0].upper()
        raise ValueError(f"{value!r} has no unit; write '{number}{prefix}B' or '{number}{prefix}iB'")
    factor = _UNITS.get(unit.upper())
    if factor is None:
        raise ValueError(f"{value!r} has an unknown unit; write '6GB' or '6GiB'")
    if len(number) > _MOST_DIGITS:
        raise ValueError(f"{value[:_MOST_DIGITS]!r}... is more memory than there is; write '6GB'")
    return int(float(number) * factor) if "." in number else int(number) * factor


def parse_fraction(value: str) -> float | None:
    """Return 0.9 for "90%", or None where `value` is no percentage.

    Raises:
        ValueError: The percentage is above 100.
    """
    match = _PERCENT.fullmatch(value.strip())
    if match is None:
        return None
    fraction = float(match["number"]) / 100
    if fraction > 1:
        raise ValueError(f"{value!r} is more than the device has; write at most '100%'")
    return fraction


def parse_rate(value: str) -> int:
    """Return the bytes per second that `value` names.

    Networks are sold in bits and buses in bytes, so both are read, and the unit must say which.

    Args:
        value: Text such as "10Gbit" or "10Gbps" (1.25e9 bytes per second), "64GB/s" or "64GB" (64e9).

    Raises:
        ValueError: The text is no rate, is 0, or leaves open whether bits are meant; the message says what to write.
    """
    match = _RATE.fullmatch(value.strip())
    if match is None or len(match["number"]) > _MOST_DIGITS:
        shown = value[:_MOST_DIGITS]
        raise ValueError(f"{shown!r} is no rate; write '10Gbit/s' for bits or '10GB/s' for bytes")
    prefix = (match["prefix"] or "").upper()
    found = float(match["number"]) * _UNITS[f"{prefix}B"] / (1 if match["unit"] == "B" else _BITS_IN_A_BYTE)
    if found < 1:
        raise ValueError(f"{value!r} carries nothing; write a rate such as '10Gbit/s'")
    return int(found)


def format_bytes(count: int) -> str:
    """Return `count` bytes in decimal units with three digits: 5370000000 is "5.37 GB"."""
    sign, amount = ("-", -count) if count < 0 else ("", count)
    if amount < _STEP:
        return f"{sign}{amount} B"
    scaled = float(amount)
    for unit in ("kB", "MB", "GB"):
        scaled /= _STEP
        if scaled < _STEP - 0.5:  # what rounds to 1000 belongs to the next unit
            return f"{sign}{_three_digits(scaled)} {unit}"
    return f"{sign}{_three_digits(scaled / _STEP)} TB"


def _three_digits(number: float) -> str:
    decimals = next((digits for limit, digits in ((9.995, 2), (99.95, 1)) if number < limit), 0)
    return f"{number:.{decimals}f}"
