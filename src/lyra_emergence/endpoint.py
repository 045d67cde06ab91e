"""A server that speaks OpenAI's chat protocol, in place of a model loaded here: llama.cpp, vLLM, Ollama, and others.

Covers `POST .../chat/completions` with server-sent events or a plain answer, `GET .../models`, a key as a bearer token,
and every way to fail that a server has, each as an `EndpointError` with a remedy. Redirects are not followed, so that
neither the key nor the journal goes to a host that nobody named. What a server sends is bounded. It does not cover
tools, images and several answers.

The server's tokenizer is not known here. A token is counted as three bytes of UTF-8, which is more tokens than English
text really has; the context is what the caller says, else what the server lists, else 4096 tokens.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final
from urllib.parse import urlsplit

from lyra_emergence.chunks import Chunk, GenerationStats
from lyra_emergence.endpoint_errors import KEY_VARIABLE, failed, refused, unusable
from lyra_emergence.errors import ConfigError
from lyra_emergence.event_stream import events
from lyra_emergence.prompting import instructed, plain_messages

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

    from lyra_emergence.chunks import FinishReason, GenerationOptions
    from lyra_emergence.prompting import Excerpt, Exchange

__all__ = ["DEFAULT_CONTEXT", "Endpoint", "Messages", "ServedModel", "is_loopback"]

DEFAULT_CONTEXT: Final = 4096
_BYTES_PER_TOKEN: Final = 3
_MESSAGE_TOKENS: Final = 8
"""What a chat template adds to a message: its role and its ends."""
_CONNECT_SECONDS: Final = 10.0
_ANSWER_SECONDS: Final = 600.0
"""How long a server may be silent: one that reads a long prompt, or loads its model first, sends nothing meanwhile."""
_LIST_SECONDS: Final = 10.0
_MAX_LISTING: Final = 8 * 2**20
_MAX_ANSWER: Final = 64 * 2**20
_CONTEXT_FIELDS: Final = ("max_model_len", "context_length", "context_window", "n_ctx")
_DONE: Final[dict[str, Any]] = {"choices": [{"finish_reason": "stop"}]}
"""What the end of a stream means where no reason was given before."""
_REASONS: Final[dict[str, FinishReason]] = {"length": "length"}


@dataclass(frozen=True, slots=True)
class Messages:
    """A prompt for a server.

    Attributes:
        items: The messages, as the protocol has them.
    """

    items: tuple[dict[str, str], ...]

    def __len__(self) -> int:
        """Return its tokens, as they are estimated here."""
        return sum(_MESSAGE_TOKENS + _estimate(message["content"]) for message in self.items)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that a server lists.

    Attributes:
        id: Its name there.
        context: Tokens that it takes, if the server says.
    """

    id: str
    context: int | None


