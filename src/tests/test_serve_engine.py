"""The engine without a network: room from the plan, order, fairness, limits, and an end in order."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import AbandonedError, RequestError
from lyra_emergence.generation import GenerationOptions
from lyra_emergence.loading import load
from lyra_emergence.machine import probe_machine
from lyra_emergence.plan import make_plan
from lyra_emergence.server.engine import Asked, Engine
from lyra_emergence.server.room import Room, room_of

from .running import PROMPT, RecordedLock, reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.plan import Plan

    Checkpoints = Callable[[str], Path]

LONG = Asked(PROMPT, GenerationOptions(max_new_tokens=200, stop=("never",)))
SHORT = Asked(PROMPT, GenerationOptions(max_new_tokens=4))


def room(contexts: int, parallel: int, context: int = 256) -> Room:
    return Room(context, contexts, parallel, "a test")


@pytest.fixture
def loaded(checkpoints: Checkpoints) -> Iterator[LoadedModel]:
    model = load(ModelConfig(device_map="cpu", cpu_kernels=False), directory=checkpoints("llama"))
    yield model
    model.close()


class Held:
    """Holds the model's lock, so that what runs waits for its next pass."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._lock = loaded.step_lock

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def outcomes(engine: Engine, asked: Asked) -> tuple[Any, queue.Queue[Any]]:
    told: queue.Queue[Any] = queue.Queue()
    return engine.submit(asked, told.put), told


def whole(told: queue.Queue[Any]) -> list[int]:
    tokens: list[int] = []
    while True:
        outcome = told.get(timeout=60)
        if isinstance(outcome, Exception):
            raise outcome
        tokens += outcome.token_ids
        if outcome.finish_reason is not None:
            return tokens


