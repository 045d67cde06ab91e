"""Loads, answers, fails and unloads over and over in one process, and checks that nothing grows.

    uv run python -m benchmarks.soak                  # two minutes
    uv run python -m benchmarks.soak --minutes 60     # an hour
    uv run python -m benchmarks.soak --json soak.json # with every sample

One cycle, on the simulated accelerator: a tiny checkpoint of the next family is loaded in the next placement, sometimes
while an allocation is refused, and answers greedily, by sampling and in a chat over a journal. Half of the answers have
a random allocation refused, once or from there on; some are closed before their end; a second journal is opened and
closed; every third cycle meets a checkpoint that is cut off. Answers must be those of an undisturbed run, token for
token. Then the model is closed.

After each cycle a sample is taken: bytes on the devices, pinned bytes, threads, file handles, maps of checkpoint files,
private memory (`RssAnon`, after glibc gave back what it holds), and objects that Python's collector knows.

The rule: samples of the second half count, since caches fill up in the first. Bytes on devices, threads, handles and
maps may never be more than in the first sample of that half. Private memory and objects vary, so their growth is the
slope of Theil and Sen (the median of the slopes between all pairs of samples; P. K. Sen, "Estimates of the Regression
Coefficient Based on Kendall's Tau", 1968), times the cycles of that half, and has a bound: `ALLOWED`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lyra_emergence.journal import JournalIndex
    from lyra_emergence.loading import LoadedModel
    from tests.simulated_accelerator import SimulatedAccelerator

FAMILIES = ("llama", "mixtral", "gpt2", "gemma3")
PLACES: dict[str, tuple[Any, ...]] = {"full": (0, 0, 0), "split": (0, 0, "cpu"), "two": (0, 0, 1), "cpu": ("cpu",) * 3}
"""Devices of the embeddings, of the first two layers, and of the rest."""
NEW_TOKENS = 12
ALLOWED = {"private": (2 * 2**20, 8 * 2**10), "objects": (300, 0.05)}
"""What may be gained over the second half, and what each of its cycles may gain; the greater of both counts.

2 MiB is what a heap's fragments move by, and less than two of the smallest models here. 8 KiB is three times what
safetensors 0.8 leaves behind: 60 bytes for each tensor read, about 2.4 kB a load. One lost KV cache would be more.
"""
_LONGEST_END = 2.0
"""Seconds that a thread which has ended its work may still be listed."""
_FEWEST = 8
"""Cycles that a rule about halves can say something of."""
_MOST_SAMPLES = 400
"""Samples that slopes are taken between, spread over the half: all pairs of an hour's would be millions."""
_JOURNAL = [
    {
        "id": str(day),
        "timestamp": f"2025-03-{day:02}",
        "text": f"On day {day} the river was high and I walked along it.",
    }
    for day in range(1, 20)
]


@dataclass(frozen=True, slots=True)
class Sample:
    """What the process holds between two cycles: bytes, and counts."""

    device: int
    pinned: int
    threads: int
    handles: int
    maps: int
    private: int
    objects: int