class _MessageWriter:
    """Writes messages."""

    stops: tuple[str, ...] = ()

    def __init__(self, system: str | None) -> None:
        self._system = system

    def write(self, question: str, excerpts: tuple[Excerpt, ...] = (), earlier: tuple[Exchange, ...] = ()) -> Messages:
        """Return the messages."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        return Messages((*system, *plain_messages(instructed(question, excerpts), earlier)))


class Endpoint:
    """One server.

    Args:
        url: The protocol's base, such as "http://127.0.0.1:8080/v1"; without a path, /v1 is meant.
        key: Sent as a bearer token, if there is one.
        model: The model's name there.
        context: Tokens that a prompt and its answer may have together.

    Raises:
        ConfigError: `url` is none that can be asked.
    """

    waits_on_others: ClassVar[bool] = True

    def __init__(self, url: str, *, key: str = "", model: str = "", context: int = DEFAULT_CONTEXT) -> None:
        self.url = _base(url)
        self.model = model
        self._context = context
        self._key = key

    def serving(self, model: str, context: int) -> Endpoint:
        """Return the same server with a model chosen."""
        return Endpoint(self.url, key=self._key, model=model, context=context)

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._context

    def writer(self, system: str | None) -> _MessageWriter:
        """Return what writes messages."""
        return _MessageWriter(system)

    def forget(self) -> None:
        """Do nothing: the server keeps what it wants."""

    def models(self) -> list[ServedModel]:
        """Ask the server which models it has.

        Raises:
            EndpointError: It cannot be reached, refuses, or does not answer as it should.
        """
        import httpx

        try:
            with self._client(_LIST_SECONDS) as client, client.stream("GET", f"{self.url}/models") as response:
                body = _read(response, _MAX_LISTING)
                self._check(response, body)
        except httpx.HTTPError as error:
            raise failed(self.url, error) from error
        return _listed(self.url, body)

    def stream(self, prompt: Messages, options: GenerationOptions) -> Iterator[Chunk]:
        """Answer a prompt, a chunk for each piece that the server sends.

        Raises:
            EndpointError: The server cannot be reached, refuses, breaks off, or does not answer as it should.
        """
        import httpx

        body = _request(self.model, prompt, options)
        try:
            with (
                self._client(_ANSWER_SECONDS) as client,
                client.stream("POST", f"{self.url}/chat/completions", json=body) as response,
            ):
                if not response.is_success:
                    self._check(response, _read(response, _MAX_LISTING))
                yield from _chunks(self.url, _answers(self.url, response), len(prompt))
        except httpx.HTTPError as error:
            raise failed(self.url, error) from error

    def _client(self, seconds: float) -> httpx.Client:
        import httpx

        headers = {"user-agent": "lyra-emergence"} | ({"authorization": f"Bearer {self._key}"} if self._key else {})
        patience = httpx.Timeout(seconds, connect=_CONNECT_SECONDS)
        proxies = not is_loopback(self.url)
        return httpx.Client(headers=headers, timeout=patience, follow_redirects=False, trust_env=proxies)

    def _check(self, response: httpx.Response, body: bytes) -> None:
        if not response.is_success:
            raise refused(self.url, response.status_code, response.headers, body, has_key=bool(self._key))


def is_loopback(url: str) -> bool:
    """Return whether `url` leads to this machine itself."""
    host = urlsplit(url).hostname or ""
    return host in {"localhost", "::1"} or host.startswith("127.")


def _base(url: str) -> str:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"--endpoint: '{url}' is no URL: {error}", hint="write http://127.0.0.1:8080/v1") from None
    if parts.scheme not in {"http", "https"} or not host:
        raise ConfigError(f"--endpoint: '{url}' is no URL of a server", hint="write http://127.0.0.1:8080/v1")
    if parts.username or parts.password:
        raise ConfigError("--endpoint: the URL holds a password", hint=f"put the key into {KEY_VARIABLE} instead")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _estimate(text: str) -> int:
    return -(-len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN)


def _request(model: str, prompt: Messages, options: GenerationOptions) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "messages": list(prompt.items),
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature if options.do_sample else 0,
    }
    if options.do_sample and options.top_p < 1:
        body["top_p"] = options.top_p
    if options.stop:
        body["stop"] = list(options.stop)
    if options.seed is not None:
        body["seed"] = options.seed
    return body


def _read(response: httpx.Response, limit: int) -> bytes:
    body = bytearray()
    for part in response.iter_bytes():
        body += part
        if len(body) > limit:
            break
    return bytes(body[:limit])


def _listed(url: str, body: bytes) -> list[ServedModel]:
    try:
        found = json.loads(body)["data"]
        return [ServedModel(str(model["id"]), _context_of(model)) for model in found]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise unusable(url, "it lists no models in OpenAI's form") from error


def _context_of(model: dict[str, Any]) -> int | None:
    meta = model.get("meta")
    places = [model, meta] if isinstance(meta, dict) else [model]
    sizes = (place.get(name) for place in places for name in _CONTEXT_FIELDS)
    return next((size for size in sizes if type(size) is int and size > 0), None)


def _answers(url: str, response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield the objects of an answer: many in a stream, or one."""
    if "text/event-stream" in response.headers.get("content-type", ""):
        texts: Iterator[bytes] = events(response.iter_bytes())
    else:
        texts = iter([_read(response, _MAX_ANSWER)])
    for text in texts:
        if text.strip() == b"[DONE]":
            yield _DONE
            return
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise unusable(url, "it sends something that is no JSON") from error
        if not isinstance(value, dict):
            raise unusable(url, "it sends something that is no answer")
        yield value


def _chunks(url: str, answers: Iterator[dict[str, Any]], estimated: int) -> Iterator[Chunk]:
    """Yield the chunks of an answer, the last one with what it cost."""
    began = time.perf_counter()
    first, count, reason = 0.0, 0, None
    usage: dict[str, Any] = {}
    for answer in answers:
        if answer.get("error"):
            raise refused(url, 0, {}, json.dumps(answer).encode(), has_key=True)
        usage = answer.get("usage") or usage
        text, ended = _piece(url, answer)
        reason = reason or ended
        if text:
            first = first or time.perf_counter()
            count += 1
            yield Chunk(text, ())
    if reason is None:
        raise unusable(url, "the answer breaks off")
    ended_at = time.perf_counter()
    first = first or ended_at
    stats = GenerationStats(
        _figure(usage, "prompt_tokens", estimated),
        _figure(usage, "completion_tokens", count),
        first - began,
        ended_at - first,
    )
    yield Chunk("", (), _REASONS.get(reason, "stop"), stats)


def _piece(url: str, answer: dict[str, Any]) -> tuple[str, str | None]:
    """Return the text of one object of an answer, and why the answer ends with it, if it does."""
    choices = answer.get("choices")
    if not choices:  # the usage comes without
        return "", None
    try:
        choice = choices[0]
        said = choice.get("delta") or choice.get("message") or {}
        text, reason = said.get("content") or "", choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise unusable(url, "its answers have another form than OpenAI's") from error
    if not isinstance(text, str) or not isinstance(reason, str | None):
        raise unusable(url, "its answers have another form than OpenAI's")
    return text, reason


def _figure(usage: Any, name: str, otherwise: int) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and value >= 0 else otherwise
