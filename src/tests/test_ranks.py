"""Several processes on this machine, started by torchrun as a person starts them; gloo carries what they tell."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from .running import PROMPT, reference
from .tmux import MISSING, Tmux

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
LYRA = str(ROOT / "lyra.py")
LONGEST = 120
"""Seconds that any of them may take: a rank that hangs must not hang the tests."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchrun and gloo, as they are on Linux")


def environment(**more: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("LYRA_")}
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    return own | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"} | more


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def started(launcher: Sequence[str], program: Sequence[str], **settings: Any) -> subprocess.Popen[str]:
    environ = settings.pop("env", None) or environment()
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*TORCHRUN, *launcher, *program], text=True, env=environ, **pipes, **settings)


def two_nodes(program: Sequence[str], *folders: Path, **more: str) -> list[tuple[int, str, str]]:
    """Run two torchruns with a process each, as on two machines; return the status, stdout and stderr of both."""
    meeting = ("--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    nodes = [
        started(
            ("--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1", *meeting),
            program,
            cwd=folder,
            env=environment(**more),
        )
        for node, folder in enumerate(folders)
    ]
    try:
        said = [node.communicate(timeout=LONGEST) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, *pair) for node, pair in zip(nodes, said, strict=True)]


def ours(stderr: str) -> str:
    """What was said before torchrun's own lines."""
    return re.split(r"^(?:[WE]\d{4} |Traceback )", stderr, maxsplit=1, flags=re.MULTILINE)[0]


def check(found: dict[str, Any], directory: Path, weights: list[int], held: int) -> None:
    """What a divided model came to, beside one process."""
    expected = reference(directory)
    assert found["greedy"] == expected
    assert found["again"] == expected
    assert found["chunked"] == expected
    assert found["in turn"] == [[token] * 2 for token in expected[:6]]
    assert found["drawn"][0] == found["drawn"][1] != expected
    for name, caches in (("ready", [0, 0]), ("under way", [held, held])):
        ranks = found[name]
        assert [one["rank"] for one in ranks] == [0, 1]
        assert [one["weights"] for one in ranks] == [one["planned_weights"] for one in ranks] == weights
        assert [one["kv_cache"] for one in ranks] == caches
        assert all(one["device"] == "cpu" and one["private"] > 0 for one in ranks)


# Both tiny models, float32: tables of 384 rows of 64; 4 layers of queries and output of 64 x 64, keys and values of
# 32 x 64 and an MLP of 3 matrices of 128 x 64; norms of 64. Llama has 2 norms in a layer, and a head of its own; Gemma
# has 4, and a head that is tied to the table.
TABLE, NORM = 384 * 64 * 4, 64 * 4
MATRICES = (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64) * 4
CACHED = 2 * 2 * 16 * 4  # keys and values of 2 heads of 16, for a layer and a token
UNDER_WAY = len(PROMPT) + 4
"""Tokens that a cache holds once five are chosen."""


def test_two_machines_share_each_layer(checkpoints: Callable[[str], Path]) -> None:
    directory = checkpoints("llama")
    program = ("-m", "src.tests.rank_program", str(directory), '{"tp_size": 2}')
    (status, out, err), (other_status, other_out, other_err) = two_nodes(program, ROOT, ROOT)
    assert (status, other_status) == (0, 0), (err, other_err)
    assert other_out == ours(other_err) == ""
    share = (2 * TABLE + 4 * MATRICES) // 2 + 9 * NORM
    check(json.loads(out), directory, [share, share], 4 * CACHED // 2 * UNDER_WAY)


def test_layers_in_turn_behind_a_window(checkpoints: Callable[[str], Path]) -> None:
    directory = checkpoints("gemma2")
    program = ("-m", "src.tests.rank_program", str(directory), '{"pp_size": 2}')
    ranks = started(("--standalone", "--nproc-per-node", "2"), program, cwd=ROOT)
    out, err = ranks.communicate(timeout=LONGEST)
    assert ranks.returncode == 0, err
    layers = TABLE + 2 * (MATRICES + 4 * NORM)
    check(json.loads(out), directory, [layers, layers + NORM], 2 * CACHED * UNDER_WAY)


def test_what_goes_wrong_on_another_machine_is_told_once(tmp_path: Path, checkpoints: Callable[[str], Path]) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        shutil.copytree(checkpoints("llama"), folder / "model")
    damaged = folders[1] / "model" / "model.safetensors"
    os.truncate(damaged, damaged.stat().st_size - 10)
    # The same path on both, which leads each process to its own folder.
    program = (LYRA, "--no-log", "--model", "/proc/self/cwd/model", "Hello")
    sizes = '{"tp_size": 2}'
    (status, out, err), (other_status, other_out, other_err) = two_nodes(program, *folders, LYRA_DISTRIBUTED=sizes)
    assert (status, other_status) == (1, 1)
    assert (out, other_out, ours(other_err)) == ("", "", "")
    said = ours(err).splitlines()
    assert said[-2].startswith(f"error: rank 1 on {socket.gethostname()}: /proc/self/cwd/model/model.safetensors")
    assert said[-1].startswith("hint: ")
    assert err.count("error: ") == 1


def rank_of(launcher: int, rank: int) -> psutil.Process:
    return next(
        one for one in psutil.Process(launcher).children(recursive=True) if one.environ().get("RANK") == str(rank)
    )


KILLED = "error: rank 1 ended without saying why, as a process does that is killed"


def test_a_rank_that_is_killed_in_the_middle_of_an_answer(tmp_path: Path, checkpoints: Callable[[str], Path]) -> None:
    program = (LYRA, "--no-log", "--model", str(checkpoints("llama")), "--max-new-tokens", "200", "Once")
    environ = environment(LYRA_DISTRIBUTED='{"pp_size": 2}')
    ranks = started(("--standalone", "--nproc-per-node", "2"), program, cwd=tmp_path, env=environ)
    try:
        assert ranks.stdout is not None
        assert ranks.stdout.read(10)
        rank_of(ranks.pid, 1).kill()
        _, err = ranks.communicate(timeout=LONGEST)
    finally:
        ranks.kill()
    assert ranks.returncode == 1
    # torchrun may notice first, and have its say before ours.
    assert err.splitlines().count(KILLED) == 1
    assert err.count("error: ") == 1


@pytest.mark.skipif(MISSING, reason="tmux is not installed")
def test_a_chat_whose_answer_is_stopped_and_whose_rank_is_killed(
    tmp_path: Path, checkpoints: Callable[[str], Path]
) -> None:
    launcher = (*TORCHRUN, "--standalone", "--nproc-per-node", "2")
    command = (*launcher, LYRA, "--no-log", "--model", str(checkpoints("llama")), "--max-new-tokens", "200")
    environ = environment(LYRA_DISTRIBUTED='{"tp_size": 2}')
    own = {name: environ[name] for name in ("LYRA_DISTRIBUTED", "PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")}
    with Tmux(command, tmp_path, rows=40, columns=160, environ=own) as terminal:
        terminal.ready()
        terminal.type("Once upon a time", "Enter")
        terminal.wait_for(r"^note: rank 1 on \S+ cpu: 396 kB of weights, as planned.*\n(?:  .*\n)?\S+ \S+ \S+", 60)
        terminal.type("C-c")
        terminal.wait_for(r"^\(stopped\)")
        terminal.ready()
        # While nobody asks anything: torchrun notices, and tells rank 0 by a signal.
        rank_of(terminal.process("torch.distributed.run"), 1).kill()
        terminal.wait_for(f"^{KILLED}$")
        terminal.wait_for("^status 1$")
