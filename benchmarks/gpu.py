"""Layers that do not fit a GPU: Lyra beside transformers with accelerate, by one map of devices, in one run.

    uv run python -m benchmarks.gpu                          # 1.1 and 8 billion weights, what 9 minutes allow
    uv run python -m benchmarks.gpu --shape 13b --card 24GB --share 0.5
    uv run python -m benchmarks.gpu --shape tiny --simulated # does it run at all? On the tests' simulated accelerator

Weights are random, in bfloat16, and made on the spot. A card of any size plays a small one: each process may take no
more than `--card` of it (`set_per_process_memory_fraction`). Of the layers, the first `--share` are on the GPU, with
norm and head; the others and the table of embeddings in main memory. accelerate gets the same map: it copies those
layers to the GPU for every pass. With a share of 1 all engines have all on the GPU, and Lyra runs with its steps
compiled too.

Every engine runs in a process of its own; rounds go through the engines in turn. A round is a prompt of 64 and one of
2,048 tokens, and 8 tokens after each. Before the first case the machine is measured: what a product of one row reads of
main memory and of the GPU's, and what the bus copies. The bound of decoding is each device's weights at that rate.

Cases begin as long as there is time; what was left out is said.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.checkpoints import LARGE, large_checkpoint_of
from benchmarks.engines import asked, prompt_of, spread, timed
from lyra_emergence.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lyra_emergence.speed import MachineRates

PROMPTS = (64, 2048)
NEW_TOKENS = 9
CONTEXT = 4096
ENGINES: dict[str, dict[str, Any]] = {
    "lyra": {},
    "lyra-in-place": {"prompt_streaming": False},
    "lyra-one-chunk": {"prefill_chunk": PROMPTS[-1]},
}
"""What is compared where layers are in main memory: long prompts stream them through the GPU, or do not, or once."""
WHOLE_ENGINES: dict[str, dict[str, Any]] = {"lyra": {}, "lyra-compiled": {"compile_decode": True}}
"""What is compared where all are on the GPU: steps run kernel by kernel, or compiled. The first round compiles."""
PEER = "accelerate"
CARDS = {"tiny": "1GB", "1.1b": "6GB", "3b": "8GB", "8b": "12GB", "13b": "24GB"}
WHOLE_CARDS = {"8b": "24GB", "13b": "40GB"}
"""Cards that hold all of a shape, where its own does not."""
SHARES = (0.5, 1.0, 0.25, 0.75)
_LENT = ExitStack()
_RESERVE = 75
"""Seconds that have to be left for a case to begin."""


@dataclass(frozen=True)
class Case:
    """What is compared: a shape, the share of its layers on the GPU, and how large that GPU is."""

    shape: str
    share: float
    card: str

    def device_map(self) -> dict[str, int | str]:
        """Return the map that every engine gets."""
        if self.share >= 1:
            return {"": 0}
        layers = LARGE[self.shape]["num_hidden_layers"]
        here = round(self.share * layers)
        named = {f"model.layers.{at}": 0 if at < here else "cpu" for at in range(layers)}
        return {"model.embed_tokens": "cpu", **named, "model.norm": 0, "lm_head": 0, "model.rotary_emb": 0}


def main() -> None:
    """Run the cases and print a table of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=list(LARGE), help="repeatable; 1.1b and 8b by default")
    parser.add_argument("--share", action="append", type=float, help="of the layers on the GPU; repeatable")
    parser.add_argument("--card", help="how large the GPU is to be; by default as the shape asks for")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=540, help="for all of it")
    parser.add_argument("--simulated", action="store_true", help="the tests' simulated accelerator in place of a GPU")
    parser.add_argument("--json", type=Path, help="a file for all figures, written after each case")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = list(_cases(arguments))
    if arguments.serve:
        serve(arguments.serve, cases[0], simulated=arguments.simulated)
        return
    end = time.monotonic() + arguments.seconds
    measured = asked(_start("rates", cases[0], simulated=arguments.simulated), "")
    found: list[dict[str, Any]] = []
    print("\n".join(header(measured)), flush=True)
    for case in cases:
        if time.monotonic() + _RESERVE > end:
            print(f"left out for lack of time: {case.shape}, {case.share:.0%} of the layers on {case.card}", flush=True)
            continue
        found.append({**vars(case), "engines": measure(case, arguments.rounds, simulated=arguments.simulated, end=end)})
        print("\n".join(lines(case, found[-1]["engines"])), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps({"machine": measured, "cases": found}, indent=1))


