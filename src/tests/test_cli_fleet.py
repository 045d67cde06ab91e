"""`lyra.py plan --machines`: what it shows, and the way from a model that does not fit to a chat with a server."""

from __future__ import annotations

import io
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import pytest

from lyra_emergence.cli import main
from lyra_emergence.cli.console import Console
from lyra_emergence.cli.fleet_view import render_fleet
from lyra_emergence.fleet import FleetModel, FleetPlan, Hardware, plan_fleet, read_machines
from lyra_emergence.fleet.handover import hand_over
from lyra_emergence.footprint import estimate_footprint

from .paper_checkpoints import llama
from .serving import ServerProcess
from .test_cli_plan import Terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
SIZES = {"layers": 80, "hidden": 8192, "inner": 28672, "heads": 64, "key_heads": 8, "vocab": 128_256}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("paper") / "llama-70b"
    llama(path, context=131_072, **SIZES)
    return path


def planned(directory: Path, *machines: str) -> FleetPlan:
    from lyra_emergence.checkpoint import read_checkpoint

    index = read_checkpoint(directory)
    return plan_fleet(FleetModel(index, estimate_footprint(index)), read_machines(machines), Hardware())


def shown(made: FleetPlan, *, stdout: io.StringIO | None = None, **environ: str) -> list[str]:
    console = Console(stdout=stdout or io.StringIO(), stderr=io.StringIO(), environ=environ)
    return list(render_fleet(made, hand_over(made.model, made.chosen, made.machines), "llama-70b", console))


def test_the_table_and_the_reason(directory: Path) -> None:
    text = "\n".join(shown(planned(directory, "2x8x80GB")))
    assert text.startswith(
        "llama-70b\n"
        "  bfloat16 · 141 GB of weights · context 8192 tokens\n"
        "  on 2 machines with 8 GPUs of 80.0 GB each\n"
        "\n"
        "  tensor  stages  replicas         fullest GPU  at once  tokens/s  prompt/s\n"
        ">      8       1         2  18.8 GB of 73.6 GB      164        35      1991\n"
        "       4       1         4  36.8 GB of 73.6 GB       55        20      1224\n"
        "       2       1         8  72.8 GB of 73.6 GB        1        10       687\n"
        "       1       2         8  72.9 GB of 73.6 GB        1       5.3       365\n"
        "\n"
        "chosen   the fastest for one conversation: 35 (19 to 47) tokens/s, 8 GPUs on 1\n"
        "         machine for a replica; each GPU reads its share of 17.5 GB in all\n"
        "         stages for a token at 1.00 TB/s, half of the context filled\n"
        "traffic  for a token, each GPU sends 4.65 MB to those that share its layers\n"
        "\n"
        "with vLLM, on one machine, in an environment of its own:\n"
        "    vllm serve "
    )


def test_lines_fit_80_columns_but_for_commands(directory: Path) -> None:
    for machines in (["8x24GB"], ["2x8x80GB"], ["1x1000x24GB"], ["2x48GB", "5x24GB"]):
        lines = shown(planned(directory, *machines))
        assert max(len(line) for line in lines if not line.startswith("    ") or line.startswith("     ")) <= 80
        assert all(line == line.rstrip() for line in lines)


def test_a_narrow_terminal_has_fewer_columns(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = shown(planned(directory, "2x8x80GB"), stdout=Terminal(), TERM="xterm", NO_COLOR="1")
    titles = next(line for line in lines if line.lstrip().startswith("tensor"))
    assert titles.split() == ["tensor", "stages", "replicas"]
    assert max(len(line) for line in lines if not line.startswith("    ") or line.startswith("     ")) <= 40


def test_color_and_none(directory: Path) -> None:
    made = planned(directory, "2x8x80GB")
    colored = "\n".join(shown(made, stdout=Terminal(), TERM="xterm"))
    assert "\x1b[1m>      8       1         2" in colored
    assert "\x1b" not in "\n".join(shown(made, stdout=Terminal(), TERM="xterm", NO_COLOR="1"))
    assert "\x1b" not in "\n".join(shown(made))


def test_the_program_prints_json(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(directory), "--machines", "4x4x24GB", "--link", "100Gbit", "--gpu-link", "64GB/s"]
    assert main([*command, "--bandwidth", "900GB/s", "--tflops", "165", "--batch", "2", "--json"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert captured.err == ""
    assert data["format"] == "lyra.fleet/1"
    assert data["hardware"] == {
        "bandwidth": 9e11,
        "flops": 1.65e14,
        "gpu_link": 6.4e10,
        "link": 1.25e10,
        "assumed": [],
    }
    assert data["batch"] == 2
    first = data["layouts"][0]
    assert (first["tensor_parallel"], first["pipeline_parallel"], first["machines"]) == (4, 2, 2)
    assert set(data["handover"]) == {"vllm", "endpoint", "config", "torchrun", "notes"}
    assert len(data["handover"]["vllm"]) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--machines", "24GB"], "error: in '--machines': '24GB' names no machines\nhint: 4x24GB is 4 machines"),
        (["--machines", "4x24GB", "--link", "10Gb"], "error: in '--link': '10Gb' is no rate; write '10Gbit/s' for"),
        (["--machines", "4x24GB", "--bandwidth", "much"], "error: in '--bandwidth': 'much' is no rate"),
        (["--machines", "4x24GB", "--gpu", "8GB"], "error: --gpu is about one machine, --machines about several"),
        (["--machines", "4x24GB", "--what-if"], "error: --what-if is about one machine, --machines about several"),
        (["--machines", "4x24GB", "--explain", "x"], "error: --explain is about one machine"),
        (["--machines", "2000x24GB"], "error: in '--machines': 2,000 GPUs are more than the 1,000"),
        (["--link", "10Gbit"], "error: --link, --gpu-link, --bandwidth and --tflops are about several machines"),
        (["--machines", "4x24GB", "--tflops", "0"], "error: Invalid value for '--tflops'"),
    ],
)
def test_wrong_options_are_named(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *options]) == 2
    assert said in capsys.readouterr().err


