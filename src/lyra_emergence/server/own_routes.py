"""Lyra's own routes beside OpenAI's: the page, its questions over the journal, and where the model is."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, Final

from fastapi import Query
from starlette.responses import Response

from lyra_emergence.server.conversing import QuestionBody, answer_events
from lyra_emergence.server.events import Answer
from lyra_emergence.server.page import Page
from lyra_emergence.server.streams import STREAM_CONTENT, EventStream
from lyra_emergence.server.watch import Picture

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lyra_emergence.server.conversing import Conversing
    from lyra_emergence.server.engine import Engine
    from lyra_emergence.server.watch import Watch

__all__ = ["add_own_routes"]

_LONGEST: Final = 86_400
_SECONDS: Final = Query(ge=0, le=_LONGEST, description="ends the stream after so many seconds")


def add_own_routes(
    app: FastAPI, conversing: Conversing, watch: Watch, engine: Engine, errors: dict[int | str, dict[str, Any]]
) -> None:
    """Add them to an application.

    Args:
        app: The application.
        conversing: Reads questions.
        watch: Knows where the model is.
        engine: Runs answers.
        errors: How /openapi.json describes refusals.
    """
    stream: dict[str, Any] = {"response_class": Response, "responses": {200: {"content": STREAM_CONTENT}, **errors}}
    page = Page()

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return page.response()

    @app.post("/lyra/chat", **stream)
    async def chat(body: QuestionBody) -> Response:
        """Answer a question over the journal, as a stream of events."""
        question = await asyncio.to_thread(conversing.read, body)
        answer = Answer(engine, question.asked)
        return EventStream(answer_events(question, answer, engine), answer.stop)

    @app.get("/lyra/placement", response_model=Picture, responses=errors)
    async def placement() -> Any:
        """Say where each block of the model is now, and how full that makes each device."""
        return await asyncio.to_thread(watch.picture)

    @app.get("/lyra/events", **stream)
    async def events(seconds: Annotated[float | None, _SECONDS] = None) -> Response:
        """Tell as a stream of events where the model is, what happens to its memory, and how fast tokens come."""
        mailbox = watch.join()
        return EventStream(watch.events(mailbox, seconds), lambda: watch.leave(mailbox))
