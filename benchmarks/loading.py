"""Loading, beside transformers: wall time, anonymous memory, and bytes copied when a full load has to fall back.

    uv run python -m benchmarks.loading                   # CPU, and the simulated accelerator
    uv run python -m benchmarks.loading --device cuda:0   # a real GPU

Every load runs in a process of its own, the two loaders in turn, and times start once the libraries are imported. The
page cache is warm: the first, uncounted round reads the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import checkpoint_of

FALLBACK_LAYERS = 8
KEPT: list[Any] = []
"""What has to live until the memory is read."""


@dataclass(frozen=True)
class Setting:
    """One case's checkpoint and accelerator; `simulated` is its handle where it is a simulated one."""

    directory: Path
    device: str
    simulated: Any


def main() -> None:
    """Run every case in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1b", choices=["tiny", "1.1b"])
    parser.add_argument("--device", default="sim:0", help="the accelerator: sim:0 (simulated) or cuda:0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    directory = checkpoint_of(arguments.shape)
    if arguments.case:
        print(json.dumps(run_case(arguments.case, directory, arguments.device)))
        return
    rows = {case: [] for case in CASES}
    for round_number in range(arguments.rounds + 1):
        for case in CASES:
            result = _in_process(case, arguments)
            if round_number:
                rows[case].append(result)
    _print_table(rows, directory)


def _in_process(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.loading", "--case", case]
    command += ["--shape", arguments.shape, "--device", arguments.device]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout.splitlines()[-1])


def run_case(case: str, directory: Path, device: str) -> dict[str, Any]:
    """Run one case in this process."""
    here = Setting(directory, device, _simulated(device))
    # Imports are not what is measured.
    import psutil  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lyra_emergence import config, loading  # noqa: F401
    from lyra_emergence.runtime import blocks, handover, ladder  # noqa: F401

    AutoTokenizer.from_pretrained(directory)
    AutoModelForCausalLM.from_pretrained(checkpoint_of("tiny"))
    before, started = anonymous_bytes(), time.perf_counter()
    outcome = CASES[case](here)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "anonymous": anonymous_bytes() - before, **outcome}


def _simulated(device: str) -> Any:
    if not device.startswith("sim"):
        return None
    from src.tests import simulated_accelerator

    handle = simulated_accelerator.load()
    # Stays on for the life of this process.
    KEPT.append(handle.lent())
    return KEPT[-1].__enter__()


def lyra_cpu(here: Setting) -> dict[str, Any]:
    """Lyra, everything on the CPU."""
    return _lyra(here, device_map="cpu")


def transformers_cpu(here: Setting) -> dict[str, Any]:
    """transformers, everything on the CPU."""
    return _transformers(here, None)


def lyra_device(here: Setting) -> dict[str, Any]:
    """Lyra, everything on the accelerator."""
    return _lyra(here, device_map="auto")


def transformers_device(here: Setting) -> dict[str, Any]:
    """Transformers + accelerate, everything on the accelerator."""
    return _transformers(here, {"": here.device})


def lyra_fallback(here: Setting) -> dict[str, Any]:
    """Lyra, memory running out after most layers: the fallback keeps what it promoted."""
    _tighten(here)
    return _lyra(here, device_map="auto", gpu_layers_fallback=FALLBACK_LAYERS, stale_plan=True)


def transformers_fallback(here: Setting) -> dict[str, Any]:
    """Transformers + accelerate, the same: the caller catches the error and loads again with a smaller map."""
    import torch

    _tighten(here)
    failed = False
    try:
        _transformers(here, {"": here.device})
    except torch.OutOfMemoryError:
        failed = True
    if not failed:
        raise RuntimeError("the first load was meant to run out of memory")
    gpu = here.device
    split = {"model.embed_tokens": gpu, "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": gpu}
    layers = json.loads((here.directory / "config.json").read_text())["num_hidden_layers"]
    split |= {f"model.layers.{i}": gpu if i < FALLBACK_LAYERS else "cpu" for i in range(layers)}
    return _transformers(here, split)


CASES = {
    "lyra cpu": lyra_cpu,
    "transformers cpu": transformers_cpu,
    "lyra device": lyra_device,
    "transformers device": transformers_device,
    "lyra fallback": lyra_fallback,
    "transformers fallback": transformers_fallback,
}


def _tighten(here: Setting) -> None:
    """Leave room for four fifths of the weights."""
    import torch

    nbytes = (here.directory / "model.safetensors").stat().st_size * 4 // 5
    if here.simulated is not None:
        here.simulated.set_cap(nbytes)
        return
    torch.cuda.set_per_process_memory_fraction(nbytes / torch.cuda.get_device_properties(here.device).total_memory)


def _lyra(here: Setting, *, stale_plan: bool = False, **settings: Any) -> dict[str, Any]:
    from lyra_emergence.checkpoint import read_checkpoint
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.loading import load
    from lyra_emergence.machine import Device, Machine, probe_machine
    from lyra_emergence.plan import make_plan

    config = ModelConfig(**settings)
    plan = None
    if stale_plan:
        # Planned before the memory went: the same machine with all the room in the world.
        now = probe_machine(with_torch=True)
        roomy = tuple(Device(d.name, d.kind, d.index, 1 << 40, 1 << 40, 0, d.description) for d in now.accelerators)
        plan = make_plan(config, read_checkpoint(here.directory), Machine(roomy, now.cpu))
    loaded = load(config, directory=here.directory, plan=plan)
    KEPT.append(loaded)
    return {"copied": loaded.report.bytes_copied, "rungs": [a.rung for a in loaded.report.attempts]}


def _transformers(here: Setting, device_map: Any) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(here.directory, dtype="auto", device_map=device_map)
    KEPT.append((model, AutoTokenizer.from_pretrained(here.directory)))
    return {}


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def _print_table(rows: dict[str, list[dict[str, Any]]], directory: Path) -> None:
    weights = (directory / "model.safetensors").stat().st_size
    print(f"{directory.name}: {weights / 1e9:.2f} GB of weights, medians of {len(rows['lyra cpu'])} (min-max)\n")
    print("| case | Lyra s | transformers s | ratio | Lyra anonymous | Lyra copied |\n|---|---|---|---|---|---|")
    for case in ("cpu", "device", "fallback"):
        ours, theirs = rows[f"lyra {case}"], rows[f"transformers {case}"]
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(ours, theirs, strict=True))
        anonymous = statistics.median(row["anonymous"] for row in ours) / weights
        copied = statistics.median(row["copied"] for row in ours) / weights
        print(
            f"| {case} | {_spread(ours)} | {_spread(theirs)} | {ratio:.2f} | {anonymous:.1%} of weights "
            f"| {copied:.2f} of weights |"
        )
    print(f"\nfallback: rungs {rows['lyra fallback'][0]['rungs']}")


def _spread(rows: list[dict[str, Any]]) -> str:
    seconds = [row["seconds"] for row in rows]
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})"


if __name__ == "__main__":
    main()
