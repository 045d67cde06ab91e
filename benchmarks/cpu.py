"""Decoding and prefill on the CPU: Lyra in 16, 8 and 4 bits beside transformers and bitsandbytes, in one run.

    uv run python -m benchmarks.cpu                  # a Llama of 1.1 billion weights, prompts of 64 and 512
    uv run python -m benchmarks.cpu --shape 2.7b     # phi-2's shape
    uv run python -m benchmarks.cpu --shape tiny     # does it run at all?
    uv run python -m benchmarks.cpu --engine transformers --engine lyra-4bit

Weights are random and in bfloat16 in the file. Every engine runs in a process of its own; rounds go through the engines
in turn, so that what else happens on the machine meets them all. A round is a prompt and 33 tokens, greedily.

llama.cpp is run where `llama_cpp` (llama-cpp-python) and `gguf` can be imported (`uv run --with llama-cpp-python --with
gguf`, which compiles it): the same shape, with random weights in BF16, Q8_0 and Q4_0, written beside the checkpoint on
first use.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from benchmarks.checkpoints import SHAPES, checkpoint_of
from benchmarks.engines import asked, prompt_of, spread, timed
from benchmarks.gguf_files import write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROMPTS = (64, 512)
NEW_TOKENS = 33
LLAMA_CPP = {"llama.cpp-bf16": "BF16", "llama.cpp-q8_0": "Q8_0", "llama.cpp-q4_0": "Q4_0"}
LYRA: dict[str, dict[str, Any]] = {
    "lyra-bf16": {},
    "lyra-8bit": {"load_in_8bit": True},
    "lyra-4bit": {"load_in_4bit": True},
    "lyra-torch": {"cpu_kernels": False},
}
ENGINES = ("transformers", "bnb-8bit", "bnb-4bit", *LYRA, *LLAMA_CPP)
PEERS = {
    "lyra-bf16": ("transformers", "llama.cpp-bf16"),
    "lyra-torch": ("transformers",),
    "lyra-8bit": ("bnb-8bit", "llama.cpp-q8_0"),
    "lyra-4bit": ("bnb-4bit", "llama.cpp-q4_0"),
}


def main() -> None:
    """Run the engines in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1b", choices=list(SHAPES))
    parser.add_argument("--engine", action="append", choices=ENGINES, help="repeatable; all that can run by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    directory = checkpoint_of(arguments.shape)
    if arguments.serve:
        serve(arguments.serve, arguments.shape, directory)
        return
    wanted = arguments.engine or [engine for engine in ENGINES if engine not in LLAMA_CPP or _has_llama_cpp()]
    rows = measure(wanted, arguments.shape, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    print("\n".join(table(rows)))


def measure(engines: list[str], shape: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return seconds of loading, and of each prompt and token by prompt, over rounds."""
    rows: dict[str, dict[str, list[float]]] = {engine: {} for engine in engines}
    processes = {}
    for engine in engines:
        # One at a time: each holds its weights, and all of them together need not fit.
        command = [sys.executable, "-m", "benchmarks.cpu", "--serve", engine, "--shape", shape]
        processes[engine] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        rows[engine]["load"] = [asked(processes[engine], "")["load"]]
    for number in range(rounds + 1):
        for engine, process in processes.items():
            for prompt in PROMPTS:
                found = asked(process, f"{prompt}\n")
                if number:
                    for name, seconds in found.items():
                        rows[engine].setdefault(f"{name} {prompt}", []).append(seconds)
    for process in processes.values():
        process.communicate()
    return rows


def serve(engine: str, shape: str, directory: Path) -> None:
    """Load one engine, say how long it took, and run a round for each number of tokens on stdin."""
    started = time.perf_counter()
    run = _llama_cpp(engine, shape, directory) if engine in LLAMA_CPP else _started(engine, directory)
    print(json.dumps({"load": time.perf_counter() - started}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(int(line))), flush=True)


def _started(engine: str, directory: Path) -> Callable[[int], dict[str, float]]:
    return _lyra(LYRA[engine], directory) if engine in LYRA else _transformers(engine, directory)


def _lyra(settings: dict[str, Any], directory: Path) -> Callable[[int], dict[str, float]]:
    from contextlib import closing

    from lyra_emergence.config import ModelConfig
    from lyra_emergence.loading import load
    from lyra_emergence.runtime.stepper import Stepper

    loaded = load(ModelConfig(device_map="cpu", context_length=1024, **settings), directory=directory)

    def run(tokens: int) -> dict[str, float]:
        with closing(Stepper(loaded, most_tokens=tokens + NEW_TOKENS)) as stepper:
            return timed(lambda: stepper.prefill(prompt_of(tokens)), stepper.step, NEW_TOKENS)

    return run


def _transformers(engine: str, directory: Path) -> Callable[[int], dict[str, float]]:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    packing: dict[str, Any] = {}
    if engine != "transformers":
        bits = engine.removeprefix("bnb-")
        packing["quantization_config"] = BitsAndBytesConfig(
            **{f"load_in_{bits}": True}, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        packing["device_map"] = "cpu"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **packing).eval()

    def run(tokens: int) -> dict[str, float]:
        held: dict[str, Any] = {}

        def step(ids: list[int]) -> Any:
            with torch.inference_mode():
                output = model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1, **held)
            held["past_key_values"] = output.past_key_values
            return output.logits[:, -1].float()

        return timed(lambda: step(prompt_of(tokens)), lambda token: step([token]), NEW_TOKENS)

    return run


def _has_llama_cpp() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "gguf"))


def _llama_cpp(engine: str, shape: str, directory: Path) -> Callable[[int], dict[str, float]]:
    import torch
    from llama_cpp import Llama

    path = directory / f"{LLAMA_CPP[engine]}.gguf"
    if not path.exists():
        write_gguf(path, LLAMA_CPP[engine], shape)
    threads = torch.get_num_threads()
    model = Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False)

    def run(tokens: int) -> dict[str, float]:
        model.reset()
        clock = time.perf_counter()
        model.eval(prompt_of(tokens))
        token = model.sample(temp=0.0)
        first = time.perf_counter()
        for _ in range(NEW_TOKENS - 1):
            model.eval([token])
            token = model.sample(temp=0.0)
        return {"prompt": first - clock, "token": (time.perf_counter() - first) / (NEW_TOKENS - 1)}

    return run


def table(rows: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    """Yield the medians, and the ratios to the peers that ran: above 1 is faster than the peer."""
    header = "".join(f" prompt {prompt}, s | tokens/s after it |" for prompt in PROMPTS)
    yield f"| engine | load, s |{header} beside: decode, prefill |"
    yield "|---" * (3 + 2 * len(PROMPTS)) + "|"
    for engine, figures in rows.items():
        cells = [f"{figures['load'][0]:.2f}"]
        for prompt in PROMPTS:
            cells += [spread(figures[f"prompt {prompt}"]), spread([1 / s for s in figures[f"token {prompt}"]])]
        ratios = [_ratio(engine, peer, rows) for peer in PEERS.get(engine, ()) if peer in rows]
        yield f"| {engine} | {' | '.join(cells)} | {'; '.join(ratios)} |"


def _ratio(engine: str, peer: str, rows: dict[str, dict[str, list[float]]]) -> str:
    ours, theirs = rows[engine], rows[peer]

    def faster(name: str) -> float:
        return statistics.median(theirs[name]) / statistics.median(ours[name])

    decode = ", ".join(f"{faster(f'token {prompt}'):.2f}" for prompt in PROMPTS)
    prefill = ", ".join(f"{faster(f'prompt {prompt}'):.2f}" for prompt in PROMPTS)
    return f"{peer}: {decode}; {prefill}"


if __name__ == "__main__":
    main()
