"""docs/model-sharding.md is a promise: each of its code blocks and commands is run here as it is written there."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lyra_emergence.cli import main
from lyra_emergence.machine import Device, Machine
from lyra_emergence.plan import make_plan
from src.config.model_config import CONFIG_LOCATIONS, ModelConfig, load_config

from .paper_checkpoints import phi2

if TYPE_CHECKING:
    from collections.abc import Callable

    Checkpoints = Callable[[str], Path]

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "model-sharding.md").read_text(encoding="utf-8")
MODEL = "microsoft/phi-2"
# Nobody listens on the discard port: whatever asks the hub fails at once.
NO_HUB = "http://127.0.0.1:9"
OUR_HOME = os.environ.get("HOME", "")


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block: the heading or words above it, its language, its text."""

    above: str
    language: str
    text: str


def parse_blocks(document: str) -> list[CodeBlock]:
    found, above = [], ""
    for text in re.split(r"^(```.*?^```)$", document, flags=re.MULTILINE | re.DOTALL):
        if text.startswith("```"):
            language, _, body = text.removeprefix("```").removesuffix("```").partition("\n")
            found.append(CodeBlock(above, language, body))
        elif text.strip():
            above = text.strip().splitlines()[-1]
    return found


BLOCKS = parse_blocks(DOCUMENT)


def block(above: str) -> str:
    return next(found.text for found in BLOCKS if found.above == above)


