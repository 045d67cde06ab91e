"""How fast a journal of 100,000 entries is searched and added to.

    uv run python -m benchmarks.journal_index                  # 100,000 entries
    uv run python -m benchmarks.journal_index --entries 2000   # does it run at all?

The entries are made up: words drawn from 20,000 by Zipf's law, 80 to an entry. Their vectors are random unit vectors,
since embedding them would take an hour; the questions' vectors are the model's own, and their time is part of a search.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from lyra_emergence.journal import JournalEntry, JournalIndex
from lyra_emergence.journal.embeddings import EmbeddingModel, find_embedding_files
from lyra_emergence.journal.splitting import PLAIN
from lyra_emergence.journal.store import Store
from lyra_emergence.journal.vectors import pack
from lyra_emergence.journal.writing import add_entry, entry_as_data, new_entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

VOCABULARY, WORDS, SEED = 20_000, 80, 1
FIRST = datetime(2005, 1, 1)  # noqa: DTZ001  # a diary has no offsets
QUESTIONS = {
    "three words, rare to common": "w00001 w00300 w05000",
    "one rare word": "w10000",
    "six words of every tenth entry": "w00020 w00030 w00040 w00050 w00060 w00070",
    "four words of every other entry": "w00000 w00001 w00002 w00003",
    "a month": "w00200 w00400 in March 2015",
}


@dataclass(frozen=True, slots=True)
class Took:
    """How long a step took.

    Attributes:
        seconds: By the clock.
        on_cpu: Of this process on the CPU, which other programs beside it do not lengthen much.
    """

    seconds: float
    on_cpu: float


def main() -> None:
    """Build the index, time it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    files, reason = find_embedding_files()
    if files is None:
        sys.exit(f"nothing to measure: {reason}")
    with tempfile.TemporaryDirectory(prefix="lyra-journal-") as folder:
        print("| step | median | on the CPU |\n|---|---|---|")
        for name, took in steps(Path(folder), EmbeddingModel(files), arguments.entries, arguments.rounds):
            print(f"| {name} | {_shown(took.seconds)} | {_shown(took.on_cpu)} |", flush=True)


def steps(folder: Path, model: EmbeddingModel, count: int, rounds: int) -> Iterator[tuple[str, Took]]:
    """Yield what was timed, and how long it took."""
    made = list(entries(count))
    place = folder / "index.sqlite3"
    store = Store(place)
    yield f"index the words of {count:,} entries", _timed(lambda: store.sync(made, PLAIN))
    yield "write their vectors", _timed(lambda: put_vectors(store, model.files.identity))
    yield "see that none of them changed", _timed(lambda: store.sync(made, PLAIN))
    store.close()
    model.sentences(["warm"])
    index = JournalIndex(store=Store(place), path=folder, embedding=model)
    yield "embed a question", _median(lambda: model.sentences(["w00001 w00300"]), rounds)
    yield "the first search of a process", _timed(lambda: index.find("w00001 w00300"))
    for name, question in QUESTIONS.items():
        yield f"search: {name}", _median(lambda question=question: index.find(question), rounds)
    yield "search: since a day", _median(lambda: index.find("w00200", since=FIRST.date() + timedelta(days=900)), rounds)
    yield "search: with a tag", _median(lambda: index.find("w00200", tags=["t3"]), rounds)
    fresh = (JournalEntry(f"new-{number}", FIRST, "w00001 w00300 " * 40) for number in range(10_000))
    yield "add an entry to the index", _median(lambda: index.add(next(fresh)), rounds)
    yield "embed it", _median(lambda: model.sentences(["w00001 w00300 " * 40]), rounds)
    index.embed()
    yield "search after adding", _timed(lambda: (index.add(next(fresh)), index.find("w00300")))
    yield from files(folder, made, rounds)


def files(folder: Path, made: list[JournalEntry], rounds: int) -> Iterator[tuple[str, Took]]:
    """Yield how long adding to the journal's own file takes."""
    lines = folder / "journal.jsonl"
    lines.write_text("".join(json.dumps(entry_as_data(entry)) + "\n" for entry in made))
    numbers = iter(range(10_000))
    size = lines.stat().st_size / 1e6
    yield (
        f"add to the JSON lines themselves, {size:.0f} MB",
        _median(lambda: add_entry(lines, new_entry(f"Rain {next(numbers)}.", FIRST)), rounds),
    )
    yield (
        "add to a folder of Markdown files",
        _median(lambda: add_entry(folder / "notes", new_entry(f"Rain {next(numbers)}.", FIRST)), rounds),
    )


def entries(count: int) -> Iterator[JournalEntry]:
    """Yield made-up entries, ninety minutes apart."""
    likely = 1 / (np.arange(VOCABULARY) + 10)
    drawn = np.random.default_rng(SEED).choice(VOCABULARY, size=(count, WORDS), p=likely / likely.sum())
    for number, row in enumerate(drawn):
        words = [f"w{word:05}" for word in row]
        moment = FIRST + timedelta(minutes=90 * number)
        yield JournalEntry(str(number), moment, " ".join(words) + ".", f"{words[3]} {words[5]}", (f"t{number % 40}",))


def put_vectors(store: Store, model: str) -> None:
    """Give every passage a random unit vector."""
    chance = np.random.default_rng(SEED)
    store.use_model(model)
    while waiting := store.rows("SELECT passage FROM pending LIMIT 5000"):
        vectors = chance.standard_normal((len(waiting), 384)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        store.put_vectors(model, ((row, *packed) for (row,), packed in zip(waiting, pack(vectors), strict=True)))


def _timed(step: Callable[[], object]) -> Took:
    start, on_cpu = time.perf_counter(), time.process_time()
    step()
    return Took(time.perf_counter() - start, time.process_time() - on_cpu)


def _median(step: Callable[[], object], rounds: int) -> Took:
    step()
    taken = [_timed(step) for _ in range(rounds)]
    return Took(statistics.median(one.seconds for one in taken), statistics.median(one.on_cpu for one in taken))


def _shown(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


if __name__ == "__main__":
    main()