def _cases(arguments: argparse.Namespace) -> Iterator[Case]:
    for shape in arguments.shape or ["1.1b", "8b"]:
        for share in arguments.share or SHARES:
            card = WHOLE_CARDS.get(shape, CARDS[shape]) if share >= 1 else CARDS[shape]
            yield Case(shape, share, arguments.card or card)


def _start(engine: str, case: Case, *, simulated: bool) -> Any:
    command = [sys.executable, "-m", "benchmarks.gpu", "--serve", engine]
    command += ["--shape", case.shape, "--share", str(case.share), "--card", case.card]
    command += ["--simulated"] * simulated
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def measure(case: Case, rounds: int, *, simulated: bool, end: float) -> dict[str, dict[str, list[float]]]:
    """Return what each engine took, round by round, as far as there is time."""
    large_checkpoint_of(case.shape)
    rows: dict[str, dict[str, list[float]]] = {}
    processes = {}
    try:
        # One after the other, and the peer first: pages of the file are in the kernel's cache for both.
        for engine in (PEER, *(ENGINES if case.share < 1 else WHOLE_ENGINES)):
            processes[engine] = _start(engine, case, simulated=simulated)
            rows[engine] = {name: [figure] for name, figure in asked(processes[engine], "").items()}
        for number in range(rounds + 1):
            for engine, process in processes.items():
                for prompt in PROMPTS:
                    found = asked(process, f"{prompt}\n")
                    for name, seconds in found.items() if number or time.monotonic() > end else ():
                        rows[engine].setdefault(f"{name} {prompt}", []).append(seconds)
            if time.monotonic() > end:
                break
    finally:
        for process in processes.values():
            process.communicate()
    return rows


def serve(engine: str, case: Case, *, simulated: bool) -> None:
    """Load one engine, print what that took, and run a round for each number of tokens on stdin."""
    device = _cap(case.card, simulated=simulated)
    if engine == "rates":
        print(json.dumps(_rates(device)), flush=True)
        return
    directory = large_checkpoint_of(case.shape)
    started = time.perf_counter()
    run, known = _accelerate(case, directory, device) if engine == PEER else _lyra(engine, case, directory)
    print(json.dumps({"load": time.perf_counter() - started, **known}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(int(line))), flush=True)


def _cap(card: str, *, simulated: bool) -> str:
    """Let this process have no more of the accelerator than a card of that size has; return the device."""
    import torch

    if simulated:
        from src.tests import simulated_accelerator

        accelerator = simulated_accelerator.load()
        _LENT.enter_context(accelerator.lent())
        accelerator.set_cap(parse_bytes(card))
        return "sim:0"
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU here: --simulated runs the code on the tests' accelerator")
    total = torch.cuda.mem_get_info(0)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, parse_bytes(card) / total), 0)
    return "cuda:0"


def _rates(device: str) -> dict[str, Any]:
    """Return what this machine reads, multiplies and copies, in its own words and as Lyra's plan takes it."""
    from lyra_emergence.machine import probe_machine
    from lyra_emergence.speed import measure_rates

    found = measure_rates(probe_machine(with_torch=True))
    here = found.of(device)
    assert here is not None
    assert here.copy is not None
    return {
        "machine": found.fingerprint,
        "main memory": found.cpu.dtypes["bfloat16"].read.likely,
        "device memory": here.dtypes["bfloat16"].read.likely,
        "copy": here.copy.likely,
        "staged": here.staged.likely if here.staged else 0,
        "rates": found.to_json(),
    }


