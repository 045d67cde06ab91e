"""Decoding where main memory is shorter than the weights: Lyra beside transformers with accelerate's disk offload.

    uv run python -m benchmarks.offload                  # 1.1 billion weights in 70% of their memory
    uv run python -m benchmarks.offload --share 0.5

Every engine runs in a process of its own that joins a memory control group (v1 or v2) before it imports anything. The
engines have a file each, whose pages are dropped from the kernel's cache before that. Rounds go through the engines in
turn, each a prompt of 64 tokens and 8 more. Before and after each round the file is read from the disk in order,
directly: what the disk allows.

What is read for a token is the process's own count of bytes from disks. The bound is the bytes of the blocks that the
plan streams, at the rate of the round.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from benchmarks.checkpoints import SHAPES, checkpoint_of
from benchmarks.engines import asked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ENGINES = ("lyra", "accelerate")
PROMPT, NEW_TOKENS = 64, 8
CONTEXT = 1024
PIECE = 32 * 2**20
MEASURED = 1200 * 2**20
GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))


def main() -> None:
    """Run the engines in turn in their control groups and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1b", choices=list(SHAPES))
    parser.add_argument("--share", type=float, default=0.7, help="of the weights, what the whole process may take")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        engine, group = arguments.serve
        serve(engine, Path(group), directory_of(engine, arguments.shape))
        return
    limit = int(arguments.share * file_of("lyra", arguments.shape).stat().st_size)
    rows = measure(arguments.shape, limit, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    print("\n".join(table(rows, limit)))


def directory_of(engine: str, shape: str) -> Path:
    """Return an engine's own copy of the checkpoint: cached pages belong to the group that read them first."""
    original = checkpoint_of(shape)
    if engine == "lyra":
        return original
    copy = original.with_name(f"{original.name}-{engine}")
    if not (copy / "done").exists():
        shutil.copytree(original, copy, dirs_exist_ok=True)
    return copy


def file_of(engine: str, shape: str) -> Path:
    """Return an engine's weights."""
    return directory_of(engine, shape) / "model.safetensors"


def measure(shape: str, limit: int, rounds: int) -> dict[str, Any]:
    """Return what each engine took, round by round, and the disk's rates."""
    rows: dict[str, Any] = {engine: {"prompt": [], "token": [], "read": []} for engine in ENGINES}
    rows["rate"] = []
    file = file_of("lyra", shape)
    processes, groups = {}, {}
    try:
        for engine in ENGINES:
            drop_pages(file_of(engine, shape))
            groups[engine] = make_group(engine, limit)
            command = [sys.executable, "-m", "benchmarks.offload", "--shape", shape]
            command += ["--serve", engine, str(groups[engine])]
            processes[engine] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            rows[engine]["streamed"] = asked(processes[engine], "")["streamed"]
        for number in range(rounds + 1):
            rate = sequential_rate(file)
            for engine, process in processes.items():
                found = asked(process, "round\n")
                if number:
                    for name, figures in found.items():
                        rows[engine][name].append(figures)
            if number:
                rows["rate"].append((rate + sequential_rate(file)) / 2)
    finally:
        for process in processes.values():
            process.communicate()
        for group in groups.values():
            group.rmdir()
    return rows


def make_group(engine: str, limit: int) -> Path:
    """Return a new control group that may take `limit` bytes of memory."""
    for base in GROUPS:
        group = base / f"lyra-offload-{engine}-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        for name in ("memory.limit_in_bytes", "memory.max"):
            if (group / name).exists():
                (group / name).write_text(str(limit))
                return group
        group.rmdir()
    raise SystemExit("control groups cannot be made here")


def drop_pages(file: Path) -> None:
    """Let the kernel drop its pages of a file, which other groups may have paid for."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())  # pages that wait to be written cannot be dropped
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sequential_rate(file: Path) -> float:
    """Return the bytes/s of reading a file directly, in order."""
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    memory = mmap.mmap(-1, PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    done, started = 0, time.perf_counter()
    while done < MEASURED and (got := os.preadv(fd, [memory], done)) == PIECE:
        done += got
    seconds = time.perf_counter() - started
    os.close(fd)
    return done / seconds


def serve(engine: str, group: Path, directory: Path) -> None:
    """Join the group, load one engine, and run a round for each line on stdin."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    streamed, run = lyra(directory) if engine == "lyra" else accelerate(directory)
    print(json.dumps({"streamed": streamed}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(run()), flush=True)


def timed(prefill: Callable[[], Any], step: Callable[[int], Any]) -> dict[str, Any]:
    """Return the seconds of the prompt and of a token after it, and the bytes read for such a token."""
    clock = time.perf_counter()
    token = int(prefill().argmax(-1))
    first, before = time.perf_counter(), read_bytes()
    for _ in range(NEW_TOKENS):
        token = int(step(token).argmax(-1))
    seconds = time.perf_counter() - first
    return {"prompt": first - clock, "token": seconds / NEW_TOKENS, "read": (read_bytes() - before) / NEW_TOKENS}


def read_bytes() -> int:
    """Return the bytes that this process had read from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def prompt() -> list[int]:
    """Return the prompt's tokens."""
    return [(7 * at + 11) % 900 for at in range(PROMPT)]


def lyra(directory: Path) -> tuple[int, Callable[[], dict[str, Any]]]:
    """Return the bytes that the plan streams, and what runs a round."""
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.loading import load
    from lyra_emergence.runtime.stepper import Stepper

    loaded = load(ModelConfig(device_map="cpu", context_length=CONTEXT), directory=directory)
    streamed = sum(placement.weights for placement in loaded.plan.placements if placement.streamed)

    def run() -> dict[str, Any]:
        with closing(Stepper(loaded, most_tokens=PROMPT + NEW_TOKENS + 1)) as stepper:
            return timed(lambda: stepper.prefill(prompt()), stepper.step)

    return streamed, run


def accelerate(directory: Path) -> tuple[int, Callable[[], dict[str, Any]]]:
    """Return 0 and what runs a round; accelerate gets the plan's own division, with its own offloading."""
    import torch
    from transformers import AutoModelForCausalLM

    from lyra_emergence.checkpoint import read_checkpoint
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.machine import probe_machine
    from lyra_emergence.plan import make_plan

    config = ModelConfig(device_map="cpu", context_length=CONTEXT)
    plan = make_plan(config, read_checkpoint(directory), probe_machine(with_torch=True))
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        device_map=plan.device_map() | {"model.rotary_emb": "cpu"},
        offload_folder=directory / "offload",
    ).eval()

    def run() -> dict[str, Any]:
        held: dict[str, Any] = {}

        def step(ids: list[int]) -> Any:
            with torch.inference_mode():
                output = model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1, **held)
            held["past_key_values"] = output.past_key_values
            return output.logits[:, -1].float()

        return timed(lambda: step(prompt()), lambda token: step([token]))

    return 0, run


