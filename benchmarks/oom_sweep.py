"""Fails every allocation of loading and answering in turn, and checks that no token is lost and nothing leaks.

    uv run python -m benchmarks.oom_sweep --jobs 2           # every allocation; minutes a placement
    uv run python -m benchmarks.oom_sweep --every 25         # every 25th
    uv run python -m benchmarks.oom_sweep --place split --family mixtral
    uv run python -m benchmarks.oom_sweep --record runs.jsonl    # stopped, and called again: goes on where it was

On the simulated accelerator, a tiny checkpoint of a family is loaded and asked for 12 tokens. First the allocations of
an undisturbed run are counted. Then, for each of them, one run has that allocation refused, and another one it and all
after it. Every run must load, give the tokens of plain transformers (packed: of an undisturbed run), leave no byte on
the devices once it is closed, and answer again afterwards. It must have met its failure: a run that did not is no
evidence.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from lyra_emergence.loading import LoadedModel
    from tests.simulated_accelerator import SimulatedAccelerator

PLACES: dict[str, dict[str, Any]] = {
    "full": {},
    "split": {"device_map": {"": "cpu", "{embedding}": 0, "{layers}.0": 0, "{layers}.1": 0}},
    "two": {"device_map": {"": 1, "{embedding}": 0, "{layers}.0": 0, "{layers}.1": 0}},
    "guests": {"device_map": {"": "cpu", "{layers}.0": 0, "{layers}.1": 0}},
    "streamed": {"device_map": {"": 0, "{layers}.1": "disk", "{layers}.2": "disk", "{layers}.3": "disk"}},
    "turns": {"device_map": {"": "cpu", "{embedding}": 0, "{layers}.0": 0, "{layers}.1": 0}},
    "packed": {"device_map": {"": 0, "{layers}": "cpu"}, "load_in_4bit": True, "packed_cache": 0},
}
"""`guests` gets a prompt so long that layers of main memory run on the accelerator. `turns` is a conversation of two
questions whose keys and values are kept between them. `packed` has layers of 4 bits in main memory, run by the CPU's
kernels: stored weights give other tokens, so that it is compared with an undisturbed run.
"""
_LONG = 160


@dataclass(frozen=True, slots=True)
class Case:
    """One run: the allocation that is refused (none for 0), alone or with all after it."""

    family: str
    place: str
    nth: int
    persistent: bool


def main() -> int:
    """Run the sweep, print its counts, and return 1 where a run ended wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="sweep every n-th allocation")
    parser.add_argument("--place", action="append", choices=list(PLACES), help="repeatable; all by default")
    parser.add_argument("--family", action="append", help="of tests/families.py; repeatable; llama by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes that run beside each other")
    parser.add_argument(
        "--record", type=Path, help="a file that takes a line per run; runs it holds are not made again"
    )
    arguments = parser.parse_args()

    families = arguments.family or ["llama"]
    with tempfile.TemporaryDirectory() as folder, _mapping(arguments.jobs) as mapping:
        _build(families, Path(folder))
        wrong = sum(
            sweep(mapping, Path(folder) / family, place, arguments.every, record=_Record(arguments.record))
            for family in families
            for place in arguments.place or list(PLACES)
        )
    return 1 if wrong else 0


class _Pool:
    """Runs cases in processes of their own: each has a simulated accelerator to itself."""

    def __init__(self, jobs: int) -> None:
        self._pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))

    def __enter__(self) -> Callable[..., Iterable[Any]]:
        return partial(self._pool.map, chunksize=4)

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _mapping(jobs: int) -> Any:
    return _Pool(jobs) if jobs > 1 else nullcontext(map)


def _build(names: list[str], folder: Path) -> None:
    from transformers.utils import logging

    from tests import families

    logging.disable_progress_bar()
    for name in names:
        families.build_checkpoint(name, folder / name)


