"""The page at `/`: one answer that holds its style and its script, and may load nothing else.

Its policy names both by their hashes, lets it talk to this server alone, and lets no other page frame it. Texts of the
model and of the journal become text nodes; with Trusted Types, browsers refuse to read any text as markup.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Final

from starlette.responses import Response

__all__ = ["Page"]

_FILES: Final = Path(__file__).parent / "assets"
_SCRIPTS: Final = ("events.js", "text.js", "placement.js", "chat.js", "main.js")
"""In the order in which they use each other; together they are one script."""


class Page:
    """The page, put together once from its files.

    Attributes:
        html: All of it.
        policy: Its Content-Security-Policy.
    """

    def __init__(self) -> None:
        style = _read("page.css")
        script = "".join(_read(name) for name in _SCRIPTS)
        html = _read("page.html")
        self.html: Final = html.replace("/* style */", style, 1).replace("/* script */", script, 1)
        self.policy: Final = "; ".join(
            (
                "default-src 'none'",
                f"script-src {_hashed(script)}",
                f"style-src {_hashed(style)}",
                "img-src data:",
                "connect-src 'self'",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
                "require-trusted-types-for 'script'",
                "trusted-types 'none'",
            )
        )

    def response(self) -> Response:
        """Return it as an answer that nobody keeps."""
        headers = {
            "Content-Security-Policy": self.policy,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
        return Response(self.html, headers=headers, media_type="text/html")


def _read(name: str) -> str:
    return (_FILES / name).read_text(encoding="utf-8")


def _hashed(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
