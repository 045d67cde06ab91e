"""Doing things at once with as many threads as can be had."""

from __future__ import annotations

import _thread
import threading
from typing import TYPE_CHECKING, Any

import pytest

from lyra_emergence.runtime.side_by_side import side_by_side

if TYPE_CHECKING:
    from collections.abc import Callable


def test_results_come_in_the_order_of_the_arguments() -> None:
    met = threading.Barrier(3, timeout=30)

    def double(number: int) -> int:
        if number < 3:
            met.wait()  # three calls run at once, or this raises
        return 2 * number

    assert side_by_side(double, range(20), 3) == [2 * number for number in range(20)]
    assert side_by_side(double, [], 3) == []
    assert side_by_side(double, [7], 3) == [14]


def test_the_first_error_is_raised_once_nothing_runs() -> None:
    running: list[int] = []

    def work(number: int) -> None:
        running.append(number)
        try:
            if number == 2:
                raise ValueError("two")
        finally:
            running.remove(number)

    with pytest.raises(ValueError, match="two"):
        side_by_side(work, range(1000), 4)
    assert running == []


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()], ids=["limit", "memory"])
def test_without_threads_the_caller_does_it_all(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise error

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    callers = side_by_side(lambda _: threading.get_ident(), range(5), 4)
    assert callers == [threading.get_ident()] * 5


def test_a_thread_that_dies_before_its_first_step_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def stillborn(_work: Callable[[], None], _arguments: tuple[()]) -> int:
        return 1  # what a thread does whose first frame finds no memory: nothing

    monkeypatch.setattr(_thread, "start_new_thread", stillborn)
    assert side_by_side(str, range(5), 4) == ["0", "1", "2", "3", "4"]