class _Record:
    """The outcomes of runs made before, in a file of JSON lines; or nothing where there is no file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self._known = {Case(**line["case"]): line["outcome"] for line in map(json.loads, lines)}

    def outcome(self, case: Case) -> str | None:
        return self._known.get(case)

    def add(self, case: Case, outcome: str) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"case": asdict(case), "outcome": outcome}) + "\n")


def sweep(mapping: Callable[..., Iterable[Any]], directory: Path, place: str, every: int, *, record: _Record) -> int:
    """Sweep one model in one placement; return how many runs ended wrong."""
    started = time.perf_counter()
    family = directory.name
    undisturbed, total = run(directory, Case(family, place, 0, persistent=False))
    if undisturbed != "right" or not total:
        print(f"{family} {place}: undisturbed: {undisturbed}, {total} allocations", flush=True)
        return 1
    cases = [Case(family, place, nth, persistent) for nth in range(1, total + 1, every) for persistent in (False, True)]
    counts: Counter[str] = Counter()
    for case, outcome in _outcomes(mapping, directory, cases, record):
        counts[outcome] += 1
        if outcome != "right":
            which = f"allocation {case.nth}{' and all after it' * case.persistent}"
            print(f"{family} {place}: {which}: {outcome}", flush=True)
    wrong = sum(counts.values()) - counts["right"]
    print(
        f"{family:10} {place:8} {total:5} allocations, {sum(counts.values()):5} runs, {counts['right']:5} right, "
        f"{wrong} wrong, {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    return wrong


def _outcomes(
    mapping: Callable[..., Iterable[Any]], directory: Path, cases: list[Case], record: _Record
) -> Iterator[tuple[Case, str]]:
    open_cases = []
    for case in cases:
        known = record.outcome(case)
        if known is None:
            open_cases.append(case)
        else:
            yield case, known
    for case, (outcome, _) in zip(open_cases, mapping(partial(run, directory), open_cases), strict=True):
        record.add(case, outcome)
        yield case, outcome


def _settings(place: str, directory: Path) -> dict[str, Any]:
    """Return the configuration of a placement, its map in the checkpoint's own names."""
    from lyra_emergence.checkpoint import read_checkpoint

    index = read_checkpoint(directory)
    names = {
        "embedding": next(block.name for block in index.blocks if block.kind == "embedding"),
        "layers": index.layers[0].name.rpartition(".")[0],
    }
    settings = dict(PLACES[place])
    if "device_map" in settings:
        settings["device_map"] = {key.format(**names): device for key, device in settings["device_map"].items()}
    return settings


@cache
def _accelerator() -> SimulatedAccelerator:
    """Switch this process's simulated accelerator on, once and for good."""
    from transformers.utils import logging  # and with it what is frozen below

    from tests import simulated_accelerator

    logging.disable_progress_bar()
    lending = ExitStack()
    sim = lending.enter_context(simulated_accelerator.load().lent())
    atexit.register(lending.close)
    # Every recovery collects garbage; looking through all of torch and transformers took nine tenths of a run.
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)
    return sim


def run(directory: Path, case: Case) -> tuple[str, int]:
    """Load and answer with an allocation refused; return how it ended, and the allocations counted."""
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.loading import load

    sim = _accelerator()
    settings = _settings(case.place, directory)
    expected = _expected(directory, case.place)
    sim.reset()
    sim.fail_at(case.nth, persistent=case.persistent)
    try:
        loaded = load(ModelConfig(**settings), directory=directory)
        tokens = _answers(loaded, case.place)
        met = sum(sim.injected(device) for device in range(sim.devices)) > 0
        count = sum(sim.allocations(device) for device in range(sim.devices))
        sim.fail_at(0)
        again = _answers(loaded, case.place)
        loaded.close()
        del loaded
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
        sim.fail_at(0)
        return f"{type(error).__name__}: {error}", 0
    gc.collect()
    return next(_findings(sim, case.nth == 0 or met, tokens == expected, again == expected), "right"), count


@cache
def _expected(directory: Path, place: str) -> list[int]:
    """Return the tokens of plain transformers; of an undisturbed run where weights are packed."""
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.loading import load
    from tests.running import NEW_TOKENS, reference

    settings = _settings(place, directory)
    if settings.get("load_in_4bit"):
        loaded = load(ModelConfig(**settings), directory=directory)
        try:
            return _answers(loaded, place)
        finally:
            loaded.close()
    first = reference(directory, NEW_TOKENS, _prompt(place))
    return first + (reference(directory, NEW_TOKENS, _next_prompt(place, first)) if place == "turns" else [])


def _answers(loaded: LoadedModel, place: str) -> list[int]:
    """Return the tokens of the answer, or of both."""
    from lyra_emergence.generation import PromptCache
    from tests.running import greedy

    kept = PromptCache() if place == "turns" else None
    first = greedy(loaded, prompt=_prompt(place), kept=kept)
    if kept is None:
        return first
    try:
        return first + greedy(loaded, prompt=_next_prompt(place, first), kept=kept)
    finally:
        kept.drop()


def _prompt(place: str) -> tuple[int, ...]:
    from tests.running import PROMPT

    return (PROMPT * _LONG)[-_LONG:] if place == "guests" else PROMPT


def _next_prompt(place: str, answer: list[int]) -> tuple[int, ...]:
    prompt = _prompt(place)
    return (*prompt, *answer, *prompt[-2:])


def _findings(sim: SimulatedAccelerator, met: bool, same: bool, again: bool) -> Iterator[str]:
    if not met:
        yield "the failure was not met"
    if not same:
        yield "other tokens"
    if not again:
        yield "other tokens the second time"
    left = [sim.used(device) for device in range(sim.devices)]
    if any(left):
        yield f"bytes left on the devices: {left}"


if __name__ == "__main__":
    sys.exit(main())
