"""What went wrong between us and a server that answers, told apart and each with its remedy."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from lyra_emergence.errors import EndpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["KEY_VARIABLE", "failed", "refused", "unusable"]

KEY_VARIABLE: Final = "LYRA_ENDPOINT_KEY"
"""The environment variable whose content is sent as a bearer token."""

_UNAUTHORIZED: Final = (401, 403)
_NOT_FOUND: Final = 404
_RATE_LIMITED: Final = 429
_SERVER_ERROR: Final = 500
_REDIRECTS: Final = range(300, 400)
_LONGEST_REASON: Final = 300


def failed(url: str, error: Exception) -> EndpointError:
    """Return what an error of httpx means."""
    import httpx

    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return EndpointError(
            f"{url} cannot be reached: {_said(error)}", hint="check that the server runs, and the host and port"
        )
    if isinstance(error, httpx.TimeoutException):
        return EndpointError(f"{url} stays silent", hint="the server may be busy or hang: look at its own log")
    if isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return EndpointError(f"{url} cannot be asked: {_said(error)}", hint=f"check the URL and {KEY_VARIABLE}")
    return EndpointError(f"the connection to {url} broke: {_said(error)}", hint="ask again: what came is kept")


def refused(url: str, status: int, headers: Mapping[str, str], body: bytes, *, has_key: bool) -> EndpointError:
    """Return what a status other than success means, or an error in the middle of a stream (`status` 0)."""
    reason = _reason(body)
    said = f": {reason}" if reason else ""
    if status in _REDIRECTS:
        return EndpointError(
            f"{url} sends us on to {headers.get('location', 'another place')}", hint="give that URL, if you trust it"
        )
    if status in _UNAUTHORIZED:
        do = f"check the key in {KEY_VARIABLE}" if has_key else f"set {KEY_VARIABLE} to your key"
        return EndpointError(f"{url} denies access (HTTP {status}){said}", hint=do)
    if status == _NOT_FOUND:
        return EndpointError(
            f"{url} has no such model or path (HTTP 404){said}", hint="name a model with --model; URLs end with /v1"
        )
    if status == _RATE_LIMITED:
        wait = headers.get("retry-after", "")
        pause = f"wait {wait} seconds" if wait.isdigit() else "wait a while"
        return EndpointError(f"{url} takes no more requests for now{said}", hint=pause)
    if status >= _SERVER_ERROR:
        return EndpointError(f"{url} failed (HTTP {status}){said}", hint="look at the server's own log")
    code = f" (HTTP {status})" if status else ""
    return EndpointError(f"{url} refuses{code}{said}", hint="a prompt too long? --context N says what the server takes")


def unusable(url: str, why: str) -> EndpointError:
    """Return the error for a server that answers otherwise than the protocol says."""
    return EndpointError(
        f"{url} does not answer as expected: {why}", hint="check that it speaks OpenAI's chat protocol"
    )


def _reason(body: bytes) -> str:
    """Return the server's own words, cut; the terminal's controls are taken out where they are printed."""
    text = body.decode("utf-8", "replace")
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError):
        return "" if "<html" in text.lower() else _cut(text)
    for name in ("error", "message", "detail"):
        if isinstance(data, dict) and data.get(name):
            data = data[name]
    return _cut(data if isinstance(data, str) else json.dumps(data, ensure_ascii=False))


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_REASON else line[:_LONGEST_REASON] + "..."


def _said(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
