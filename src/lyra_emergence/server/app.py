"""The application: OpenAI's routes (chat completions, completions, models), health, metrics, and Lyra's own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from lyra_emergence.chat import DEFAULT_PASSAGES
from lyra_emergence.errors import LyraError, RequestError
from lyra_emergence.server.asking import Asking
from lyra_emergence.server.bodies import ChatBody, CompletionBody, known_fields
from lyra_emergence.server.conversing import Conversing
from lyra_emergence.server.events import Answer
from lyra_emergence.server.guard import Guard, Limits
from lyra_emergence.server.metrics import CONTENT_TYPE, Metrics
from lyra_emergence.server.own_routes import add_own_routes
from lyra_emergence.server.refusals import ErrorBody, error_body, invalid, refusal
from lyra_emergence.server.replies import DONE, ChatReply, CompletionReply, as_event, listed_model
from lyra_emergence.server.streams import STREAM_CONTENT, EventStream
from lyra_emergence.server.watch import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from fastapi.telemetry import TelemetryConfig
    from starlette.types import ASGIApp

    from lyra_emergence.chunks import Chunk
    from lyra_emergence.journal import JournalIndex
    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.server.engine import Asked, Engine
    from lyra_emergence.server.replies import Reply

__all__ = ["make_app"]

_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused"},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer"},
}
_KNOWN_FIELDS: Final = {
    "/v1/chat/completions": known_fields(ChatBody),
    "/v1/completions": known_fields(CompletionBody),
}
# A variable of the environment could have FastAPI send what is in refused requests elsewhere.
_SILENT: Final[TelemetryConfig] = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


def make_app(
    loaded: LoadedModel,
    engine: Engine,
    limits: Limits,
    *,
    name: str,
    journal: JournalIndex | None = None,
    passages: int = DEFAULT_PASSAGES,
) -> ASGIApp:
    """Return the server as an ASGI application.

    Args:
        loaded: The model.
        engine: What runs its answers.
        limits: Who may ask, and how much.
        name: What clients call the model.
        journal: What the page's questions are answered from; None for answers without.
        passages: Journal passages for each of them, at most.
    """
    statuses: Counter[int] = Counter()
    # No pages of documentation: they would load their scripts from elsewhere.
    app = FastAPI(title="Lyra", docs_url=None, redoc_url=None, version="1", telemetry=_SILENT)
    _add_errors(app)
    asking = Asking(loaded, name)
    _add_answers(app, asking, engine)
    _add_listings(app, name, loaded.context_length, engine, Metrics(engine, statuses))
    conversing = Conversing(loaded, asking, journal, passages)
    add_own_routes(app, conversing, Watch(loaded, engine, name, conversing.journal), engine, _ERRORS)
    return Guard(app, limits, statuses)


def _add_errors(app: FastAPI) -> None:
    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        known = _KNOWN_FIELDS.get(request.url.path, frozenset())
        return refusal(invalid(error.errors(), known))

    async def on_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = RequestError(str(error.detail), status=error.status_code, code="not_found_or_allowed")
        response = refusal(told)
        response.headers.update(error.headers or {})
        return response

    async def on_ours(_: Request, error: Exception) -> Response:
        return refusal(error)

    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(LyraError, on_ours)
    app.add_exception_handler(Exception, on_ours)


def _add_answers(app: FastAPI, asking: Asking, engine: Engine) -> None:
    def extra(model: type[Any]) -> dict[str, Any]:
        return {"response_model": model, "responses": {200: {"content": STREAM_CONTENT}, **_ERRORS}}

    @app.post("/v1/chat/completions", **extra(ChatCompletion))
    async def chat_completions(request: Request, body: ChatBody) -> Response:  # type: ignore[valid-type]
        """Answer a conversation."""
        return await _answer(request, body, asking.chat, engine, ChatReply(asking.name))

    @app.post("/v1/completions", **extra(Completion))
    async def completions(request: Request, body: CompletionBody) -> Response:  # type: ignore[valid-type]
        """Continue a text."""
        return await _answer(request, body, asking.completion, engine, CompletionReply(asking.name))


def _add_listings(app: FastAPI, name: str, context: int, engine: Engine, metrics: Metrics) -> None:
    model = listed_model(name, int(time.time()), context)

    @app.get("/v1/models", responses=_ERRORS)
    async def models() -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model_id:path}", response_model=Model, responses=_ERRORS)
    async def one_model(model_id: str) -> Response:
        """Describe the model."""
        if model_id != name:
            raise RequestError(
                f"the model '{model_id[:200]}' does not exist here",
                status=404,
                code="model_not_found",
                hint=f"this server has '{name}' alone",
            )
        return JSONResponse(model)

    @app.get("/health", responses=_ERRORS)
    async def health() -> dict[str, Any]:
        """Say that the model is loaded, and how much it has to do."""
        figures = engine.figures()
        return {"status": "ok", "running": figures.running, "waiting": figures.waiting}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **_ERRORS})
    async def show_metrics() -> Response:
        """Show the figures in Prometheus' form."""
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def _answer(request: Request, body: Any, read: Callable[[Any], Asked], engine: Engine, reply: Reply) -> Response:
    asked = await asyncio.to_thread(read, body)  # a long prompt takes its time to be tokenized
    answer = Answer(engine, asked)
    try:
        if not body.stream:
            return await _whole(request, answer, reply)
        # Until there is a first token, a failure can still be told by its status.
        async with _watched(request, answer):
            first = await answer.next()
    except BaseException:
        answer.stop()
        raise
    wants_usage = bool((body.stream_options or {}).get("include_usage"))
    return EventStream(_pieces(answer, first, reply, wants_usage=wants_usage), answer.stop)


async def _whole(request: Request, answer: Answer, reply: Reply) -> Response:
    text = ""
    async with _watched(request, answer):
        while True:
            chunk = await answer.next()
            text += chunk.text
            if chunk.finish_reason is not None:
                assert chunk.stats is not None
                made = reply.whole(text, chunk.finish_reason, chunk.stats, answer.ticket.waited)
                return JSONResponse(made.model_dump(mode="json", warnings=False))


@contextlib.asynccontextmanager
async def _watched(request: Request, answer: Answer) -> AsyncIterator[None]:
    """Stop the answer when its client leaves."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        answer.stop()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


async def _pieces(answer: Answer, first: Chunk, reply: Reply, *, wants_usage: bool) -> AsyncIterator[bytes]:
    opening = reply.opening()
    if opening is not None:
        yield as_event(opening)
    chunk = first
    try:
        while True:
            if chunk.text:
                yield as_event(reply.piece(chunk.text))
            if chunk.finish_reason is not None:
                break
            chunk = await answer.next()
    except Exception as error:  # noqa: BLE001 - the status is sent already, and what is not ours the engine has logged
        yield as_event(error_body(error))
        return
    assert chunk.stats is not None
    yield as_event(reply.ending(chunk.finish_reason, chunk.stats, answer.ticket.waited))
    if wants_usage:
        yield as_event(reply.usage(chunk.stats))
    yield DONE