def commands() -> list[str]:
    lines = [line for found in BLOCKS if found.language == "bash" for line in found.text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


PROGRAMMATIC = "### Programmatic Usage"
DEBUGGING = "Enable debug logging to see fallback behavior:"
CUSTOM_MAP = "Progressive fallback automatically creates device maps like:"
LADDER = "3. **CPU fallback**: Move entire model to CPU"


def test_every_block_and_command_is_accounted_for() -> None:
    assert [(found.above, found.language) for found in BLOCKS] == [
        ("Create a `config/model_config.json` file:", "json"),
        ("### Command Line", "bash"),
        (PROGRAMMATIC, "python"),
        (LADDER, ""),
        ("### Automatic Sharding", "json"),
        (CUSTOM_MAP, "python"),
        ("Run the test suite to verify functionality:", "bash"),
        ("**Configuration not loading**: Check file paths and JSON syntax", "bash"),
        ("**OOM errors persist**: Reduce `gpu_layers_fallback` count or enable quantization", "json"),
        ("**Slow performance**: Increase GPU layer count if memory allows", "json"),
        (DEBUGGING, "python"),
    ]
    assert commands() == [
        "uv run lyra.py",
        "uv run lyra.py --model-config path/to/config.json",
        "uv run lyra.py --rerank --journal data/journal/sample.json",
        "uv run pytest src/tests/test_model_config.py -v",
        "uv run pytest src/tests/test_device_fallback.py -v",
        "uv run pytest -v",
        "cat config/model_config.json | python -m json.tool",
    ]


# Configuration.


@pytest.mark.parametrize("text", [found.text for found in BLOCKS if found.language == "json"])
def test_a_json_block_is_a_configuration(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    config = load_config(path)
    assert {key: getattr(config, key) for key in json.loads(text)} == json.loads(text)


def test_the_example_is_the_file_in_the_checkout() -> None:
    assert json.loads(block("Create a `config/model_config.json` file:")) == json.loads(
        (ROOT / "config" / "model_config.json").read_text()
    )


def test_the_table_lists_the_parameters_and_they_exist() -> None:
    names = re.findall(r"^\| `(\w+)` \|", DOCUMENT, re.MULTILINE)
    assert len(names) == 10
    assert set(names) <= set(ModelConfig.model_fields)


def test_the_places_of_the_file_are_the_documented_ones() -> None:
    section = DOCUMENT.partition("## Configuration File Locations")[2].partition("## ")[0]
    assert tuple(re.findall(r"^[2-4]\. `([^`]+)`", section, re.MULTILINE)) == CONFIG_LOCATIONS


# The ladder.


def documented_map() -> dict[str, int | str]:
    """The documented example, its comments ("first N layers on GPU") filled in for 32 layers."""
    example: dict[str, int | str] = ast.literal_eval(block(CUSTOM_MAP))
    on_gpu = [name for name, device in example.items() if device == 0]
    assert on_gpu == ["model.embed_tokens", "model.layers.0", "model.layers.1"]
    first_on_cpu = next(name for name, device in example.items() if device == "cpu")
    layers = {f"model.layers.{i}": 0 if i < int(first_on_cpu.rpartition(".")[2]) else "cpu" for i in range(32)}
    # Phi calls its last norm final_layernorm.
    return {"model.embed_tokens": 0, **layers, "model.final_layernorm": "cpu", "lm_head": "cpu"}


def test_the_ladder_for_phi_2_is_the_documented_one(tmp_path: Path) -> None:
    config = ModelConfig(device_map="auto", gpu_layers_fallback=16)
    cpu = Device("cpu", "cpu", None, 32 * 10**9, 32 * 10**9, 0, "CPU")
    gpu = Device("cuda:0", "cuda", 0, 12 * 10**9, 12 * 10**9, 0, "GPU")
    plan = make_plan(config, phi2(tmp_path / "phi-2"), Machine((gpu,), cpu))
    assert [rung.name for rung in plan.rungs] == ["full", "fallback", "cpu"]
    devices = [[placement.device for placement in rung.placements] for rung in plan.rungs]
    assert set(devices[0]) == {"cuda:0"}
    assert {p.block: 0 if p.device == "cuda:0" else p.device for p in plan.rungs[1].placements} == documented_map()
    assert set(devices[2]) == {"cpu"}
    words = re.findall(r"(?:Initial|Fallback|Final): (.*?) \(", block(LADDER))
    assert words == ["All layers on GPU", "16 layers on GPU, rest on CPU", "All layers on CPU"]


# Python.


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, checkpoints: Checkpoints) -> Path:
    """An HF_HOME that holds a small Phi as microsoft/phi-2, as huggingface_hub lays it out."""
    home = tmp_path_factory.mktemp("huggingface")
    repository = home / "hub" / "models--microsoft--phi-2"
    commit = "b" * 40
    shutil.copytree(checkpoints("phi"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return home


def run(arguments: list[str], cache: Path, *, stdin: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HOME": str(cache), "HF_ENDPOINT": NO_HUB, "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        arguments, input=stdin, capture_output=True, text=True, cwd=cwd, env=environment, timeout=240, check=False
    )


def test_the_python_blocks_run_as_written(cache: Path) -> None:
    checks = """
import lyra_emergence
from langchain_core.language_models import BaseLLM

assert isinstance(llm, HuggingFacePipeline) and isinstance(llm, BaseLLM)
assert llm.loaded.config.gpu_layers_fallback == 16
assert llm.loaded.config.model_id == "microsoft/phi-2"
answer = llm.invoke("The river was high", max_new_tokens=100, do_sample=False)
assert answer.endswith("until the rain stopped."), answer
"""
    script = "\n".join([block(DEBUGGING), block(PROGRAMMATIC), checks])
    done = run([sys.executable, "-W", "error::UserWarning:src", "-"], cache, stdin=script)
    assert done.returncode == 0, done.stderr
    # The debug block alone shows each step, without any other logging set up.
    assert done.stderr.count("tensors mapped") == 2
    assert len(re.findall(r"^ready on rung '\w+' in ", done.stderr, re.MULTILINE)) == 2
    # max_new_tokens 4000 is more than the model has room for: one warning, of the one load that asked for it.
    assert done.stderr.count("max_new_tokens 4000") == 1


# The program.


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the repository's root, with a configuration file where the second command expects one."""
    for name in ("lyra.py", "config", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = tmp_path / "path" / "to" / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"model_id": MODEL, "pipeline_kwargs": {"max_new_tokens": 5}}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("uv run lyra.py")])
def test_the_programs_commands(
    command: str, cache: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    # The configuration's model is in the cache for the command that names it; the others find it nowhere.
    named = "--model-config" in command
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str((cache if named else checkout) / "hub"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("When did I plant the tomatoes?\n"))
    *runner, program = shlex.split(command)[:3]
    assert (runner, program) == (["uv", "run"], "lyra.py")
    code = main(shlex.split(command)[3:])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert out.strip()
    assert "Traceback" not in err
    assert ("using the bundled model" in err) == (not named)


def test_the_program_starts_from_the_checkout(cache: Path) -> None:
    done = run([sys.executable, "lyra.py", "--version"], cache)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"lyra [\w.]+\n", done.stdout)


@pytest.mark.skipif(
    shutil.which("uv") is None or Path(sys.prefix) != ROOT / ".venv", reason="needs uv, and its environment in .venv"
)
def test_uv_runs_the_program(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", OUR_HOME)  # where a version manager looks for its uv
    monkeypatch.setenv("UV_OFFLINE", "1")
    uv, verb, *rest = shlex.split(commands()[0])
    done = run([uv, verb, "--no-sync", *rest, "--version"], cache)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("lyra ")


# The other commands.


def test_the_pytest_commands_collect(cache: Path) -> None:
    named = [shlex.split(line)[3:] for line in commands() if line.startswith("uv run pytest")]
    assert named == [["src/tests/test_model_config.py", "-v"], ["src/tests/test_device_fallback.py", "-v"], ["-v"]]
    paths = [arguments[0] for arguments in named[:2]]
    done = run([sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *paths], cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{path}::test_" in done.stdout for path in paths)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert settings["testpaths"] == ["src/tests"]


@pytest.mark.skipif(os.name == "nt", reason="a command for a POSIX shell")
def test_the_configuration_is_valid_json_for_the_documented_command(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    command = commands()[-1]
    done = run(["sh", "-c", command], cache)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model_id"] == MODEL
