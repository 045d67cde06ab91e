"""The server against its own description: schemathesis makes requests from /openapi.json, good and bad ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import schemathesis

from lyra_emergence.config import ModelConfig
from lyra_emergence.loading import load
from lyra_emergence.server.engine import Engine
from lyra_emergence.server.guard import Limits
from lyra_emergence.server.room import Room

from .serving import served

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

OPERATIONS = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "GET /v1/models",
    "GET /v1/models/{model_id}",
    "GET /health",
    "GET /metrics",
    "POST /lyra/chat",
    "GET /lyra/placement",
    "GET /lyra/events",
)
KNOWN: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 2,
        "max_completion_tokens": 2,
    },
    "/v1/completions": {"model": "tiny", "prompt": "Hi", "max_tokens": 2},
    "/lyra/chat": {"question": "Hi", "turns": [], "max_tokens": 2},
}
SETTINGS = hypothesis.settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.fixture(scope="module")
def described(checkpoints: Callable[[str], Path]) -> Iterator[Any]:
    loaded = load(ModelConfig(device_map="cpu", cpu_kernels=False), directory=checkpoints("llama"))
    engine = Engine(loaded, Room(loaded.context_length, 2, 2, "a test"))
    with served(loaded, engine, Limits()) as url:
        yield schemathesis.openapi.from_url(f"{url.removesuffix('/v1')}/openapi.json")
    assert engine.join(30)
    loaded.close()


def lasts(seconds: object) -> bool:
    """Whether a stream that is asked for with this would go on for a while, or without end."""
    if not isinstance(seconds, str | float | int):
        return True  # an empty list is nothing in an address
    try:
        return 0 < float(seconds) <= 86_400
    except ValueError:
        return False


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_server_does_as_it_describes(operation: str, mode: schemathesis.GenerationMode, described: Any) -> None:
    method, path = operation.split()
    seen: list[int] = []

    def ask(case: Any) -> None:
        if mode.is_positive and isinstance(case.body, dict):
            # What the schema cannot tell: the model's name, the context, that messages of tools are refused.
            case.body |= KNOWN[path]
        if path == "/lyra/events" and lasts(case.query.get("seconds")):
            case.query = {**case.query, "seconds": 0}
        seen.append(case.call_and_validate().status_code)

    strategy = described[path][method].as_strategy(generation_mode=mode)
    try:
        SETTINGS(hypothesis.given(strategy)(ask))()
    except hypothesis.errors.Unsatisfiable:
        assert not mode.is_positive  # nothing about it can be wrong
        return
    assert seen
    assert max(seen) < 500
    if mode.is_positive and "{" not in path:
        assert 200 in seen


def test_all_of_it_is_looked_at(described: Any) -> None:
    assert sorted(found.ok().label for found in described.get_all_operations()) == sorted(OPERATIONS)
