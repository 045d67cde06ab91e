"""A hub on loopback: serves folders in the layout of the Hugging Face hub, and fails in the ways of the real one.

    with StandInHub() as hub:
        hub.add("owner/name", folder)
        hub.use(monkeypatch, cache)      # point huggingface_hub at it in this process
        ...
        hub.requests                     # what was asked for: [("GET", "/api/models/owner/name"), ...]

In another process, set the environment to `hub.environment(home)` instead. Requests need no network but 127.0.0.1.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pytest

__all__ = ["Fault", "StandInHub"]

Fault = Literal["gated", "unauthorized", "forbidden", "rate-limited", "failing", "hanging", "dripping", "login page"]
_STATUS: Mapping[str, tuple[int, dict[str, str]]] = {
    "gated": (403, {"X-Error-Code": "GatedRepo"}),
    "unauthorized": (401, {"X-Error-Message": "Invalid username or password."}),
    "forbidden": (403, {}),
    "rate-limited": (429, {"Retry-After": "17"}),
    "failing": (503, {}),
}
_API = re.compile(r"/api/models/(?P<id>[^/]+(?:/[^/]+)?)(?:/revision/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<id>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_DRIP_SECONDS = 0.05


@dataclass
class StandInHub:
    """A hub.

    Attributes:
        repositories: Folder of each model by its id.
        gated: Ids whose listing says that they are gated, as the real hub's does for everyone.
        fault: How each request fails; None for a hub that works.
        file_fault: How each request for a file fails, while listings work.
        cuts: How many more downloads are cut off in the middle of the file.
        ignores_ranges: Whether a request for the rest of a file is answered with all of it.
        requests: Method and path of each request so far.
        resumed: How many requests for the rest of a file were answered with the rest.
        redirects: Whether files lie on another host, which requests are sent on to.
        overstated: Bytes by which the answer to a range overstates the file's length.
        patience: How many more requests for files are told to come back later.
        tokens: The path of each request that carried a token.
        sent: Bytes of files sent so far.
        mislabels: Whether the SHA-256 that it names for a file is that of another content.
    """

    repositories: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    fault: Fault | None = None
    file_fault: Fault | None = None
    cuts: int = 0
    ignores_ranges: bool = False
    requests: list[tuple[str, str]] = field(default_factory=list)
    resumed: int = 0
    redirects: bool = False
    overstated: int = 0
    patience: int = 0
    tokens: list[str] = field(default_factory=list)
    sent: int = 0
    mislabels: bool = False

    def __enter__(self) -> Self:
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        from huggingface_hub import close_session

        close_session()
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, model_id: str, folder: Path) -> str:
        """Serve `folder` as `model_id` and return its commit."""
        self.repositories[model_id] = folder
        return self.commit(model_id)

    def commit(self, model_id: str) -> str:
        """Return the commit of a model: another one once its files have other names or sizes."""
        files = [(name, path.stat().st_size) for name, path in self.files(model_id).items()]
        return hashlib.sha1(json.dumps([model_id, files]).encode()).hexdigest()

    def files(self, model_id: str) -> dict[str, Path]:
        folder = self.repositories[model_id]
        return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables that point a new process at this hub, with its cache below `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Point huggingface_hub in this process, which read its environment long ago, at this hub."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def log_message(self, *_: Any) -> None:
        """Stay silent."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if "Authorization" in self.headers:
            self.hub.tokens.append(path)
        about_file = _FILE.fullmatch(path.removeprefix("/elsewhere"))
        fault = self.hub.fault or (self.hub.file_fault if about_file else None)
        if fault is not None:
            self._fail(fault)
        elif about_file and self.hub.redirects and not path.startswith("/elsewhere"):
            # By another name the same machine is another host, which must not see the token.
            port = self.hub.url.rpartition(":")[2]
            self._send(
                302, b"", {"Location": f"http://localhost:{port}/elsewhere{self.path}", **self._linked(about_file)}
            )
        elif about_file and self.hub.patience > 0:
            self.hub.patience -= 1
            self._send(429, b"{}", {"Retry-After": "0"})
        elif about_file:
            self._send_file(about_file["id"], about_file["revision"], about_file["file"])
        elif about_model := _API.fullmatch(path):
            self._send_listing(about_model["id"], about_model["revision"] or "main")
        else:
            self._send(404)

    def _fail(self, fault: Fault) -> None:
        if fault == "hanging":
            self.hub.closing.wait()
            self.close_connection = True
        elif fault == "dripping":
            self._drip()
        elif fault == "login page":
            self._send(200, b"<html>Welcome to the hotel's network</html>")
        else:
            status, headers = _STATUS[fault]
            self._send(status, b"{}", headers)

    def _drip(self) -> None:
        """Send a byte at a time: a limit on each read never strikes."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        try:
            while not self.hub.closing.wait(_DRIP_SECONDS):
                self.wfile.write(b" ")
        except OSError:
            pass

    def _known(self, model_id: str, revision: str) -> bool:
        if model_id not in self.hub.repositories:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", self.hub.commit(model_id)):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return True
        return False

    def _send_listing(self, model_id: str, revision: str) -> None:
        if not self._known(model_id, revision):
            return
        files = self.hub.files(model_id)
        listing = {
            "id": model_id,
            "sha": self.hub.commit(model_id),
            "private": False,
            "gated": "manual" if model_id in self.hub.gated else False,
            "siblings": [{"rfilename": name, "size": path.stat().st_size} for name, path in files.items()],
        }
        self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def _send_file(self, model_id: str, revision: str, file: str) -> None:
        if not self._known(model_id, revision):
            return
        path = self.hub.files(model_id).get(file)
        commit = {"X-Repo-Commit": self.hub.commit(model_id)}
        if path is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", **commit})
            return
        size = path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin, end = 0, size
        if wanted is not None and not self.hub.ignores_ranges:
            begin, end = int(wanted[1]), min(int(wanted[2]) + 1 if wanted[2] else size, size)
        with path.open("rb") as stream:
            stream.seek(begin)
            content = stream.read(end - begin)
        headers = {"ETag": f'"{self._mark(path)}"', "Accept-Ranges": "bytes", **commit}
        if wanted is None or self.hub.ignores_ranges:
            self._send(200, content, headers)
            return
        self.hub.resumed += 1
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size + self.hub.overstated}"
        self._send(206, content, headers)

    def _mark(self, path: Path) -> str:
        """As the real hub marks its large files; the content of a sparse one of gigabytes is not read for it."""
        size = path.stat().st_size
        marked = path.read_bytes() if size < 2**27 else f"{path.name} {size}".encode()
        return hashlib.sha256(marked + (b"other" if self.hub.mislabels else b"")).hexdigest()

    def _linked(self, about_file: re.Match[str]) -> dict[str, str]:
        """What the real hub says of a file that lies on another host."""
        path = self.hub.files(about_file["id"]).get(about_file["file"])
        if path is None:
            return {}
        linked = {"X-Linked-ETag": f'"{self._mark(path)}"', "X-Linked-Size": str(path.stat().st_size)}
        return {"X-Repo-Commit": self.hub.commit(about_file["id"]), **linked}

    def _send(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cuts > 0 and headers is not None and "ETag" in headers:
            self.hub.cuts -= 1
            self.close_connection = True
            body = body[: len(body) // 2]
        try:
            self.wfile.write(body)
        except OSError:
            self.close_connection = True  # whoever asked has enough
            return
        if headers is not None and "ETag" in headers:
            self.hub.sent += len(body)
