"""`lyra.py doctor`: what it finds, and what it says of the bundled model."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import constants

from lyra_emergence.bundled import bundled_directory
from lyra_emergence.cli import main
from lyra_emergence.conversations import open_store

from .standin_hub import StandInHub

if TYPE_CHECKING:
    from pathlib import Path

JOURNAL = [{"id": "a", "timestamp": "2025-03-02T19:40:00", "text": "It rained."}]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # What --offline changes in this process is set back behind each test.
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
    return tmp_path


def findings(text: str) -> dict[str, dict[str, str]]:
    return {finding["subject"]: finding for finding in json.loads(text)["findings"]}


def test_says_what_is_here_and_that_the_bundled_model_stands_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = findings(capsys.readouterr().out)
    assert found["lyra"]["level"] == "ok"
    assert "torch" in found["packages"]["text"]
    assert found["model"]["text"] == "microsoft/phi-2 is not on this machine: the bundled model stands in"
    assert found["model"]["hint"] == "download it with: lyra.py --model microsoft/phi-2"


def test_every_finding_that_is_not_well_has_a_remedy(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "mine.json"
    path.write_text(json.dumps([*JOURNAL, {"id": "b", "timestamp": "soon", "text": "x"}]))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("LYRA_MODEL_IDD", "a slip")
    main(["doctor", "--json", "--offline", "--journal", str(path), "--model", "owner/name"])
    told = json.loads(capsys.readouterr().out)["findings"]
    assert {"accelerator", "hub", "journal", "model", "configuration"} <= {
        finding["subject"] for finding in told if finding["level"] != "ok"
    }
    assert [finding for finding in told if finding["level"] != "ok" and not finding["hint"]] == []


def test_asks_the_hub_unless_that_is_forbidden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with StandInHub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert main(["doctor", "--json"]) == 0
        out = capsys.readouterr().out
        assert findings(out)["hub"]["text"].startswith(f"{hub.url} answers in ")
        assert findings(out)["hub"]["text"].endswith(" s, with a token")
        assert "hf_secret" not in out
        assert hub.tokens == []
        url = hub.url
        asked = len(hub.requests)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")
        assert main(["doctor", "--json", "--offline"]) == 0
        assert findings(capsys.readouterr().out)["hub"]["text"] == "HF_HUB_OFFLINE forbids to ask it"
        assert len(hub.requests) == asked
        hub.use(monkeypatch, tmp_path / "cache")
    assert main(["doctor", "--json"]) == 0
    found = findings(capsys.readouterr().out)["hub"]
    assert found["level"] == "note"
    assert found["text"].startswith(f"{url} cannot be reached: ")


def test_looks_at_the_model_cache(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "new" / "hub"))
    main(["doctor", "--json", "--offline"])
    assert findings(capsys.readouterr().out)["model cache"]["text"].startswith(f"{folder / 'new' / 'hub'}, ")
    monkeypatch.setattr("lyra_emergence.hub.free_disk", lambda: 10**9)
    main(["doctor", "--json", "--offline"])
    found = findings(capsys.readouterr().out)["model cache"]
    assert (found["level"], found["hint"][:15]) == ("note", "free some space")


def test_looks_at_the_conversations(capsys: pytest.CaptureFixture[str]) -> None:
    def found() -> list[tuple[str, str, str]]:
        main(["doctor", "--json", "--offline"])
        told = json.loads(capsys.readouterr().out)["findings"]
        return [(f["level"], f["text"], f["hint"]) for f in told if f["subject"] == "conversations"]

    assert found() == [("ok", "none kept yet", "")]
    store = open_store(print)
    assert store is not None
    store.close()
    shown = "~/.local/share/lyra-emergence/conversations.db"
    assert found() == [("ok", f"0 in {shown}", "")]
    store.path.chmod(0o644)
    assert found()[1] == ("problem", f"others can read {shown}", f"run: chmod 600 {shown}")
    store.path.write_bytes(b"not a database at all" * 99)
    (damaged,) = found()
    assert damaged[0] == "problem"
    assert damaged[2] == "the next chat puts a damaged file aside and begins a new one"
    assert store.path.read_bytes().startswith(b"not a database")


def test_a_package_that_is_too_old_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lyra_emergence.cli.findings.requires", lambda _: ["torch>=99", 'tox>=1; extra == "x"'])
    assert main(["doctor", "--json", "--offline"]) == 1
    found = findings(capsys.readouterr().out)["versions"]
    assert found["text"].endswith(" is not >=99")
    assert found["hint"] == "update them with: uv sync --upgrade"


def test_says_what_the_bundled_model_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    card = (bundled_directory() / "MODEL_CARD.md").read_text(encoding="utf-8")
    for heading in ("What it does", "How it was trained", "How good it is", "Limits"):
        assert f"## {heading}" in card
        assert heading in shown
    limits = card.split("## Limits")[1]
    for word in limits.split():
        assert word in shown


def test_card_figures_come_from_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    card = json.loads(capsys.readouterr().out)["bundled_model"]
    assert card["bytes"] == sum(path.stat().st_size for path in bundled_directory().iterdir() if path.is_file())
    assert 0 < card["weight_bytes"] < card["bytes"]


def test_a_named_model_that_is_not_here_is_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--model", "owner/name"]) == 1
    assert findings(capsys.readouterr().out)["model"] == {
        "level": "problem",
        "subject": "model",
        "text": "owner/name is not on this machine",
        "hint": "download it with: lyra.py --model owner/name",
    }


def test_a_wrong_configuration_is_a_problem_and_not_an_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model_config.json").write_text('{"max_memory": {"0": "6Gb"}}')
    assert main(["doctor", "--json"]) == 1
    found = findings(capsys.readouterr().out)
    assert found["configuration"]["level"] == "problem"
    assert "is bits" in found["configuration"]["text"]
    assert "lyra" in found


def test_looks_at_the_journal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "mine.json"
    path.write_text(json.dumps([*JOURNAL, {"id": "b", "timestamp": "soon", "text": "x"}]))
    assert main(["doctor", "--json", "--journal", str(path)]) == 0
    listed = [f for f in json.loads(capsys.readouterr().out)["findings"] if f["subject"] == "journal"]
    assert [finding["level"] for finding in listed] == ["ok", "note"]
    assert listed[0]["text"] == f"{path}, 1 entry"
    path.write_text("[")
    assert main(["doctor", "--json", "--journal", str(path)]) == 1


def test_lines_fit_eighty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []
