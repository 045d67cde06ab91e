"""Engines of a benchmark, each in a process of its own that prints its figures as lines of JSON."""

from __future__ import annotations

import json
import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["asked", "prompt_of", "spread", "timed"]


def asked(process: Any, line: str) -> dict[str, Any]:
    """Return the next line of figures that an engine prints, after it was sent `line`.

    Raises:
        SystemExit: The engine ended.
    """
    process.stdin.write(line)
    process.stdin.flush()
    for answer in process.stdout:
        if answer.startswith("{"):
            return dict(json.loads(answer))
    raise SystemExit(f"an engine ended: {process.args}")


def prompt_of(tokens: int) -> list[int]:
    """Return a prompt of so many tokens."""
    return [(7 * at + 11) % 900 for at in range(tokens)]


def timed(prefill: Callable[[], Any], step: Callable[[int], Any], new_tokens: int) -> dict[str, float]:
    """Return the seconds of a prompt, and of each token after the first; a token that is known has been computed."""
    clock = time.perf_counter()
    token = int(prefill().argmax(-1))
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        token = int(step(token).argmax(-1))
    return {"prompt": first - clock, "token": (time.perf_counter() - first) / (new_tokens - 1)}


def spread(figures: list[float]) -> str:
    """Return the median with least and most."""
    return f"{statistics.median(figures):.2f} ({min(figures):.2f}-{max(figures):.2f})"
