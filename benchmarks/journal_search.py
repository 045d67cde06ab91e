"""How well a journal's search finds entries: by words, by vectors, fused, reranked.

    uv run python -m benchmarks.journal_search            # the table
    uv run python -m benchmarks.journal_search --failures # and the questions whose answer is not among the first five

The journal has 2,112 entries, 88 near-duplicates of each of 24 kinds, and 192 questions (`journal_set`). Half of the
kinds are held out: docs/journal.md says what was tuned on the others. Each step is the program's own.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from benchmarks.journal_set.make import Question, make_set
from lyra_emergence.journal import JournalIndex, search
from lyra_emergence.journal.embeddings import EmbeddingModel, find_embedding_files
from lyra_emergence.journal.filters import Filter
from lyra_emergence.journal.periods import anchor_for, read_question
from lyra_emergence.journal.rerank import find_reranker

Ranking: TypeAlias = Callable[[str], list[str]]
_CUT = 5
_DEPTH = 10


@dataclass(frozen=True, slots=True)
class Figures:
    """How good a ranking is, each 0 to 1 and averaged over questions.

    Attributes:
        recall: Share of the answers among the first five.
        mrr: One over the rank of the first answer, 0 beyond the tenth.
        ndcg: Discounted gain of the first ten over the best there can be.
    """

    recall: float
    mrr: float
    ndcg: float


def main() -> None:
    """Make the index, ask every question by every step, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--failures", action="store_true", help="list what the last step does not find")
    arguments = parser.parse_args()
    journal, questions = make_set()
    files, reason = find_embedding_files()
    if files is None:
        sys.exit(f"nothing to compare: {reason}")
    embedding = EmbeddingModel(files)
    reranker, line = find_reranker(None, embedding)
    index = JournalIndex(journal, embedding=embedding)
    start = time.perf_counter()
    index.embed()
    print(f"{len(journal.entries)} entries embedded in {time.perf_counter() - start:.0f} s with {files.name}; {line}\n")
    steps = steps_of(index) | {
        "reranked": found_by(JournalIndex(journal, embedding=embedding, store=index.store, reranker=reranker))
    }
    ranked = {name: timed(name, step, questions) for name, step in steps.items()}
    print_tables(ranked, questions)
    if arguments.failures:
        print_failures(ranked["reranked"], questions)


def steps_of(index: JournalIndex) -> dict[str, Ranking]:
    """Return the rankings before the reranker, by name."""
    retrieval = index._retrieval  # noqa: SLF001  # the steps that a search is made of

    def owners(rows: list[tuple[int, float]]) -> list[str]:
        found = dict(index.store.rows("SELECT p.number, e.id FROM passages p JOIN entries e ON e.number = p.entry"))
        return list(dict.fromkeys(found[row] for row, _ in rows))

    def single(question: str, *, words: bool) -> list[str]:
        asked = read_question(question, anchor_for(index._newest(), index._today()), index._has_entries)  # noqa: SLF001
        meant = retrieval.meant(asked, Filter())
        if words:
            found = retrieval.by_words(search.terms(asked.text), Filter(), meant)
            return owners(retrieval.ordered({row: one.score for row, one in found.items()}))
        return owners(retrieval.ordered(retrieval.by_meaning(asked.topic, Filter(), meant)))

    return {
        "words": lambda question: single(question, words=True),
        "vectors": lambda question: single(question, words=False),
        "fused": found_by(index),
    }


def found_by(index: JournalIndex) -> Ranking:
    """Return the ranking of a whole search."""
    return lambda question: [hit.entry.id for hit in index.find(question, _DEPTH).hits]


def timed(name: str, step: Ranking, questions: tuple[Question, ...]) -> list[list[str]]:
    """Return the rankings of all questions, and print how long one took."""
    start = time.perf_counter()
    ranked = [step(question.text) for question in questions]
    print(f"{name}: {(time.perf_counter() - start) / len(questions) * 1000:.0f} ms a question", flush=True)
    return ranked


def figures(ranked: list[list[str]], questions: list[Question]) -> Figures:
    """Return the figures of the rankings of `questions`."""
    each = [_figures_of(row, question.answers) for row, question in zip(ranked, questions, strict=True)]
    recalls, mrrs, ndcgs = zip(*each, strict=True)
    return Figures(*(sum(values) / len(values) for values in (recalls, mrrs, ndcgs)))


def _figures_of(row: list[str], answers: frozenset[str]) -> tuple[float, float, float]:
    places = [place for place, name in enumerate(row[:_DEPTH], start=1) if name in answers]
    gain = sum(1 / math.log2(place + 1) for place in places)
    best = sum(1 / math.log2(place + 1) for place in range(1, len(answers) + 1))
    recall = sum(place <= _CUT for place in places) / len(answers)
    return recall, 1 / places[0] if places else 0.0, gain / best


def print_tables(ranked: dict[str, list[list[str]]], questions: tuple[Question, ...]) -> None:
    """Print the figures of each half, and recall by the kind of question."""
    for title, held_out in (("the half that was looked at", False), ("held out", True)):
        kept = [place for place, question in enumerate(questions) if question.held_out == held_out]
        print(f"\n| {title}, {len(kept)} questions | recall@5 | MRR | nDCG@10 |\n|---|---|---|---|")
        for name, rows in ranked.items():
            of = figures([rows[place] for place in kept], [questions[place] for place in kept])
            print(f"| {name} | {of.recall:.3f} | {of.mrr:.3f} | {of.ndcg:.3f} |")
    kinds = list(dict.fromkeys(question.kind for question in questions))
    print(f"\n| recall@5, all | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
    for name, rows in ranked.items():
        cells = []
        for kind in kinds:
            kept = [place for place, question in enumerate(questions) if question.kind == kind]
            of = figures([rows[place] for place in kept], [questions[place] for place in kept])
            cells.append(f"{of.recall:.3f}")
        print(f"| {name} | {' | '.join(cells)} |")


def print_failures(ranked: list[list[str]], questions: tuple[Question, ...]) -> None:
    """Print the questions of the half that was looked at whose answers are not among the first five."""
    print()
    for row, question in zip(ranked, questions, strict=True):
        if not question.held_out and question.answers.isdisjoint(row[:_CUT]):
            print(f"{question.kind}: {question.text}  {sorted(question.answers)}  {row[:_CUT]}")


if __name__ == "__main__":
    main()