def test_machines_that_are_too_few(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(directory), "--machines", "4x24GB", "--4bit"]) == 0
    capsys.readouterr()
    assert main(["plan", str(directory), "--machines", "4x24GB"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: the model does not fit 4 machines with one GPU of 24.0 GB each: weights")
    assert "hint: 7 machines with one GPU of 24.0 GB each would hold it; or try" in captured.err


def test_eight_bits_are_said_to_be_none_of_vllms(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(directory), "--machines", "8x24GB", "--8bit"]) == 0
    captured = capsys.readouterr()
    assert (
        "warning: vLLM packs weights to 4 bits only as it loads them: planned for weights as they are" in captured.err
    )
    assert "bitsandbytes" not in captured.out


def test_a_model_that_is_read_from_disk_is_told_what_would_hold_it(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(directory), "--gpu", "24GB", "--ram", "32GB"]) == 0
    told = "note: most layers are read from disk for each token; more machines would hold them:\n    "
    command = f"lyra.py plan {shlex.quote(str(directory))} --machines 7x24GB"
    assert told + command + "\n" in capsys.readouterr().err
    assert main(shlex.split(command)[1:]) == 0
    assert "7 machines with one GPU of 24.0 GB each" in capsys.readouterr().out
    assert main(["plan", str(directory), "--gpu", "24GB", "--ram", "200GB"]) == 0
    assert "--machines" not in capsys.readouterr().err


def test_commands_of_an_error_are_not_broken_on_a_narrow_terminal() -> None:
    stderr = Terminal()
    command = "    vllm serve " + " ".join(f"--option-{number} value" for number in range(20))
    Console(stderr=stderr, environ={"TERM": "xterm", "NO_COLOR": "1"}).error("too large", f"try\nthis:\n{command}")
    assert command in stderr.getvalue().splitlines()


# --- From a model that does not fit to an answer -------------------------------------------------


def endpoint_line(error: str) -> list[str]:
    """The arguments of the chat that an error tells to start."""
    (line,) = [line for line in error.splitlines() if "--endpoint" in line]
    program, *arguments = shlex.split(line)
    assert program == "lyra.py"
    return arguments


def refused(directory: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Ask for a plan that memory does not hold; return what the error tells to start instead."""
    assert main(["plan", str(directory), "--max-memory", "cpu=500kB", "--context", "256"]) == 3
    error = capsys.readouterr().err
    assert "error: the model does not fit: it needs" in error
    assert "1 machine with one GPU of 24.0 GB would hold it" in error
    assert f"    vllm serve {directory} --tensor-parallel-size 1 --pipeline-parallel-size 1 " in error
    return endpoint_line(error)


def at_port_of(arguments: list[str], url: str) -> list[str]:
    """What was told to start, for a server that had to take another port than vLLM's."""
    told, there = urlsplit(arguments[1]), urlsplit(url)
    assert (told.scheme, told.hostname, told.port, told.path) == ("http", "127.0.0.1", 8000, "/v1")
    return [arguments[0], told._replace(netloc=f"{told.hostname}:{there.port}").geturl()]


def test_from_a_refusal_to_an_answer_of_lyras_own_server(
    checkpoints: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny = checkpoints("llama")
    arguments = refused(tiny, capsys)
    server = ServerProcess(tiny, tmp_path)
    try:
        assert main([*at_port_of(arguments, server.url), "--json", "--no-log", "Who is there?"]) == 0
    finally:
        server.end()
    answer = json.loads(capsys.readouterr().out)
    assert answer["stats"]["new_tokens"] > 0
    assert answer["endpoint"]["url"] == server.url


@pytest.fixture
def transformers_server(home: Path) -> Iterator[str]:
    """`transformers serve`: a server that is none of ours, with OpenAI's protocol."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    if not program.exists():
        pytest.skip("transformers' own program is not installed")
    (home / ".cache" / "huggingface" / "hub").mkdir(parents=True)
    with (home / "served").open("w") as said:
        process = subprocess.Popen(
            [program, "serve", "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=said,
        )
    try:
        for _ in range(600):
            if process.poll() is not None:
                pytest.fail((home / "served").read_text())
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def test_from_a_refusal_to_an_answer_of_a_server_that_is_none_of_ours(
    checkpoints: Callable[[str], Path], capsys: pytest.CaptureFixture[str], transformers_server: str
) -> None:
    tiny = checkpoints("llama")
    arguments = at_port_of(refused(tiny, capsys), transformers_server)
    assert main([*arguments, "--model", str(tiny), "--json", "--no-log", "Who is there?"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["stats"]["new_tokens"] > 0
    assert answer["endpoint"] == {"url": transformers_server, "model": str(tiny)}