def main() -> int:
    """Run the loop, print what was held, and return 1 where something grew or an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="how long to go on")
    parser.add_argument("--family", action="append", help="of tests/families.py; repeatable; four by default")
    parser.add_argument("--seed", type=int, default=0, help="of what fails when")
    parser.add_argument("--builds", type=Path, help="folder of the compiled accelerator; the user's cache by default")
    parser.add_argument("--json", type=Path, help="where to write every sample")
    arguments = parser.parse_args()

    from transformers.utils import logging

    from tests import simulated_accelerator

    logging.disable_progress_bar()
    library = simulated_accelerator.load(arguments.builds)
    with tempfile.TemporaryDirectory() as folder, library.lent() as sim:
        soak = Soak(sim, Path(folder), arguments.family or FAMILIES, random.Random(arguments.seed))
        samples = soak.run(arguments.minutes * 60)
    findings = [*soak.findings, *growth(samples)]
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(sample) for sample in samples]) + "\n", encoding="utf-8")
    print_summary(samples, soak.counts)
    for finding in findings:
        print(f"WRONG: {finding}")
    return 1 if findings else 0


class Soak:
    """The loop.

    Args:
        sim: The simulated accelerator, lent.
        folder: Where checkpoints and the journal are made.
        names: Families of checkpoints.
        chance: Decides what fails when.

    Attributes:
        counts: What was done, and how often.
        findings: Answers that were wrong and errors that had no place.
    """

    def __init__(self, sim: SimulatedAccelerator, folder: Path, names: Sequence[str], chance: random.Random) -> None:
        from tests import families

        self.counts: Counter[str] = Counter()
        self.findings: list[str] = []
        self._sim = sim
        self._chance = chance
        self._journal = folder / "journal.json"
        self._journal.write_text(json.dumps(_JOURNAL), encoding="utf-8")
        self._directories = {name: families.build_checkpoint(name, folder / name) for name in names}
        self._broken = _cut_off(self._directories[names[0]], folder / "broken")
        self._expected: dict[tuple[str, str], Any] = {}
        self._threads_before = sys.maxsize
        self._index: JournalIndex | None = None

    def run(self, seconds: float) -> list[Sample]:
        """Run cycles for that long, and `_FEWEST` at least; return the sample after each."""
        samples: list[Sample] = []
        # Whatever the imports made is here for good: the collector need not look at it after every refused allocation.
        gc.collect()
        gc.freeze()
        end = time.perf_counter() + seconds
        turns = itertools.cycle(itertools.product(self._directories, PLACES))
        while time.perf_counter() < end or len(samples) < _FEWEST:
            family, place = next(turns)
            try:
                self._cycle(family, place)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
                self.findings.append(f"cycle {len(samples)}, {family} {place}: {type(error).__name__}: {error}")
            self._sim.reset()
            samples.append(self._sample(len(samples)))
        if self._index is not None:
            self._index.close()
        gc.unfreeze()
        return samples

    def _cycle(self, family: str, place: str) -> None:
        from lyra_emergence.config import ModelConfig
        from lyra_emergence.loading import load

        self.counts["cycles"] += 1
        directory = self._directories[family]
        if self.counts["cycles"] % 3 == 0:
            self._meet_broken()
        if self._chance.random() < 0.3:
            self._arm(most=60)
        loaded = load(ModelConfig(device_map=_device_map(directory, place)), directory=directory)
        self._disarm("loads")
        try:
            for kind in ("greedy", "sampling", "chat"):
                self._answer(loaded, family, kind)
            self._stop_early(loaded)
            self._open_another_journal()
        finally:
            loaded.close()

    def _answer(self, loaded: LoadedModel, family: str, kind: str) -> None:
        key = (family, kind)
        if key not in self._expected:
            self._expected[key] = self._ask(loaded, kind)
        if self._chance.random() < 0.5:
            self._arm(most=400)
        answer = self._ask(loaded, kind)
        self._disarm("answers")
        if answer != self._expected[key]:
            self.findings.append(f"another answer: {family}, {kind}: {answer!r}, not {self._expected[key]!r}")

    def _ask(self, loaded: LoadedModel, kind: str) -> Any:
        from lyra_emergence.chat import ChatSession
        from lyra_emergence.generation import GenerationOptions, stream_generate
        from tests.running import PROMPT

        if kind == "chat":
            session = ChatSession(
                loaded, self._kept_journal(), options=GenerationOptions(max_new_tokens=NEW_TOKENS), passages=1
            )
            return "".join(chunk.text for chunk in session.ask("When was the river high?"))
        options = GenerationOptions(max_new_tokens=NEW_TOKENS, do_sample=kind == "sampling", temperature=1.5, seed=7)
        return [token for chunk in stream_generate(loaded, PROMPT, options) for token in chunk.token_ids]

    def _kept_journal(self) -> JournalIndex:
        """Return the journal that stays open, as a program's does, with the model that embeds what is asked."""
        from lyra_emergence.journal import open_journal

        if self._index is None:
            self._index = open_journal(self._journal)
        return self._index

    def _open_another_journal(self) -> None:
        """Open a journal and close it, without a question to its model.

        safetensors leaves 56 bytes behind for each of the model's 103 tensors each time that it is read, which would
        hide a leak of ours.
        """
        from lyra_emergence.journal import open_journal

        journal = open_journal(self._journal)
        if journal.store.count("entries") != len(_JOURNAL):
            self.findings.append("a journal was opened without all of its entries")
        journal.close()
        self.counts["journals opened and closed"] += 1

    def _stop_early(self, loaded: LoadedModel) -> None:
        from lyra_emergence.generation import GenerationOptions, stream_generate
        from tests.running import PROMPT

        with contextlib.closing(
            stream_generate(loaded, PROMPT, GenerationOptions(max_new_tokens=NEW_TOKENS))
        ) as stream:
            for _ in range(self._chance.randint(0, 4)):
                next(stream)
        self.counts["answers closed early"] += 1

    def _meet_broken(self) -> None:
        from lyra_emergence.config import ModelConfig
        from lyra_emergence.errors import CheckpointError
        from lyra_emergence.loading import load

        try:
            load(ModelConfig(), directory=self._broken).close()
            self.findings.append("a checkpoint that is cut off was loaded")
        except CheckpointError:
            self.counts["broken checkpoints refused"] += 1

    def _arm(self, most: int) -> None:
        persistent = self._chance.random() < 0.5
        self._sim.fail_at(self._chance.randint(1, most), persistent=persistent)

    def _disarm(self, what: str) -> None:
        met = sum(self._sim.injected(device) for device in range(self._sim.devices))
        self.counts[what] += 1
        self.counts[f"{what} that met a refused allocation"] += met > 0
        self.counts["allocations refused"] += met
        self._sim.reset()

    def _threads(self) -> int:
        """Count threads. Those that have ended may be listed for a while longer on a busy machine."""
        end = time.perf_counter() + _LONGEST_END
        while (count := _count_threads()) > self._threads_before and time.perf_counter() < end:
            time.sleep(0.01)
        self._threads_before = count
        return count

    def _sample(self, kept: int) -> Sample:
        from lyra_emergence.runtime.memory import give_back, return_freed_memory

        give_back()
        return_freed_memory()
        return Sample(
            device=sum(self._sim.used(device) for device in range(self._sim.devices)),
            pinned=self._sim.pinned(),
            threads=self._threads(),
            handles=_entries("/proc/self/fd"),
            maps=sum(".safetensors" in line for line in Path("/proc/self/maps").read_text().splitlines()),
            private=_private_bytes(),
            objects=len(gc.get_objects()) - kept,
        )


