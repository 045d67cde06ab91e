"""Engines of a benchmark, each in a process of its own that prints its figures as lines of JSON."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["asked"]


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
