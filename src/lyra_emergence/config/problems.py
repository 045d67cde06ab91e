"""What is wrong with a configuration, collected line by line so that one error names every problem."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from lyra_emergence.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Problems", "did_you_mean", "mismatch", "shown"]

_LONGEST_SHOWN = 60
_SHORTEST_BEGINNING = 3
_LARGEST_SHOWN = 10**30


class Problems:
    """The problems found so far, in one source or in several.

    Attributes:
        lines: One line per problem: source, key path, what is wrong, what to write.
    """

    def __init__(self, source: str = "") -> None:
        self.source = source
        self.lines: list[str] = []

    def add(self, text: str, *, at: str = "") -> None:
        """Add `text` about the key path `at` ("max_memory.0"); about the whole source without one."""
        place = f"in {at!r}: " if at else ""
        prefix = f"{self.source}: " if self.source else ""
        self.lines.append(f"{prefix}{place}{text}")

    def add_unlocated(self, line: str) -> None:
        """Add a whole line that names its own source, such as a position in a file."""
        self.lines.append(line)

    def error(self, *, hint: str = "") -> ConfigError:
        """Return the error that lists every problem."""
        count = len(self.lines)
        noun = "problem" if count == 1 else "problems"
        return ConfigError(f"the configuration has {count} {noun}:", problems=tuple(self.lines), hint=hint)

    def raise_if_any(self) -> None:
        """Raise `ConfigError` if a problem was found."""
        if self.lines:
            raise self.error()


def shown(value: object) -> str:
    """Return `value` as a message shows it: escaped, so that no control character reaches a terminal, and short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(value if len(value) <= _LONGEST_SHOWN else f"{value[:_LONGEST_SHOWN]}...")
    if isinstance(value, (int, float)):
        huge = isinstance(value, int) and abs(value) >= _LARGEST_SHOWN
        return "a number of more than 30 digits" if huge else repr(value)
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, (list, tuple)) else f"a value of type {type(value).__name__}"


def mismatch(value: object, expected: str) -> str:
    """Return the sentence for a value of the wrong type; `expected` completes "write ..."."""
    if isinstance(value, str):
        return f"{shown(value)} is text; write {expected}"
    if isinstance(value, bool):
        return f"{shown(value)} is a boolean; write {expected}"
    if isinstance(value, (int, float)):
        return f"{shown(value)} is a number; write {expected}"
    return f"{shown(value)} is not allowed; write {expected}"


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known word nearest to `word`, or None where none is near."""
    # Long words are no typing slips, and the comparison is quadratic in their length.
    words = list(known)
    beginning = [name for name in words if len(word) >= _SHORTEST_BEGINNING and name.startswith(word)]
    if len(beginning) == 1:
        return beginning[0]
    nearest = difflib.get_close_matches(word[:_LONGEST_SHOWN], words, n=1, cutoff=cutoff)
    return nearest[0] if nearest else None
