"""How fast a plan says a model will run, beside how fast it runs.

    uv run python -m benchmarks.plan_speed                    # the CPU, and the first GPU where there is one
    uv run python -m benchmarks.plan_speed --only bundled --rounds 3

Models of 17 MB to 2.2 GB of weights, in bfloat16 and float32. Each has a process of its own. In every round the machine
is probed, as `lyra.py plan --measure` does it, and right after it the model runs what a prediction is of: a prompt of
half its context, at most 1,024 tokens, and single tokens with the caches half full. A round holds where its measurement
lies in the band of its own probe. With `--json FILE` every model is written down as it ends, and a run that was stopped
goes on behind the last one.

Nothing else should run beside it: a probe takes half a second, and what slows the machine a moment later is not in it.
Where something does, `--processor-time` takes the times, the probe's too, in seconds of the processor and with one
thread: waiting for the processor is then left out, but not what others take of caches and of memory's bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.checkpoints import checkpoint_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MODELS = ("bundled", "llama", "gpt2", "gemma2", "qwen3-moe", "llama-1.1b")
DTYPES = ("bfloat16", "float32")
_CONTEXT = 2048
_TOKENS = 12
"""Single tokens that are timed in a round, after two that are not."""
_WARM = 2
KINDS = ("prefill", "decode")


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=MODELS, help="repeatable")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="a case a line goes here; cases that are there are not run again")
    parser.add_argument("--processor-time", action="store_true", help="for a busy machine: one thread, its own seconds")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        if arguments.processor_time:
            # The probe asks the module for its clock, and so does this file.
            time.perf_counter = time.process_time  # type: ignore[assignment]
        print(json.dumps(run_case(*arguments.case, arguments.rounds)))
        return
    found = _recorded(arguments.json)
    for name in arguments.only or MODELS:
        for dtype in arguments.dtype or DTYPES:
            for device in _devices():
                if (name, dtype, device) not in found:
                    found[name, dtype, device] = _in_process(name, dtype, device, arguments)
    print("\n".join(table(list(found.values()))))


def _devices() -> list[str]:
    from lyra_emergence.machine import probe_machine

    return ["cpu", *(device.name for device in probe_machine().accelerators[:1])]


def _recorded(record: Path | None) -> dict[tuple[str, str, str], dict[str, Any]]:
    if record is None or not record.exists():
        return {}
    cases = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    return {(case["model"], case["dtype"], case["device"]): case for case in cases}


def _in_process(name: str, dtype: str, device: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.plan_speed", "--rounds", str(arguments.rounds)]
    command += ["--processor-time"] * arguments.processor_time
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if arguments.processor_time else {})}
    command += ["--case", name, dtype, device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    case: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print("\n".join(table([case])[2:]), file=sys.stderr, flush=True)
    if arguments.json:
        with arguments.json.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(case) + "\n")
    return case


def checkpoint(name: str) -> Path:
    """Return a model's folder; made on first use, but for the bundled one."""
    if name == "bundled":
        from lyra_emergence.bundled import bundled_directory

        return bundled_directory()
    if name == "llama-1.1b":
        return checkpoint_of("1.1b")
    from benchmarks.plan_accuracy import checkpoint as accuracy_checkpoint

    return accuracy_checkpoint(name)


def run_case(name: str, dtype: str, device: str, rounds: int) -> dict[str, Any]:
    """Return what each round predicted and measured, in tokens per second."""
    from lyra_emergence.checkpoint import read_checkpoint
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.loading import load
    from lyra_emergence.machine import probe_machine
    from lyra_emergence.plan import make_plan
    from lyra_emergence.speed import measure_rates, predict

    directory = checkpoint(name)
    index = read_checkpoint(directory)
    context = min(_CONTEXT, index.context_length or _CONTEXT)
    config = ModelConfig(model_id=str(directory), dtype=dtype, context_length=context, device_map=device)
    plan = make_plan(config, index, probe_machine(with_torch=True))
    made = plan.footprint
    shares = {block.name: block.active_share for block in made.blocks}
    loaded = load(config, directory=directory, plan=plan)
    _run(loaded, context)
    found = []
    for _ in range(rounds):
        rates = measure_rates()
        speed = predict(made, plan.placements, rates, active_share=shares, heads_per_key=made.heads_per_key)
        assert speed is not None
        bands = (speed.prefill_tokens_per_second, speed.decode_tokens_per_second)
        measured = _run(loaded, context)
        found.append(
            {
                kind: {"low": band.low, "likely": band.likely, "high": band.high, "measured": value}
                for kind, band, value in zip(KINDS, bands, measured, strict=True)
            }
        )
    loaded.close()
    return {"model": name, "dtype": dtype, "device": device, "weights": made.weights, "rounds": found}


def _run(loaded: Any, context: int) -> tuple[float, float]:
    """Return tokens per second of a prompt of half the context, and of tokens behind it."""
    from lyra_emergence.generation import Stepper

    vocabulary = int(loaded.model.config.get_text_config().vocab_size)
    prompt = min(loaded.plan.footprint.chunk, context // 2)
    stepper = Stepper(loaded)
    clock = time.perf_counter()
    # Reading a number of the result waits for an accelerator.
    float(stepper.prefill([7919 * place % vocabulary for place in range(prompt)])[0, 0])
    prefill = prompt / (time.perf_counter() - clock)
    times = []
    for token in range(_WARM + _TOKENS):
        clock = time.perf_counter()
        float(stepper.step(7919 * token % vocabulary)[0, 0])
        times.append(time.perf_counter() - clock)
    stepper.close()
    return prefill, 1 / median(times[_WARM:])


def table(cases: Sequence[dict[str, Any]]) -> list[str]:
    """Return a Markdown table: medians of the rounds, and in how many the measurement lay in the band."""
    return list(_rows(cases))


def _rows(cases: Sequence[dict[str, Any]]) -> Iterator[str]:
    figures = ("predicted", "measured", "in band")
    titles = [f"{what}: {figure}" for what in ("prompt", "answer") for figure in figures]
    yield f"| {' | '.join(['model', 'weights', 'dtype', 'device', *titles])} |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for case in cases:
        cells = [cell for kind in KINDS for cell in _cells([found[kind] for found in case["rounds"]])]
        row = [case["model"], f"{case['weights'] / 1e6:.0f} MB", case["dtype"], case["device"], *cells]
        yield f"| {' | '.join(row)} |"


def _cells(rounds: Sequence[dict[str, float]]) -> Iterator[str]:
    low, likely, high, measured = (
        median(found[figure] for found in rounds) for figure in ("low", "likely", "high", "measured")
    )
    yield f"{likely:,.3g} ({low:,.3g} to {high:,.3g})"
    yield f"{measured:,.3g}"
    yield f"{sum(found['low'] <= found['measured'] <= found['high'] for found in rounds)} of {len(rounds)}"


if __name__ == "__main__":
    main()
