"""The program's exit statuses; the errors in `lyra_emergence.errors` carry their own."""

from __future__ import annotations

from typing import Final

__all__ = ["FAILED", "INTERRUPTED", "USAGE"]

FAILED: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130
"""After Ctrl-C, as shells report it."""