def until(true: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(6000):
        if true():
            return
        waiting.wait(0.005)
    raise AssertionError


def plan_with(checkpoints: Checkpoints, extra_contexts: float) -> Plan:
    """A plan whose main memory has room for so many contexts beside the one that it counts."""
    machine = probe_machine(with_torch=False)
    plan = make_plan(ModelConfig(device_map="cpu"), read_checkpoint(checkpoints("llama")), machine)
    (use,) = (use for use in plan.devices if use.device == "cpu")
    limit = use.used + int(extra_contexts * use.kv_cache)
    return replace(plan, request=replace(plan.request, cpu=replace(plan.request.cpu, limit=limit)))


@pytest.mark.parametrize(
    ("extra", "contexts", "reason"),
    [(0, 1, "cpu holds no more"), (0.9, 1, "cpu holds no more"), (2, 3, "cpu holds no more"), (9.5, 4, "one for each")],
)
def test_room_is_what_the_plan_leaves(extra: float, contexts: int, reason: str, checkpoints: Checkpoints) -> None:
    found = room_of(plan_with(checkpoints, extra), 4)
    assert (found.context, found.contexts, found.parallel, found.reason) == (256, contexts, 4, reason)
    assert found.tokens == 256 * contexts


def test_a_model_that_fell_has_room_for_one_context(checkpoints: Checkpoints) -> None:
    found = room_of(plan_with(checkpoints, 9), 4, as_planned=False)
    assert str(found) == (
        "4 answers at once, with room for 1 context of 256 tokens: memory ran out while the model was loaded"
    )


def test_answers_are_those_of_the_prompt_alone(loaded: LoadedModel, checkpoints: Checkpoints) -> None:
    engine = Engine(loaded, room(4, 4))
    asked = Asked(PROMPT, GenerationOptions(max_new_tokens=20))
    told = [outcomes(engine, asked)[1] for _ in range(6)]
    assert [whole(each) for each in told] == [reference(checkpoints("llama"), 20)] * 6
    figures = engine.figures()
    assert (figures.running, figures.waiting, figures.reserved) == (0, 0, 0)
    assert figures.ended == {"length": 6}
    assert (figures.prompt_tokens, figures.new_tokens) == (6 * len(PROMPT), 120)
    engine.close()
    assert engine.join(30)


def test_answers_take_turns_pass_by_pass(loaded: LoadedModel, checkpoints: Checkpoints) -> None:
    loaded.step_lock = lock = RecordedLock()
    engine = Engine(loaded, room(3, 3))
    asked = Asked(PROMPT, GenerationOptions(max_new_tokens=30))
    with Held(loaded):
        told = [outcomes(engine, asked)[1] for _ in range(3)]
        until(lambda: len(lock._gates) == 3)
    assert [whole(each) for each in told] == [reference(checkpoints("llama"), 30)] * 3
    assert lock.takers == 4  # and this one
    assert lock.most_overtaken <= 2
    engine.close()
    assert engine.join(30)


def test_what_does_not_fit_waits_and_nobody_overtakes(loaded: LoadedModel) -> None:
    engine = Engine(loaded, room(1, 3))
    with Held(loaded):
        tickets = {}
        for name, asked in (("first", LONG), ("second", LONG), ("third", SHORT)):
            tickets[name] = engine.submit(asked, lambda _: None)
        until(lambda: engine.figures().running == 1)
        figures = engine.figures()
        assert (figures.waiting, figures.reserved) == (2, LONG.tokens)
        assert figures.reserved <= figures.room == 256
    until(lambda: sum(engine.figures().ended.values()) == 3)
    assert sorted(tickets, key=lambda name: tickets[name].began) == ["first", "second", "third"]
    assert tickets["third"].waited >= tickets["second"].waited > 0
    engine.close()
    assert engine.join(30)


def reused(engine: Engine, *requests: Asked) -> list[int]:
    """Tokens that each of the requests, one after the other, took over from the one before."""
    found = []
    for asked in requests:
        last: queue.Queue[Any] = queue.Queue()
        ticket = engine.submit(asked, last.put)
        while (outcome := last.get(timeout=60)).finish_reason is None:
            pass
        found.append(outcome.stats.reused_tokens)
        until(lambda ticket=ticket: ticket not in engine._running)
    return found


def test_the_next_turn_runs_what_is_new(loaded: LoadedModel) -> None:
    engine = Engine(loaded, room(4, 4))
    answer = tuple(reference(Path(loaded.model.config.name_or_path), new_tokens=4))
    longer = Asked((*PROMPT, *answer, *PROMPT), SHORT.options)
    other = Asked(tuple(reversed(PROMPT)), SHORT.options)
    kept = len(PROMPT) + len(answer) - 1  # the last token of an answer was not run
    assert reused(engine, SHORT, longer, other, longer) == [0, kept, 0, 0]
    engine.close()
    assert engine.join(30)
    assert engine._kept.tokens == 0


def test_nothing_is_kept_where_another_answer_runs(loaded: LoadedModel) -> None:
    engine = Engine(loaded, room(4, 4))
    with Held(loaded):
        first, second = (engine.submit(asked, lambda _: None) for asked in (SHORT, LONG))
        until(lambda: engine.figures().running == 2)
    until(lambda: first not in engine._running)
    assert engine._kept.tokens == 0
    engine.stop(second)
    until(lambda: engine.figures().running == 0)
    assert reused(engine, SHORT, SHORT) == [0, len(PROMPT) - 1]
    engine.close()
    assert engine.join(30)


def test_a_full_queue_says_when_to_come_back(loaded: LoadedModel) -> None:
    engine = Engine(loaded, room(1, 1), waiting=1)
    with Held(loaded):
        engine.submit(SHORT, lambda _: None)
        until(lambda: engine.figures().running == 1)
        engine.submit(SHORT, lambda _: None)
        with pytest.raises(RequestError, match=r"^1 requests wait already, and that is the limit$") as caught:
            engine.submit(SHORT, lambda _: None)
        assert (caught.value.status, caught.value.code, caught.value.retry_after) == (429, "queue_full", 1)
    until(lambda: engine.figures().running == 0 and engine.figures().waiting == 0)
    assert engine.figures().ended == {"length": 2, "refused": 1}
    engine.close()
    assert engine.join(30)


def test_stopped_answers_end_before_their_next_pass(loaded: LoadedModel) -> None:
    engine = Engine(loaded, room(1, 1))
    with Held(loaded):
        running, told = outcomes(engine, LONG)
        until(lambda: engine.figures().running == 1)
        waiting, told_waiting = outcomes(engine, LONG)
        engine.stop(waiting)
        assert isinstance(told_waiting.get(timeout=5), AbandonedError)
        engine.stop(running)
        engine.stop(running)
    with pytest.raises(AbandonedError):
        whole(told)
    assert engine.figures().ended == {"stopped": 2}
    # One pass may have been under way.
    assert engine.figures().new_tokens <= 1
    _, told = outcomes(engine, SHORT)
    assert len(whole(told)) == 4
    engine.close()
    assert engine.join(30)


def test_a_closed_engine_ends_what_it_has(loaded: LoadedModel) -> None:
    engine = Engine(loaded, room(1, 1))
    told = [outcomes(engine, SHORT)[1] for _ in range(3)]
    engine.close()
    with pytest.raises(RequestError, match=r"^the server is shutting down$") as caught:
        engine.submit(SHORT, lambda _: None)
    assert caught.value.status == 503
    assert [len(whole(each)) for each in told] == [4, 4, 4]
    assert engine.join(30)


def test_a_cut_engine_drops_what_it_has(loaded: LoadedModel) -> None:
    engine = Engine(loaded, room(1, 1))
    with Held(loaded):
        told = [outcomes(engine, LONG)[1] for _ in range(3)]
        until(lambda: engine.figures().running == 1)
        engine.cut()
    for each in told:
        with pytest.raises(AbandonedError):
            whole(each)
    assert engine.join(30)


def test_an_answer_that_fails_takes_no_other_along(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(loaded, room(1, 1))
    real, left = loaded.model.forward, [1]

    def failing(*args: Any, **kwargs: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise IndexError("out of range")
        return real(*args, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", failing)
    _, bad = outcomes(engine, SHORT)
    _, good = outcomes(engine, SHORT)
    with pytest.raises(IndexError, match="out of range"):
        whole(bad)
    assert len(whole(good)) == 4
    assert engine.figures().ended == {"failed": 1, "length": 1}
    assert [record.getMessage() for record in caplog.records] == ["an answer failed"]
    engine.close()
    assert engine.join(30)
