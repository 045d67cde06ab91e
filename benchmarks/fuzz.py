"""Fuzzes what reads files of strangers, guided by coverage, for a bounded time.

    uv run --group fuzz python -m benchmarks.fuzz                       # a minute for each target
    uv run --group fuzz python -m benchmarks.fuzz --minutes 10 --target header

Targets and seeds are those of src/tests/fuzz_targets.py. Each target runs in a process of its own under atheris, with a
limit of 10 s and 1 GiB for an input. An input that fails is kept beside the corpus, and printed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

_CHILD = "--child"
_DONE = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_COVERED = re.compile(r"cov: (\d+) ft: (\d+)")


def main() -> int:
    """Fuzz each target, print counts, and return 1 where an input failed."""
    if sys.argv[1:2] == [_CHILD]:
        fuzz(*sys.argv[2:])
    from tests.fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="repeatable; all by default")
    parser.add_argument("--minutes", type=float, default=1.0, help="for each target")
    parser.add_argument("--corpus", type=Path, help="folder to go on from; a temporary one by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = arguments.corpus or Path(folder)
        failed = [name for name in arguments.target or TARGETS if not run(name, corpus / name, arguments.minutes)]
    return 1 if failed else 0


def run(name: str, corpus: Path, minutes: float) -> bool:
    """Fuzz one target in a child process; return whether no input failed."""
    from tests.fuzz_targets import SEEDS, WORDS

    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[name]):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = corpus.with_name(f"{name}.words")
    words.write_text("".join(f"{json.dumps(word)}\n" for word in WORDS), encoding="ascii")
    limits = [f"-max_total_time={round(minutes * 60)}", "-timeout=10", "-rss_limit_mb=1024", "-max_len=4096"]
    output = ["-print_final_stats=1", f"-artifact_prefix={corpus.parent}/{name}-", f"-dict={words}"]
    command = [sys.executable, "-m", "benchmarks.fuzz", _CHILD, name, *limits, *output, str(corpus)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    executed = _DONE.search(done.stderr)
    covered = list(_COVERED.finditer(done.stderr))
    print(
        f"{name:14} {int(executed[1]) if executed else 0:10,} inputs, {covered[-1][1] if covered else '?':>5} edges, "
        f"{time.perf_counter() - started:5.0f} s, {'failed' if done.returncode else 'no failure'}",
        flush=True,
    )
    if done.returncode:
        print(done.stdout[-4000:])
        for path in sorted(corpus.parent.glob(f"{name}-*")):
            print(path.name, path.read_bytes()[:2000])
    return done.returncode == 0


def fuzz(name: str, *options: str) -> None:
    """Fuzz one target in this process, which ends with it. Nothing of Lyra may have been imported before."""
    import atheris

    with atheris.instrument_imports(include=["lyra_emergence"]):
        from tests.fuzz_targets import TARGETS
    atheris.Setup([sys.argv[0], *options], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
