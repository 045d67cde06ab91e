"""A checkpoint on the hub, read from its headers alone: config.json, the index, and the first bytes of each shard.

Each shard is asked for a range of its bytes, so that a plan for 800 GB of weights costs a few hundred kilobytes. What a
server claims of lengths is compared with the hub's listing and bounded before anything is kept, and a server that
ignores the range and sends the whole file is cut off after the bytes that are needed.
"""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from lyra_emergence.checkpoint import CheckpointIndex, read_files
from lyra_emergence.checkpoint.json_files import DAMAGED, parse_object, shown
from lyra_emergence.checkpoint.safetensors_header import PREFIX_BYTES, TensorInfo, header_length, parse_header
from lyra_emergence.errors import CheckpointError
from lyra_emergence.hub.errors import offline, unavailable
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import httpx

    from lyra_emergence.hub import RemoteModel

__all__ = ["read_remote_checkpoint"]

_FIRST_BYTES = 32 * 1024
"""Bytes asked for at first: headers of shards have 5 to 20 kB, so one request each is the rule."""
_AT_ONCE = 8
"""Requests under way at the same time."""
_TIMEOUT = 10.0
_TRIES = 3
_LONGEST_WAIT = 10.0
"""Seconds that a hub which asks for patience is given before the next try; longer ones are the user's decision."""
_OK, _PARTIAL, _RATE_LIMITED = 200, 206, 429
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def read_remote_checkpoint(remote: RemoteModel) -> CheckpointIndex:
    """Return what a model on the hub holds; no weights are fetched.

    Raises:
        CheckpointError: Its files contradict their format, one another or the hub's listing.
        ModelUnavailableError: The hub is unreachable, forbidden (HF_HUB_OFFLINE), failing, or refuses access.
    """
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.is_offline_mode():
        raise offline(remote.model_id)
    try:
        return read_files(_RemoteFiles(remote), Path(remote.model_id), remote.model_id)
    except (httpx.HTTPError, HfHubHTTPError) as error:
        raise unavailable(remote.model_id, error) from error


@dataclass(frozen=True, slots=True)
class _Part:
    """The first bytes of a file, and how many it has in all."""

    content: bytes
    size: int


class _RemoteFiles:
    """The files of a model on the hub, as `CheckpointFiles`."""

    def __init__(self, remote: RemoteModel) -> None:
        from huggingface_hub import constants, get_session, get_token

        self._remote = remote
        self._sizes = dict(zip(remote.files, remote.sizes, strict=False))
        self._endpoint = constants.ENDPOINT
        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
        self._headers = {"user-agent": "lyra-emergence", "accept-encoding": "identity"}
        self._headers |= {"authorization": f"Bearer {token}"} if token else {}
        self._session: httpx.Client = get_session()

    def names(self) -> list[str]:
        return sorted(self._remote.files)

    def exists(self, name: str) -> bool:
        return name in self._remote.files

    def where(self, name: str = "") -> str:
        return f"{self._remote.model_id}/{name}" if name else self._remote.model_id

    def read_object(self, name: str, *, limit: int, strict: bool) -> dict[str, Any]:
        part = self._first(name, limit)
        if part.size > limit:
            raise CheckpointError(
                f"{self.where(name)} has {format_bytes(part.size)}; such a file has at most {format_bytes(limit)}",
                hint=DAMAGED,
            )
        return parse_object(part.content, self.where(name), strict=strict)

    def read_headers(self, names: Iterable[str]) -> Mapping[str, tuple[TensorInfo, ...]]:
        listed = list(names)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return dict(zip(listed, pool.map(self._read_header, listed), strict=True))

    def _read_header(self, name: str) -> tuple[TensorInfo, ...]:
        where = self.where(name)
        part = self._first(name, _FIRST_BYTES)
        length = header_length(part.content[:PREFIX_BYTES], part.size, where)
        if PREFIX_BYTES + length > len(part.content):
            part = self._first(name, PREFIX_BYTES + length)
        raw = part.content[PREFIX_BYTES : PREFIX_BYTES + length]
        return parse_header(raw, length, part.size, where, name)

    def _first(self, name: str, count: int) -> _Part:
        """Return the first `count` bytes of a file, or all of a shorter one."""
        size = self._sizes.get(name)
        if size == 0:
            return _Part(b"", 0)
        for left in reversed(range(_TRIES)):
            part = self._ask(name, count, last=left == 0)
            if part is not None:
                break
        assert part is not None
        if size is not None and part.size != size:
            raise CheckpointError(
                f"{self.where(name)}: the hub lists {size} bytes and the server has {part.size}",
                hint="try again in a while: the model is being changed, or a proxy serves another file",
            )
        if len(part.content) < min(count, part.size):
            raise CheckpointError(
                f"{self.where(name)}: only {len(part.content)} of {min(count, part.size)} bytes came",
                hint="the connection broke; try again",
            )
        return part

    def _ask(self, name: str, count: int, *, last: bool) -> _Part | None:
        """Return the first bytes of a file; None where the hub asks for patience and `last` does not forbid it."""
        from huggingface_hub import hf_raise_for_status

        url = f"{self._endpoint}/{self._remote.model_id}/resolve/{self._remote.revision}/{quote(name)}"
        headers = {**self._headers, "range": f"bytes=0-{count - 1}"}
        # Followed redirects lose the token where they lead to another host: httpx sees to that.
        with self._session.stream("GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True) as response:
            if response.status_code == _RATE_LIMITED and not last:
                wait = _seconds(response.headers.get("retry-after"))
                if wait <= _LONGEST_WAIT:
                    time.sleep(wait)
                    return None
            if response.status_code not in (_OK, _PARTIAL):
                response.read()
                hf_raise_for_status(response)
            return _Part(_read(response, count), self._size_of(response, name))

    def _size_of(self, response: httpx.Response, name: str) -> int:
        if response.status_code == _PARTIAL:
            stated = response.headers.get("content-range", "")
            match = _CONTENT_RANGE.fullmatch(stated)
            if match is None or int(match[1]) != 0:
                raise CheckpointError(
                    f"{self.where(name)}: the server answers with the range {shown(stated)}, not the one asked for",
                    hint="check HF_ENDPOINT and the proxy",
                )
            return int(match[3])
        stated = response.headers.get("content-length", "")
        if not stated.isdecimal():
            raise CheckpointError(
                f"{self.where(name)}: the server does not say how long the file is",
                hint="check HF_ENDPOINT and the proxy",
            )
        return int(stated)


def _read(response: httpx.Response, count: int) -> bytes:
    """Return the first `count` bytes of the body, reading no further than the chunk that completes them."""
    import httpx

    held = bytearray()
    try:
        for chunk in response.iter_raw():
            held += chunk
            if len(held) >= count:
                break
    except httpx.RemoteProtocolError:
        # The body is shorter than announced; the caller says how much came.
        pass
    return bytes(held[:count])


def _seconds(retry_after: str | None) -> float:
    """Return the seconds of a Retry-After header; 1 where it has none, or a date."""
    return float(retry_after) if retry_after and retry_after.isdecimal() else 1.0