def _count_threads() -> int:
    return max(threading.active_count(), _entries("/proc/self/task"))


def _entries(folder: str) -> int:
    return sum(1 for _ in Path(folder).iterdir())


def _private_bytes() -> int:
    from lyra_emergence.framework import private_bytes

    return private_bytes()


def _device_map(directory: Path, place: str) -> dict[str, Any]:
    """Return a placement as a map in the checkpoint's own names."""
    from lyra_emergence.checkpoint import read_checkpoint

    first, layers, rest = PLACES[place]
    index = read_checkpoint(directory)
    embeddings = {block.name: first for block in index.blocks if block.kind == "embedding"}
    return {"": rest, **embeddings, **{block.name: layers for block in index.layers[:2]}}


def _cut_off(directory: Path, target: Path) -> Path:
    """Copy a checkpoint without the last bytes of its weights."""
    target.mkdir()
    for file in directory.iterdir():
        content = file.read_bytes()
        (target / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
    return target


def growth(samples: Sequence[Sample]) -> Iterator[str]:
    """Yield what grew over the second half of `samples`, by the rule above."""
    half = samples[len(samples) // 2 :]
    for name in (field.name for field in fields(Sample)):
        values = [getattr(sample, name) for sample in half]
        if name in ALLOWED:
            gained, bound = slope(values) * len(values), max(ALLOWED[name][0], ALLOWED[name][1] * len(values))
            if gained > bound:
                yield f"{name} grew by {gained:,.0f} over {len(values)} cycles, more than {bound:,.0f}"
        elif max(values) > values[0]:
            yield f"{name} grew from {values[0]} to {max(values)}"


def slope(values: Sequence[int]) -> float:
    """Return the median of the slopes between all pairs of `values`, which are one step apart."""
    step = max(1, len(values) // _MOST_SAMPLES)
    points = [(at, values[at]) for at in range(0, len(values), step)]
    return statistics.median(
        (later[1] - early[1]) / (later[0] - early[0]) for early, later in itertools.combinations(points, 2)
    )


def print_summary(samples: Sequence[Sample], counts: Counter[str]) -> None:
    """Print what was done, and what was held at the start, the middle and the end."""
    for what, count in counts.items():
        print(f"{count:8,} {what}")
    places = (0, len(samples) // 2, len(samples) - 1)
    print(f"{'':8} {'first':>14} {'middle':>14} {'last':>14} {'gained in the second half':>28}")
    for name in (field.name for field in fields(Sample)):
        values = [getattr(sample, name) for sample in samples]
        half = values[len(values) // 2 :]
        gained = slope(half) * len(half)
        print(f"{name:8} " + " ".join(f"{values[at]:14,}" for at in places) + f" {gained:28,.0f}")


if __name__ == "__main__":
    sys.exit(main())
