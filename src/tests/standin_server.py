"""A chat server on loopback that speaks OpenAI's protocol, and fails in the ways of real ones.

with StandInServer(["By the ", "wall [1]."]) as server:
    server.url          # http://127.0.0.1:PORT/v1
    server.asked        # the bodies of the requests for answers so far
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Fault", "StandInServer"]

Fault = Literal[
    "unauthorized",
    "missing",
    "busy",
    "failing",
    "too long",
    "elsewhere",
    "error in the stream",
    "cut off",
    "no json",
    "no answer",
    "endless event",
    "silent",
    "hanging",
]
_STATUS: Mapping[str, tuple[int, dict[str, str], object]] = {
    "unauthorized": (401, {}, {"error": {"message": "Incorrect API key provided: \x1b[31mno"}}),
    "missing": (404, {}, {"detail": "Not Found"}),
    "busy": (429, {"Retry-After": "17"}, {"error": "slow down"}),
    "failing": (503, {}, {"message": "Loading model"}),
    "too long": (400, {}, {"error": {"message": "the request exceeds the available context size"}}),
    "elsewhere": (307, {"Location": "http://203.0.113.1/v1"}, {}),
}


@dataclass
class StandInServer:
    """A server.

    Attributes:
        pieces: What every answer is made of.
        models: What it lists.
        fault: How answers fail; None for a server that works.
        streams: Whether it sends events; else one whole answer.
        key: The key that it wants, or "".
        finish_reason: How its answers end.
        asked: The bodies of the requests for answers.
        headers: The headers of all requests, with names in lower case.
    """

    pieces: list[str] = field(default_factory=lambda: ["Hi."])
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "tiny"}])
    fault: Fault | None = None
    streams: bool = True
    key: str = ""
    finish_reason: str = "stop"
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"stand_in": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    stand_in: StandInServer

    def log_message(self, *_: Any) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        self._note()
        if self.path != "/v1/models":
            self._send(404, {"detail": "Not Found"})
        elif not self._allowed():
            self._send(*_STATUS["unauthorized"][::2])
        elif self.stand_in.fault == "no json":
            self._send(200, "<html>hello</html>")
        else:
            self._send(200, {"object": "list", "data": self.stand_in.models})

    def do_POST(self) -> None:
        self._note()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.stand_in.asked.append(body)
        fault = self.stand_in.fault
        if not self._allowed():
            fault = "unauthorized"
        if fault in _STATUS:
            status, headers, content = _STATUS[fault]
            self._send(status, content, headers)
        elif fault == "silent":
            self.stand_in.closing.wait()
        elif fault == "no answer":
            self._send(200, {"choices": [3]})
        elif not self.stand_in.streams:
            self._send(200, self._whole())
        else:
            self._stream(fault)

    def _note(self) -> None:
        self.stand_in.headers.append({name.lower(): value for name, value in self.headers.items()})

    def _allowed(self) -> bool:
        return not self.stand_in.key or self.headers.get("Authorization") == f"Bearer {self.stand_in.key}"

    def _whole(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(self.stand_in.pieces)}
        return {
            "choices": [{"message": message, "finish_reason": self.stand_in.finish_reason}],
            "usage": {"prompt_tokens": 21, "completion_tokens": 7},
        }

    def _stream(self, fault: Fault | None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        if fault == "endless event":
            self._write(b"data: " + b"x" * (5 * 2**20))
            return
        if fault == "no json":
            self._write(b"data: {nothing\n\n")
            return
        self._write(b": a comment\n\n")
        self._event({"choices": [{"delta": {"role": "assistant", "content": None}}]})
        for piece in self.stand_in.pieces:
            self._event({"choices": [{"delta": {"content": piece}, "finish_reason": None}]})
        if fault == "hanging":
            self.stand_in.closing.wait()
        elif fault == "error in the stream":
            self._event({"error": {"message": "the GPU is gone", "code": 500}})
        elif fault is None:
            self._event({"choices": [{"delta": {}, "finish_reason": self.stand_in.finish_reason}]})
            self._event({"choices": [], "usage": {"prompt_tokens": 21, "completion_tokens": 7}})
            self._write(b"data: [DONE]\n\n")

    def _event(self, data: object) -> None:
        self._write(b"data: " + json.dumps(data).encode() + b"\r\n\r\n")

    def _write(self, data: bytes) -> None:
        try:
            self.wfile.write(data)
            self.wfile.flush()
        except OSError:
            self.close_connection = True  # whoever asked has enough

    def _send(self, status: int, content: object, headers: Mapping[str, str] | None = None) -> None:
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self._write(body)