def table(rows: dict[str, Any], limit: int) -> Iterator[str]:
    """Yield the medians, and Lyra beside accelerate and beside the disk."""
    yield f"memory for the whole process: {limit / 1e6:.0f} MB; the disk in order: {spread(rows['rate'], 1e-9)} GB/s"
    yield "| engine | prompt 64, s | tokens/s after it | read for a token, MB |"
    yield "|---|---|---|---|"
    for engine in ENGINES:
        row = rows[engine]
        figures = spread(row["prompt"]), spread([1 / s for s in row["token"]]), spread(row["read"], 1e-6, 0)
        yield f"| {engine} | {' | '.join(figures)} |"
    ours, theirs = rows["lyra"], rows["accelerate"]
    streamed = ours["streamed"]
    bound = [streamed / rate / seconds for rate, seconds in zip(rows["rate"], ours["token"], strict=True)]
    faster = [other / own for own, other in zip(ours["token"], theirs["token"], strict=True)]
    yield f"beside accelerate: {spread(faster)}; of what the disk allows ({streamed / 1e6:.0f} MB): {spread(bound)}"


def spread(figures: list[float], scale: float = 1, digits: int = 2) -> str:
    """Return the median with least and most."""
    low, middle, high = (f"{scale * at(figures):.{digits}f}" for at in (min, statistics.median, max))
    return f"{middle} ({low}-{high})"


if __name__ == "__main__":
    main()
