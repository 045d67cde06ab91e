"""The labelled journal of benchmarks/journal_search.py, and its figures by hand."""

from __future__ import annotations

import pytest

from benchmarks.journal_search import figures
from benchmarks.journal_set.make import Question, make_set


def test_the_set_is_large_enough_labelled_and_the_same_each_time() -> None:
    journal, questions = make_set()
    assert len(journal.entries) == 2112
    assert len(questions) == len({question.text for question in questions}) == 192
    ids = {entry.id for entry in journal.entries}
    assert len(ids) == 2112
    assert all(question.answers <= ids and 1 <= len(question.answers) <= 2 for question in questions)
    assert sum(question.held_out for question in questions) == 96
    kinds = ("plain", "half", "paraphrased", "dated")
    assert [sum(question.kind == kind for question in questions) for kind in kinds] == [48] * 4
    # A family is in one half only.
    families = [
        {name.partition("-")[0] for q in questions if q.held_out == half for name in q.answers}
        for half in (False, True)
    ]
    assert families[0].isdisjoint(families[1])
    assert make_set()[1] == questions


def test_figures_by_hand() -> None:
    questions = [
        Question("", frozenset("ab"), "plain", held_out=False),
        Question("", frozenset("c"), "plain", held_out=False),
    ]
    found = figures([["x", "a", "y", "z", "w", "b"], []], questions)
    # a at 2 and b at 6, of which only a is among the first five; nothing for c.
    assert found.recall == pytest.approx((0.5 + 0) / 2)
    assert found.mrr == pytest.approx((1 / 2 + 0) / 2)
    # 1/log2(3) + 1/log2(7) over 1 + 1/log2(3)
    assert found.ndcg == pytest.approx((0.6309298 + 0.3562072) / (1 + 0.6309298) / 2, abs=1e-6)
