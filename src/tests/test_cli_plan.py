"""`lyra.py plan`: what it shows, and what it costs."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.cli import main
from lyra_emergence.cli.console import Console
from lyra_emergence.cli.plan_view import explain_block, render_plan, summary
from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import ConfigError
from lyra_emergence.machine import Device, Machine
from lyra_emergence.plan import Plan, make_plan

from .paper_checkpoints import phi2

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
CPU = Device("cpu", "cpu", None, 8_000_000_000, 8_000_000_000, 0, "CPU")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def console(stdout: io.StringIO | None = None, **environ: str) -> Console:
    return Console(stdout=stdout or io.StringIO(), stderr=io.StringIO(), environ=environ)


def gpu(number: int, free: int) -> Device:
    return Device(f"cuda:{number}", "cuda", number, free, free, 0, "GPU")


@pytest.fixture
def make(checkpoints: Callable[[str], Path]) -> Callable[..., Plan]:
    """Plan the tiny Llama (4 layers, 789 kB) for GPUs with the given bytes."""

    def plan(*gpu_bytes: int) -> Plan:
        machine = Machine(tuple(gpu(number, free) for number, free in enumerate(gpu_bytes)), CPU)
        config = ModelConfig(model_id="tiny", gpu_layers_fallback=1)
        return make_plan(config, read_checkpoint(checkpoints("llama")), machine)

    return plan


def test_the_plan_shows_bars_the_strip_and_the_ladder(make: Callable[..., Plan]) -> None:
    assert "\n".join(render_plan(make(1_400_000), "tiny", console())) == (
        "tiny · float32 · 789 kB of weights · context 256 tokens\n"
        "\n"
        "cuda:0  [████████████████▓▓▓▓▓▓▓▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒··] 1.33 MB of 1.40 MB\n"
        "         █ weights 444 kB  ▓ KV cache 197 kB  ▒ activations 694 kB\n"
        "         · free 65.0 kB\n"
        "cpu     [█▓▒················································] 1.10 MB of 8.00 GB\n"
        "         █ weights 345 kB  ▓ KV cache 65.5 kB  ▒ activations 694 kB\n"
        "         · free 8.00 GB\n"
        "\n"
        "layers 0 000c\n"
        "  0 cuda:0: layers 0-2\n"
        "  c cpu: embedding, layer 3, norm, head\n"
        "\n"
        "ladder (> is where loading starts)\n"
        "  x full      needs 1.75 MB of cuda:0, which has 1.40 MB\n"
        "  > planned   as many layers as the budgets allow\n"
        "    fallback  gpu_layers_fallback is 1\n"
        "    cpu       no accelerator memory needed"
    )


def test_two_gpus_are_told_apart_without_color(make: Callable[..., Plan]) -> None:
    lines = list(render_plan(make(1_400_000, 1_400_000), "tiny", console()))
    assert "layers 0 0001" in lines
    assert "  0 cuda:0: layers 0-2" in lines
    assert "  1 cuda:1: embedding, layer 3, norm, head" in lines


@pytest.mark.parametrize("width", [40, 60, 200])
def test_no_line_is_wider_than_the_terminal(
    make: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = list(render_plan(make(1_400_000), "tiny", console(Terminal(), NO_COLOR="1")))
    assert max(map(len, lines)) <= width


def test_an_encoding_without_blocks_gets_ascii(make: Callable[..., Plan]) -> None:
    ascii_only = Terminal()
    ascii_only.encoding = "ascii"
    text = "\n".join(render_plan(make(1_400_000), "tiny", console(ascii_only, NO_COLOR="1")))
    assert text.isascii()
    assert "[################=======~~" in text


def test_colors_reach_a_terminal_only_and_change_nothing_else(
    make: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    plain = "\n".join(render_plan(make(1_400_000), "tiny", console()))
    colored = "\n".join(render_plan(make(1_400_000), "tiny", console(Terminal())))
    assert "\x1b[32m0\x1b[0m" in colored
    assert "\x1b[34mc\x1b[0m" in colored
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == plain


def test_the_summary_is_one_line(make: Callable[..., Plan]) -> None:
    assert summary(make(1_400_000), "tiny") == ("tiny: 789 kB of weights, 3 layers on cuda:0, 1 on cpu, context 256")
    assert summary(make(10**9), "tiny") == "tiny: 789 kB of weights, on cuda:0, context 256"


def test_explain_says_where_why_and_how_much(make: Callable[..., Plan]) -> None:
    assert explain_block(make(1_400_000), "model.layers.3") == (
        "model.layers.3 is on cpu: no accelerator has room left (148 kB of weights and 65.5 kB of KV cache)"
    )


def test_explain_suggests_the_nearest_block(make: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match=r"^the plan has no block 'model\.layer\.3'$") as caught:
        explain_block(make(), "model.layer.3")
    assert caught.value.hint == "did you mean model.layers.3?"


def test_json_goes_to_stdout_and_warnings_to_stderr(
    checkpoints: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_config.json").write_text('{"max_memory": {"7": "6GB"}}')
    assert main(["plan", str(checkpoints("llama")), "--json", "--context", "64"]) == 0
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert (plan["format"], plan["context_length"], plan["rung"]) == ("lyra.plan/1", 64, "cpu")
    assert err.startswith("warning: this machine lacks devices that the configuration names, ignored: 'max_memory.7'")


def test_the_model_may_be_named_by_option_too(
    checkpoints: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--model", str(checkpoints("llama")), "plan", "--explain", "lm_head"]) == 0
    assert capsys.readouterr().out.startswith("lm_head is on cpu: ")


def test_a_model_that_does_not_fit_is_exit_3_with_a_remedy(
    checkpoints: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(checkpoints("llama")), "--max-memory", "cpu=1kB"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "\nhint: try " in err


def test_a_model_that_is_nowhere_is_exit_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["plan", "no/such-model"]) == 1
    assert capsys.readouterr().err == (
        "error: no/such-model is not on this machine, and HF_HUB_OFFLINE forbids to ask the hub\n"
        "hint: unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, or give the folder of a checkpoint on this machine\n"
    )


def test_planning_imports_what_it_needs_and_no_more(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from lyra_emergence.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "own = set(sys.stdlib_module_names) | {'lyra_emergence'}\n"
        "others = {name.partition('.')[0] for name in sys.modules} - own\n"
        "print('imported:', len(sys.modules), *sorted(others), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    command = [sys.executable, "-c", code, "plan", str(checkpoints("llama"))]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=True)
    _, count, *others = done.stderr.splitlines()[-1].split()
    # Imports are nearly all of a plan's time: torch alone would take two seconds. Files that install the package add a
    # few names of their own, with underscores.
    needed = {"annotated_doc", "annotated_types", "platformdirs", "pydantic", "pydantic_core", "shellingham", "typer"}
    needed |= {"typing_extensions", "typing_inspection"}
    assert {name for name in others if not name.startswith("_")} <= needed
    assert int(count) < 400


def test_plans_for_hardware_that_is_not_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_config.json").write_text('{"max_memory": {"0": "1GB", "cpu": "2GB"}}')
    phi2(tmp_path / "phi-2")
    assert main(["plan", str(tmp_path / "phi-2"), "--gpu", "8GB", "--gpu", "24GB", "--ram", "64GB", "--json"]) == 0
    captured = capsys.readouterr()
    devices = {device["device"]: device for device in json.loads(captured.out)["devices"]}
    assert {name: device["total"] for name, device in devices.items()} == {
        "cuda:0": 8 * 10**9,
        "cuda:1": 24 * 10**9,
        "cpu": 64 * 10**9,
    }
    assert devices["cuda:0"]["limit"] > 7 * 10**9, "a limit that was written for another GPU"
    assert "planned for 2 GPUs and main memory as given, not as found here" in captured.err


def test_a_limit_given_with_the_hardware_holds(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    phi2(tmp_path / "phi-2")
    main(["plan", str(tmp_path / "phi-2"), "--gpu", "8GB", "--max-memory", "0=5GB", "--json"])
    assert json.loads(capsys.readouterr().out)["devices"][0]["limit"] == 5 * 10**9


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpu", "6Gb"], "error: in '--gpu': '6Gb' is bits; write '6GB'"),
        (["--gpu", "0GB"], "error: in '--gpu': 0GB holds nothing; write a size such as 24GB"),
        (["--ram", "much"], "error: in '--ram': 'much'"),
        (["--batch", "0"], "error: Invalid value for '--batch'"),
        (["--8bit", "--4bit"], "load_in_4bit"),
        (["--dtype", "float12"], "float12"),
    ],
)
def test_wrong_sizes_are_named(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *options]) == 2
    assert said in capsys.readouterr().err


def test_a_batch_multiplies_the_cache(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    phi2(tmp_path / "phi-2")
    sizes = []
    for batch in ("1", "3"):
        main(["plan", str(tmp_path / "phi-2"), "--gpu", "80GB", "--batch", batch, "--json"])
        sizes.append(json.loads(capsys.readouterr().out)["devices"][0])
    assert sizes[1]["kv_cache"] == 3 * sizes[0]["kv_cache"]
    assert sizes[1]["weights"] == sizes[0]["weights"]


def test_what_if_compares_contexts_and_quantizations(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    phi2(tmp_path / "phi-2")
    what_if = ["plan", str(tmp_path / "phi-2"), "--gpu", "4GB", "--ram", "8GB", "--context", "1024", "--what-if"]
    assert main([*what_if, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "lyra.what-if/1"
    cells = [(s["context_length"], s["quantization"]) for s in found["scenarios"]]
    assert cells == [(context, packed) for context in (1024, 2048) for packed in (None, "8bit", "4bit")]
    by_cell = dict(zip(cells, found["scenarios"], strict=True))
    assert by_cell[1024, None]["layers_on_accelerators"] < by_cell[1024, "8bit"]["layers_on_accelerators"]
    assert by_cell[1024, "4bit"]["rung"] == "full"
    assert by_cell[1024, None]["layers_on_accelerators"] > by_cell[2048, None]["layers_on_accelerators"]
    assert main(what_if) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["context", "as", "configured", "8", "bits", "4", "bits"]
    assert lines[3].split()[0] == "1,024"
    assert max(map(len, lines)) <= 100


def test_what_if_says_where_nothing_fits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    phi2(tmp_path / "phi-2")
    assert main(["plan", str(tmp_path / "phi-2"), "--gpu", "1GB", "--ram", "100MB", "--what-if"]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_speed_is_shown_where_the_machine_was_measured(
    checkpoints: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.chdir(home)
    command = ["plan", "--model", str(checkpoints("mixtral"))]
    assert main(command) == 0
    assert "speed   not measured on this machine yet; lyra.py plan --measure" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["speed"] is None
    assert main([*command, "--measure"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^speed   \d[\d.]* \(\d[\d.]* to \d[\d.]*\) tokens/s, prompt ", shown, re.MULTILINE)
    assert re.search(r"^  a token reads .* on cpu at ", shown, re.MULTILINE)
    assert main([*command, "--json"]) == 0
    speed = json.loads(capsys.readouterr().out)["speed"]
    band = speed["decode_tokens_per_second"]
    assert 0 < band["low"] <= band["likely"] <= band["high"]
    # Measured once: no GPU of the size given was.
    assert main([*command, "--gpu", "24GB"]) == 0
    assert "speed" not in capsys.readouterr().out


def test_measurements_that_cannot_be_kept_are_told_as_lost(
    checkpoints: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    """Measuring itself takes half a minute, and is tested above and in test_check.py."""
    (home / "a file").touch()
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "a file"))
    monkeypatch.setattr("lyra_emergence.framework.measure_framework", lambda: None)
    monkeypatch.setattr("lyra_emergence.speed.rates", lambda *_, **__: None)
    assert main(["plan", "--model", str(checkpoints("mixtral")), "--measure"]) == 0
    cache = home / "a file" / "lyra-emergence"
    told = f"warning: {cache} cannot be written: what was measured is not kept, and not used\n"
    assert told in capsys.readouterr().err


def test_that_code_of_strangers_may_run_is_said(
    checkpoints: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.chdir(home)
    command = ["plan", "--model", str(checkpoints("llama"))]
    assert main(command) == 0
    assert "trust_remote_code" not in capsys.readouterr().err
    monkeypatch.setenv("LYRA_TRUST_REMOTE_CODE", "true")
    assert main(command) == 0
    assert capsys.readouterr().err.startswith("warning: 'trust_remote_code' is true: Python code that comes with a ")


def test_of_a_mixture_a_token_reads_the_experts_it_chooses(checkpoints: Callable[[str], Path]) -> None:
    from lyra_emergence.footprint import estimate_footprint

    index = read_checkpoint(checkpoints("mixtral"))
    shares = {block.kind: block.active_share for block in estimate_footprint(index).blocks}
    assert shares == {"embedding": 1, "layer": 1, "experts": 0.5, "norm": 1, "head": 1}
    dense = estimate_footprint(read_checkpoint(checkpoints("llama")))
    assert {block.active_share for block in dense.blocks} == {1.0}
    assert dense.heads_per_key == 2