def _lyra(engine: str, case: Case, directory: Path) -> tuple[Callable[[int], dict[str, float]], dict[str, Any]]:
    from lyra_emergence.bench import decode_limit
    from lyra_emergence.checkpoint import read_checkpoint
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.loading import load
    from lyra_emergence.machine import probe_machine
    from lyra_emergence.plan import make_plan
    from lyra_emergence.runtime.stepper import Stepper
    from lyra_emergence.speed import predict, rates

    named = {name: place for name, place in case.device_map().items() if name != "model.rotary_emb"}
    config = ModelConfig(device_map=named, context_length=CONTEXT, **(ENGINES | WHOLE_ENGINES)[engine], **_limits(case))
    machine = probe_machine(with_torch=True)
    known = rates(machine)
    plan = make_plan(config, read_checkpoint(directory), machine)
    clock = time.perf_counter()
    loaded = load(config, directory=directory, plan=plan)
    seconds = time.perf_counter() - clock
    if loaded.report.rung not in ("full", "planned"):
        raise SystemExit(f"it does not fit as the case has it: {loaded.report.attempts}")
    _use(loaded, known)

    def run(tokens: int) -> dict[str, float]:
        with closing(Stepper(loaded, most_tokens=tokens + NEW_TOKENS)) as stepper:
            return timed(lambda: stepper.prefill(prompt_of(tokens)), stepper.step, NEW_TOKENS)

    speed = predict(plan.footprint, plan.placements, known, heads_per_key=plan.footprint.heads_per_key)
    told: dict[str, Any] = {"load": seconds, "bound": decode_limit(plan, known) or 0}
    if speed is not None:
        told["predicted decode"] = speed.decode_tokens_per_second.likely
        told["predicted prefill"] = speed.prefill_tokens_per_second.likely
    return run, told


def _limits(case: Case) -> dict[str, Any]:
    return {"max_memory": {"0": case.card}, "enable_progressive_fallback": False}


def _use(loaded: Any, known: MachineRates) -> None:
    """Let the shortest prompt for streaming be the one that was measured now, on whatever device this is."""
    from lyra_emergence.guests import least_tokens

    plan = loaded.plan
    loaded.residency.least_tokens = least_tokens(plan.placements, plan.footprint, known)


def _accelerate(case: Case, directory: Path, device: str) -> tuple[Callable[[int], dict[str, float]], dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    named = {name: device if place == 0 else place for name, place in case.device_map().items()}
    clock = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map=named).eval()
    seconds = time.perf_counter() - clock

    def run(tokens: int) -> dict[str, float]:
        held: dict[str, Any] = {}

        def step(ids: list[int]) -> Any:
            with torch.inference_mode():
                inputs = torch.tensor([ids], device=device)
                output = model(input_ids=inputs, use_cache=True, logits_to_keep=1, **held)
            held["past_key_values"] = output.past_key_values
            return output.logits[:, -1].float()

        return timed(lambda: step(prompt_of(tokens)), lambda token: step([token]), NEW_TOKENS)

    return run, {"load": seconds}


def header(measured: dict[str, Any]) -> Iterator[str]:
    """Yield what the machine does, and the head of the table."""
    names = ("main memory", "device memory", "copy", "staged")
    yield f"{measured['machine']}: {', '.join(f'{name} {format_bytes(int(measured[name]))}/s' for name in names)}"
    yield ""
    prompts = "".join(f" prompt {prompt}, s | tokens/s after it |" for prompt in PROMPTS)
    ratios = " beside accelerate: load; prompts; decode | of the bound; of what was predicted |"
    yield f"| shape, card, layers there | engine | load, s |{prompts}{ratios}"
    yield "|---" * (5 + 2 * len(PROMPTS)) + "|"


def lines(case: Case, rows: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    """Yield a line for each engine: medians with least and most, and medians' ratios, above 1 being faster."""
    for engine, figures in rows.items():
        cells = [f"{case.shape}, {case.card}, {case.share:.0%}", engine, f"{figures['load'][0]:.2f}"]
        for prompt in PROMPTS:
            cells += [spread(figures[f"prompt {prompt}"]), spread([1 / s for s in figures[f"token {prompt}"]])]
        cells += [_beside(figures, rows[PEER]) if engine != PEER else "", _known(figures)]
        yield f"| {' | '.join(cells)} |"


def _beside(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> str:
    def faster(name: str) -> str:
        return f"{statistics.median(theirs[name]) / statistics.median(ours[name]):.2f}"

    groups = (["load"], [f"prompt {prompt}" for prompt in PROMPTS], [f"token {prompt}" for prompt in PROMPTS])
    return "; ".join(", ".join(map(faster, names)) for names in groups)


def _known(figures: dict[str, list[float]]) -> str:
    if "bound" not in figures:
        return ""
    decode = 1 / statistics.median(figures[f"token {PROMPTS[0]}"])
    told = f"{decode / figures['bound'][0]:.2f}" if figures["bound"][0] else "?"
    if "predicted decode" in figures:
        prefill = PROMPTS[-1] / statistics.median(figures[f"prompt {PROMPTS[-1]}"])
        told += f"; decode {decode / figures['predicted decode'][0]:.2f}"
        told += f", prompt {prefill / figures['predicted prefill'][0]:.2f}"
    return told


if __name__ == "__main__":
    main()
