"""Refuses every allocation of main memory while loading and answering in turn, and checks that no token is lost.

    uv run python -m benchmarks.oom_sweep_cpu                        # every allocation; two hours
    uv run python -m benchmarks.oom_sweep_cpu --every 10             # every 10th
    uv run python -m benchmarks.oom_sweep_cpu --case tensors --case split
    uv run python -m benchmarks.oom_sweep_cpu --record runs.jsonl    # stopped, and called again: goes on where it was

The runs happen in a child process with a library in front of the C library's allocator (`src/tests/allocator_shim`).
First the allocations of an undisturbed run are counted. Then, for each of them, one run has that allocation refused,
and another one it and all after it. A run with one refusal must give the tokens of plain transformers. One in which all
after it are refused must give them too, or end with one clear error behind the tokens so far; asked again afterwards,
the same model (or, if it did not load, a new one) must give them all. A crash or a hang is a wrong end.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from src.tests.cpu_sweep import Case, Run, Sweeper

WIDE = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 3, "max_position_embeddings": 512}
PACKED = {"hidden_size": 64, "intermediate_size": 128}
"""Whole tiles of rows and whole groups of inputs, so that the kernels pack them."""
SPLIT = {"device_map": {"": "cpu", "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0}}
GUESTS = {"device_map": {"": "cpu", "model.layers.0": 0, "model.layers.1": 0}}
STREAMED = {"device_map": {"": "cpu", "model.layers": "disk"}}
ON_ACCELERATORS = ("split", "guests")
CASES = {
    "tensors": "a tiny Llama on the CPU; tensors and scratch of every size",
    "heap": "the same; objects, buffers and C++ of 512 bytes and more, without libraries that end the process",
    "maps": "the same; maps of files, Python's arenas",
    "wide": "a wider Llama in bfloat16, a prompt of 300 tokens; tensors of 64 KiB and more",
    "large": "the same; tensors of 1 MiB and more",
    "converted": "the same converted to float32; tensors of 64 KiB and more",
    "split": "a tiny Llama, half of it on the simulated accelerator; tensors of every size in main memory",
    "4bit": "a Llama packed to 4 bits by Lyra's kernels; tensors of every size",
    "8bit": "the same to 8 bits",
    "kept": "the same from the cache; maps of every size",
    "bitsandbytes": "the same to 4 bits by bitsandbytes",
    "streamed": "a tiny Llama, its layers read from the file as they run; tensors, buffers and maps",
    "guests": "half of the layers on the accelerator, a long prompt that the others run there too; tensors and maps",
    "mixture": "a tiny Mixtral; tensors of every size",
    "shared": "two answers from one tiny Llama at once; tensors of every size",
    "parallel": "two loads and answers of a tiny Llama and two of a GPT-2 at once; tensors of every size",
}


def main() -> int:
    """Run the sweep, print its counts, and return 1 where a run ended wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="sweep every n-th allocation")
    parser.add_argument("--case", action="append", choices=list(CASES), help="repeatable; all by default")
    parser.add_argument("--threads", type=int, default=1, help="threads that compute")
    parser.add_argument(
        "--record", type=Path, help="a file that takes a line per run; runs it holds are not made again"
    )
    arguments = parser.parse_args()

    from src.tests import allocator_shim
    from src.tests.cpu_sweep import Sweeper
    from src.tests.simulated_accelerator import cache_directory

    shim = allocator_shim.build(cache_directory())
    record = _Record(arguments.record)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        cases = _cases(Path(folder))
        for name in arguments.case or list(CASES):
            sim = cache_directory() if name in ON_ACCELERATORS else None
            sweeper = stack.enter_context(Sweeper(shim, threads=arguments.threads, sim=sim))
            wrong += sweep(sweeper, name, cases[name], arguments.every, record)
            stack.close()
    return 1 if wrong else 0


