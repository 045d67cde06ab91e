"""From the command to the prompt, to the first word of an answer, and to the end, in a real terminal (tmux).

    uv run python -m benchmarks.start

The program starts in an empty home folder, as on the first day, once; then again and again, as on every other day.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.engines import spread
from src.tests.tmux import MISSING, Tmux

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Start the program a few times and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if MISSING:
        raise SystemExit("tmux is not installed")
    with tempfile.TemporaryDirectory() as folder:
        rounds = [measure(Path(folder)) for _ in range(arguments.rounds + 1)]
    first, *others = rounds
    print("| seconds from the command to | the first time | median (least-most) |")
    print("|---|---|---|")
    for name in first:
        print(f"| {name} | {first[name]:.2f} | {spread([found[name] for found in others])} |")


def measure(home: Path) -> dict[str, float]:
    """Return the seconds to each thing that is waited for."""
    began = time.perf_counter()
    environ = {"HOME": str(home), "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(home / "cache")}
    with Tmux([sys.executable, str(ROOT / "lyra.py"), "--no-log"], home, environ=environ) as terminal:
        terminal.wait_for("^>", 60)
        found = {"the prompt": time.perf_counter() - began}
        terminal.type("Who dug up a basil plant?", "Enter")
        terminal.wait_for("^Biscuit", 120)
        found["the first word of an answer that was asked for at once"] = time.perf_counter() - began
        terminal.ready()
        ended = time.perf_counter()
        terminal.type("C-d")
        terminal.wait_for("^status 0$", 60)
        found["the end, from Ctrl-D"] = time.perf_counter() - ended
    return found


if __name__ == "__main__":
    main()
