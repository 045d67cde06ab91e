"""`lyra.py doctor`: what it finds, and what it says of the bundled model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from lyra_emergence.bundled import bundled_directory
from lyra_emergence.cli import main

if TYPE_CHECKING:
    from pathlib import Path

JOURNAL = [{"id": "a", "timestamp": "2025-03-02T19:40:00", "text": "It rained."}]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
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
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
