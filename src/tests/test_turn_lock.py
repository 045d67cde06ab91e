"""A lock that goes around: order, a waiter that is interrupted, and answers that share a model token by token."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import AbandonedError
from lyra_emergence.generation import GenerationOptions, stream_generate
from lyra_emergence.loading import load
from lyra_emergence.turn_lock import TurnLock

from .running import PROMPT, RecordedLock, greedy, reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Checkpoints = Callable[[str], Path]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_waiters_get_it_in_the_order_they_came() -> None:
    lock, order = TurnLock(), []
    threads = []
    with lock:
        for number in range(8):

            def take(number: int = number) -> None:
                with lock:
                    order.append(number)

            threads.append(threading.Thread(target=take))
            threads[-1].start()
            until(lambda number=number: len(lock._gates) == number + 1)
    for thread in threads:
        thread.join()
    assert order == list(range(8))
    assert not lock.locked()


def test_it_is_not_released_twice() -> None:
    lock = TurnLock()
    with lock:
        assert lock.locked()
    with pytest.raises(RuntimeError, match=r"^release of a lock that nobody holds$"):
        lock.release()


def test_a_waiter_that_is_interrupted_leaves_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        """A gate that a Ctrl-C reaches while it is waited for."""

        def __init__(self) -> None:
            self.calls = 0

        def acquire(self) -> None:
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt

    lock = TurnLock()
    lock.acquire()
    monkeypatch.setattr("lyra_emergence.turn_lock.threading.Lock", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        lock.acquire()
    monkeypatch.undo()
    assert not lock._gates
    lock.release()
    assert not lock.locked()


def test_answers_of_one_model_take_turns_pass_by_pass(checkpoints: Checkpoints) -> None:
    directory = checkpoints("llama")
    loaded = load(ModelConfig(device_map="cpu", cpu_kernels=False), directory=directory)
    lock = RecordedLock()
    loaded.step_lock = lock
    found: list[list[int]] = []
    start = threading.Barrier(4)

    def answer() -> None:
        start.wait()
        found.append(greedy(loaded, 24))

    threads = [threading.Thread(target=answer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [reference(directory, 24)] * 4
    assert lock.takers == 4
    assert lock.most_overtaken <= 2
    loaded.close()


def test_an_abandoned_answer_stops_before_the_next_pass(checkpoints: Checkpoints) -> None:
    loaded = load(ModelConfig(device_map="cpu"), directory=checkpoints("llama"))
    gone = threading.Event()
    stream = stream_generate(loaded, PROMPT, GenerationOptions(max_new_tokens=50), abandoned=gone.is_set)
    next(stream)
    next(stream)
    gone.set()
    with pytest.raises(AbandonedError, match=r"^nobody waits for this answer any more$"):
        next(stream)
    assert greedy(loaded) == reference(checkpoints("llama"))
    loaded.close()


def test_an_abandoned_prompt_stops_between_its_chunks(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(ModelConfig(device_map="cpu"), directory=checkpoints("llama"))
    loaded.plan = replace(loaded.plan, footprint=replace(loaded.plan.footprint, chunk=16))
    passes: list[int] = []
    real = loaded.model.forward

    def counted(*args: object, **kwargs: object) -> object:
        passes.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", counted)
    stream = stream_generate(loaded, (PROMPT * 40)[:200], abandoned=lambda: len(passes) >= 3)
    with pytest.raises(AbandonedError):
        next(stream)
    assert len(passes) == 3
    loaded.close()
