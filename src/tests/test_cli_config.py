"""`lyra.py config validate|show|schema|init`, run as the program runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lyra_emergence.cli import main
from lyra_emergence.config import config_schema, load_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LYRA_")]:
        monkeypatch.delenv(name)


def lyra(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr of `lyra.py config ...`."""
    status = main(["config", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# validate


def test_validate_a_named_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.json").write_text("{}")
    assert lyra(capsys, "validate", "c.json") == (0, "ok: c.json (named)\n", "")


def test_validate_what_would_be_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert lyra(capsys, "validate") == (
        0,
        "ok: no file, all defaults\n",
        "note: looked for config/model_config.json, data/model_config.json, model_config.json\n",
    )
    Path("model_config.json").write_text("{}")
    monkeypatch.setenv("LYRA_MAX_MEMORY", "0=6GB")
    monkeypatch.setenv("LYRA_MODEL", "x")
    assert lyra(capsys, "validate") == (
        0,
        "ok: model_config.json (found)\n",
        "note: LYRA_MODEL is not read; did you mean LYRA_MODEL_ID?\nnote: the environment sets LYRA_MAX_MEMORY\n",
    )


def test_validate_lists_every_problem(capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.json").write_text('{"max_memory": {"0": "6Gb"}, "gpu_layer_fallback": 1}')
    assert lyra(capsys, "validate", "c.json") == (
        2,
        "",
        (
            "error: the configuration has 2 problems:\n"
            "  c.json: unknown key 'gpu_layer_fallback'; did you mean 'gpu_layers_fallback'?\n"
            "  c.json: in 'max_memory.0': '6Gb' is bits; write '6GB'\n"
            "hint: 'lyra.py config schema' describes every key\n"
        ),
    )


def test_validate_a_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert lyra(capsys, "validate", "c.json") == (
        2,
        "",
        (
            "error: the configuration has 1 problem:\n"
            "  c.json: no such file\n"
            "hint: check the path, or write an example there with: lyra.py config init PATH\n"
        ),
    )


# show


def test_show_names_each_value_and_its_origin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("model_config.json").write_text(
        '{"max_memory": {"0": "6GB", "cpu": "16GB"}, "pipeline_kwargs": {"stop": ["\\n"]}, "device_map": {"model": 0}}'
    )
    monkeypatch.setenv("LYRA_MAX_MEMORY", "cuda:0=4GB")
    monkeypatch.setenv("LYRA_GPU_LAYERS_FALLBACK", "8")
    assert lyra(capsys, "show") == (
        0,
        """\
file: model_config.json

model_id                     default       microsoft/phi-2
task                         default       text-generation
device_map.model             file          0
max_memory.0                 environment   4GB
max_memory.cpu               file          16GB
low_cpu_mem_usage            default       true
gpu_layers_fallback          environment   8
enable_progressive_fallback  default       true
load_in_8bit                 default       false
load_in_4bit                 default       false
allow_quantization           default       false
pipeline_kwargs.stop         file          ["\\n"]
dtype                        default       null
context_length               default       null
cpu_kernels                  default       true
prompt_streaming             default       true
prefill_chunk                default       null
compile_decode               default       false
packed_cache                 default       20GB
distributed                  default       null
embedding_model              default       null
rerank_model                 default       null
trust_remote_code            default       false
""",
        "",
    )


def test_show_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    stop = ["a stop text of some length", "another one", "and one more"]
    Path("c.json").write_text(json.dumps({"pipeline_kwargs": {"stop": stop, "repetition_penalty": 1.1}}))
    status, out, _ = lyra(capsys, "show", "--model-config", "c.json")
    assert status == 0
    assert max(len(line) for line in out.splitlines()) <= 80
    words = out.split("pipeline_kwargs.stop")[1].split("pipeline_kwargs.repetition_penalty")[0].split()
    assert " ".join(words) == f"named file {json.dumps(stop)}"


def test_show_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYRA_MODEL_ID", "a/b")
    status, out, err = lyra(capsys, "show", "--json")
    shown = json.loads(out)
    assert (status, err, list(shown)) == (0, "", ["file", "values", "origins"])
    assert shown["file"] is None
    assert (shown["values"]["model_id"], shown["origins"]["model_id"]) == ("a/b", "environment")
    assert (shown["values"]["max_memory"], shown["origins"]["max_memory"]) == (None, "default")


# schema


def test_schema_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = lyra(capsys, "schema")
    assert (status, json.loads(out), err) == (0, config_schema(), "")
    assert out == (ROOT / "src/lyra_emergence/config/model_config.schema.json").read_text()


# init


def test_init_writes_the_documented_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert lyra(capsys, "init") == (
        0,
        "wrote config/model_config.schema.json\nwrote config/model_config.json\n",
        "",
    )
    written = json.loads(Path("config/model_config.json").read_text())
    assert written.pop("$schema") == "./model_config.schema.json"
    assert written == json.loads((ROOT / "config/model_config.json").read_text())
    assert json.loads(Path("config/model_config.schema.json").read_text()) == config_schema()
    assert load_config().model_id == "microsoft/phi-2"


def test_init_replaces_nothing_without_force(capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.json").write_text("mine")
    assert lyra(capsys, "init", "c.json") == (
        2,
        "",
        "error: c.json exists\nhint: add --force to replace it, or choose another path\n",
    )
    assert [path.name for path in Path().iterdir()] == ["c.json"]
    assert Path("c.json").read_text() == "mine"
    assert lyra(capsys, "init", "c.json", "--force")[0] == 0
    assert load_config("c.json").gpu_layers_fallback == 16


def test_init_leaves_a_schema_of_the_same_content_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert lyra(capsys, "init", "a.json")[0] == 0
    assert lyra(capsys, "init", "b.json")[0] == 0
    Path("model_config.schema.json").write_text("{}")
    status, _, err = lyra(capsys, "init", "d.json")
    assert (status, err.splitlines()[0]) == (2, "error: model_config.schema.json exists")
    assert not Path("d.json").exists()


def test_init_does_not_write_over_its_own_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert lyra(capsys, "init", "model_config.schema.json") == (
        2,
        "",
        ("error: model_config.schema.json is the schema's own name\nhint: choose another name for the configuration\n"),
    )


# The whole program


def test_the_commands_of_the_program_need_no_torch_and_print_no_colors_into_a_pipe() -> None:
    code = (
        "import sys; from lyra_emergence.cli import main; status = main(['config', 'show'])\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules], file=sys.stderr); sys.exit(status)"
    )
    environ = {**os.environ, "FORCE_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True)
    assert done.stderr == "[]\n"
    assert "\x1b" not in done.stdout


def test_help_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["validate"], ["show"], ["schema"], ["init"]):
        status, out, _ = lyra(capsys, *arguments, "--help")
        assert status == 0
        assert max(len(line) for line in out.splitlines()) <= 80
