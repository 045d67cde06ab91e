"""Fails every allocation of loading and answering in turn, and checks that no token is lost and nothing leaks.

    uv run python -m benchmarks.oom_sweep                    # every allocation; about three hours a placement
    uv run python -m benchmarks.oom_sweep --every 25         # every 25th
    uv run python -m benchmarks.oom_sweep --place split --family mixtral

On the simulated accelerator, a tiny checkpoint of a family is loaded and asked for 12 tokens. First the allocations of
an undisturbed run are counted. Then, for each of them, one run has that allocation refused, and another one it and all
after it. Every run must load, give the tokens of plain transformers, leave no byte on the devices once it is closed,
and answer again afterwards. It must have met its failure: a run that did not is no evidence.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.simulated_accelerator import SimulatedAccelerator

PLACES: dict[str, dict[str, Any]] = {
    "full": {},
    "split": {"device_map": {"": "cpu", "{embedding}": 0, "{layers}.0": 0, "{layers}.1": 0}},
    "two": {"device_map": {"": 1, "{embedding}": 0, "{layers}.0": 0, "{layers}.1": 0}},
}


def main() -> int:
    """Run the sweep, print its counts, and return 1 where a run ended wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="sweep every n-th allocation")
    parser.add_argument("--place", action="append", choices=list(PLACES), help="repeatable; all by default")
    parser.add_argument("--family", action="append", help="of tests/families.py; repeatable; llama by default")
    arguments = parser.parse_args()

    from tests import families, simulated_accelerator

    library = simulated_accelerator.load()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder, library.lent() as sim:
        for family in arguments.family or ["llama"]:
            directory = families.build_checkpoint(family, Path(folder) / family)
            for place in arguments.place or list(PLACES):
                wrong += sweep(sim, directory, family, place, arguments.every)
    return 1 if wrong else 0


def sweep(sim: SimulatedAccelerator, directory: Path, family: str, place: str, every: int) -> int:
    """Sweep one model in one placement; return how many runs ended wrong."""
    started = time.perf_counter()
    settings = _settings(place, directory)
    total = run(sim, directory, settings, 0, persistent=False)[1]
    counts: Counter[str] = Counter()
    for nth in range(1, total + 1, every):
        for persistent in (False, True):
            outcome, _ = run(sim, directory, settings, nth, persistent=persistent)
            counts[outcome] += 1
            if outcome != "right":
                print(f"{family} {place}: allocation {nth}{' and all after it' * persistent}: {outcome}", flush=True)
    wrong = sum(counts.values()) - counts["right"]
    print(
        f"{family:10} {place:6} {total:5} allocations, {sum(counts.values()):5} runs, {counts['right']:5} right, "
        f"{wrong} wrong, {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    return wrong


def _settings(place: str, directory: Path) -> dict[str, Any]:
    """Return the configuration of a placement, its map in the checkpoint's own names."""
    from lyra_emergence.checkpoint import read_checkpoint

    index = read_checkpoint(directory)
    names = {
        "embedding": next(block.name for block in index.blocks if block.kind == "embedding"),
        "layers": index.layers[0].name.rpartition(".")[0],
    }
    wanted = PLACES[place].get("device_map")
    return {} if wanted is None else {"device_map": {key.format(**names): device for key, device in wanted.items()}}


def run(
    sim: SimulatedAccelerator, directory: Path, settings: dict[str, Any], nth: int, *, persistent: bool
) -> tuple[str, int]:
    """Load and answer with allocation `nth` refused (none for 0); return how it ended, and the allocations counted."""
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.loading import load
    from tests.running import greedy, reference

    expected = reference(directory)
    sim.reset()
    sim.fail_at(nth, persistent=persistent)
    try:
        loaded = load(ModelConfig(**settings), directory=directory)
        tokens = greedy(loaded)
        met = sum(sim.injected(device) for device in range(sim.devices)) > 0
        count = sum(sim.allocations(device) for device in range(sim.devices))
        sim.fail_at(0)
        again = greedy(loaded)
        loaded.close()
        del loaded
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
        sim.fail_at(0)
        return f"{type(error).__name__}: {error}", 0
    gc.collect()
    return next(_findings(sim, nth == 0 or met, tokens == expected, again == expected), "right"), count


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