def _cases(folder: Path) -> dict[str, Case]:
    import torch
    from transformers.utils import logging

    from src.tests.allocator_shim import Refusing
    from src.tests.cpu_sweep import Case
    from src.tests.families import build_checkpoint
    from src.tests.running import PROMPT

    logging.disable_progress_bar()
    llama = str(build_checkpoint("llama", folder / "llama"))
    gpt2 = str(build_checkpoint("gpt2", folder / "gpt2"))
    mixtral = str(build_checkpoint("mixtral", folder / "mixtral"))
    packed = str(build_checkpoint("llama", folder / "packed", sizes=PACKED))
    wide = str(build_checkpoint("llama", folder / "wide", torch.bfloat16, sizes=WIDE))
    prompt = (PROMPT * 60)[:300]
    every, kib = Refusing(aligned=0), 1024
    converted: dict[str, Any] = {"device_map": "cpu", "dtype": "float32"}
    return {
        "tensors": Case(llama, every),
        "heap": Case(llama, Refusing(heap=512)),
        "maps": Case(llama, Refusing(mapped=0)),
        "wide": Case(wide, Refusing(aligned=64 * kib), prompt=prompt),
        "large": Case(wide, Refusing(aligned=kib * kib), prompt=prompt),
        "converted": Case(wide, Refusing(aligned=64 * kib), converted, prompt),
        "split": Case(llama, every, SPLIT),
        "4bit": Case(packed, every, {"device_map": "cpu", "load_in_4bit": True, "packed_cache": 0}),
        "8bit": Case(packed, every, {"device_map": "cpu", "load_in_8bit": True, "packed_cache": 0}),
        "kept": Case(packed, Refusing(mapped=0), {"device_map": "cpu", "load_in_4bit": True}),
        "bitsandbytes": Case(packed, every, {"device_map": "cpu", "load_in_4bit": True, "cpu_kernels": False}),
        "streamed": Case(llama, Refusing(aligned=0, mapped=0), STREAMED),
        "guests": Case(llama, Refusing(aligned=0, mapped=0), GUESTS, prompt[:160]),
        "mixture": Case(mixtral, every),
        "shared": Case(llama, every, mode="shared"),
        "parallel": Case(llama, every, mode="parallel", others=(gpt2,)),
    }


class _Record:
    """Runs made before, in a file of JSON lines; or nothing where there is no file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self._known = {(line["case"], line["nth"], line["persistent"]): line for line in map(json.loads, lines)}

    def find(self, case: str, nth: int, *, persistent: bool) -> Run | None:
        from src.tests.cpu_sweep import Run

        line = self._known.get((case, nth, persistent))
        return None if line is None else Run(**{name: value for name, value in line.items() if name != "case"})

    def add(self, case: str, run: Run) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"case": case, **asdict(run)}) + "\n")


def sweep(sweeper: Sweeper, name: str, case: Case, every: int, record: _Record) -> int:
    """Sweep one case; return how many runs ended wrong."""
    started = time.perf_counter()
    total = sweeper.count(case)
    counts: Counter[str] = Counter()
    for nth in range(1, total + 1, every):
        for persistent in (False, True):
            run = record.find(name, nth, persistent=persistent)
            if run is None:
                run = sweeper.run(case, nth, persistent=persistent)
                record.add(name, run)
            counts[run.outcome if run.as_asked else "wrong"] += 1
            if not run.as_asked:
                print(f"{name}: allocation {nth}{' and all after it' * persistent}: {run.outcome}", flush=True)
    print(
        f"{name:10} {total:6} allocations, {sum(counts.values()):5} runs: {counts['right']:5} right, "
        f"{counts['refused']:5} refused, {counts['memory error']:3} memory errors of Python, {counts['wrong']} wrong, "
        f"{time.perf_counter() - started:.0f} s",
        flush=True,
    )
    return counts["wrong"]


if __name__ == "__main__":
    sys.exit(main())
