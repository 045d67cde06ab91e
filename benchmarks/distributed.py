"""One model in one process and divided between two, on this machine: speed and memory.

    uv run python -m benchmarks.distributed

Each round starts `lyra.py bench` once in every way, one after the other, so that a slow minute of the machine falls on
all of them. Every process computes with one thread. Ranks on one machine share its memory and its cores: this shows
what dividing costs there, not what it brings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.checkpoints import SHAPES, checkpoint_of
from benchmarks.engines import spread

ROOT = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the model.

    Attributes:
        name: For the table.
        divided: The key `distributed`; None for one process.
        kernels: Whether Lyra's kernels may run; ranks have none.
    """

    name: str
    divided: dict[str, int] | None = None
    kernels: bool = False


WAYS = (
    Way("one process, torch's operators"),
    Way("one process, Lyra's kernels", kernels=True),
    Way("2 ranks, `tp_size` 2", {"tp_size": 2}),
    Way("2 ranks, `pp_size` 2", {"pp_size": 2}),
)


def main() -> None:
    """Run every way a few times and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="200m")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    directory = checkpoint_of(arguments.shape)
    found: dict[str, list[dict[str, Any]]] = {way.name: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way in WAYS:
            found[way.name].append(measure(way, directory))
    print(
        "| | prompt, tokens/s | single tokens/s | load, s | weights of each process | private memory of each, loaded |"
    )
    print("|---|---|---|---|---|---|")
    for name, rounds in found.items():
        print(f"| {name} | {' | '.join(cells(rounds))} |")


def measure(way: Way, directory: Path) -> dict[str, Any]:
    """Return what `lyra.py bench` finds."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LYRA_")}
    environ |= {"OMP_NUM_THREADS": "1", "LYRA_CPU_KERNELS": str(way.kernels).lower()}
    if way.divided:
        environ["LYRA_DISTRIBUTED"] = json.dumps(way.divided)
    program = [str(ROOT / "lyra.py"), "bench", str(directory), "--json", "--prompt", "256", "--new", "32"]
    command = [sys.executable, *(TORCHRUN if way.divided else ()), *program]
    done = subprocess.run(command, env=environ, cwd=directory, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def cells(rounds: list[dict[str, Any]]) -> list[str]:
    """Return a row's figures: the median and the range of the rounds' medians."""
    speeds = ("prefill_tokens_per_second", "decode_tokens_per_second")
    ranks = rounds[-1]["ranks"]
    weights = [f"{rank['weights'] / 1e6:.0f} MB" for rank in ranks] or ["all"]
    private = [f"{rank['private'] / 1e6:.0f} MB" for rank in ranks] or [f"{rounds[-1]['private_bytes'] / 1e6:.0f} MB"]
    return [
        *(spread([one[name]["median"] for one in rounds]) for name in speeds),
        spread([one["load_seconds"] for one in rounds]),
        ", ".join(weights),
        ", ".join(private),
    ]


if __name__ == "__main__":
    main()
