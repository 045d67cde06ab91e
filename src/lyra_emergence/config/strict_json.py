"""Strict reading of JSON objects: syntax errors with their position, and what JSON's own rules leave open refused.

Refused: a key that stands twice (the last would win silently), NaN and Infinity, numbers beyond a double's range,
numbers of hundreds of digits, and nesting so deep that reading it would exhaust the stack.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from lyra_emergence.config.problems import shown

if TYPE_CHECKING:
    from lyra_emergence.config.problems import Problems

__all__ = ["parse_json_object"]

_LONGEST_NUMBER = 30


class _Object(dict[str, Any]):
    """A JSON object that remembers which keys stood twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        seen: set[str] = set()
        self.twice = [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]


class _Refused:
    """Stands where a number was refused, until its key path is known."""

    def __init__(self, text: str) -> None:
        self.text = text


def parse_json_object(text: str, at: str, problems: Problems, *, path: str = "") -> dict[str, Any]:
    """Return the object that `text` holds, without the values that have a problem.

    Args:
        text: JSON.
        at: Key path of the object; empty for a whole file.
        problems: Receives a line for everything that is wrong.
        path: The file, which leads a syntax error's line as "path:line:column"; without one, the line names `at`.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_Object,
            parse_constant=_Refused,
            parse_float=_finite_float,
            parse_int=_bounded_int,
        )
        return _as_object(value, at, problems)
    except json.JSONDecodeError as exc:
        reason = exc.msg[:1].lower() + exc.msg[1:]
        if path:
            problems.add_unlocated(f"{path}:{exc.lineno}:{exc.colno}: not valid JSON: {reason}")
        else:
            problems.add(f"not valid JSON: {reason} at line {exc.lineno}, column {exc.colno}", at=at)
    except RecursionError:
        problems.add("the objects are nested too deeply", at=at)
    return {}


def _finite_float(text: str) -> float | _Refused:
    value = float(text)
    return value if math.isfinite(value) else _Refused(text)


def _bounded_int(text: str) -> int | _Refused:
    return int(text) if len(text) <= _LONGEST_NUMBER else _Refused(text)


def _as_object(value: object, at: str, problems: Problems) -> dict[str, Any]:
    if not isinstance(value, _Object):
        problems.add(f'{_kind(value)} where an object belongs; write {{"key": value, ...}}', at=at)
        return {}
    plain = _plain(value, at, problems)
    assert isinstance(plain, dict)
    return plain


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else "a number" if isinstance(value, _Refused) else shown(value)


def _plain(value: object, at: str, problems: Problems) -> object:
    """Return `value` as plain dicts and lists; refused parts are left out and become problems."""
    if isinstance(value, _Object):
        for key in value.twice:
            problems.add("the key stands twice; keep one", at=_join(at, key))
        kept = {key: item for key, item in value.items() if not _refuse(item, _join(at, key), problems)}
        return {key: _plain(item, _join(at, key), problems) for key, item in kept.items()}
    if isinstance(value, list):
        items = enumerate(value)
        return [_plain(item, f"{at}.{i}", problems) for i, item in items if not _refuse(item, f"{at}.{i}", problems)]
    return value


def _refuse(value: object, at: str, problems: Problems) -> bool:
    if not isinstance(value, _Refused):
        return False
    problems.add(f"{shown(value.text)[1:-1]} is not a number that JSON or Lyra can hold; write a smaller one", at=at)
    return True


def _join(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key
