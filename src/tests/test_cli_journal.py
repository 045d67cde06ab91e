"""`lyra.py journal`, run as a person would."""

from __future__ import annotations

import io
import json
import stat
from datetime import date, datetime
from pathlib import Path

import pytest

from lyra_emergence.cli import main
from lyra_emergence.journal import embeddings

SAMPLE = Path(__file__).parents[2] / "data" / "journal" / "sample.json"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and words alone: what these tests look at needs no model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(embeddings, "PACKAGE", "no-such-package-anywhere")


def lyra(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["journal", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_add_list_show_search_stats_export(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    own = home / ".local" / "share" / "lyra-emergence" / "journal.jsonl"
    status, out, _ = lyra(
        capsys, "add", "Planted", "garlic.", "--tag", "garden", "--date", "2025-03-02T19:40", "--title", "Beds"
    )
    assert (status, out) == (0, f"added 2025-03-02-beds-{out.split()[1][-6:]} to {own}\n")
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    assert lyra(capsys, "add", "Rain.", "--date", "2025-03-03", "--publish", "--mood", "calm")[0] == 0
    status, out, err = lyra(capsys, "list")
    assert (status, out) == (0, "2025-03-03  Rain.\n2025-03-02  Beds  #garden\n")
    assert err == "note: the search goes by words alone: no embedding model is on this machine\n"
    assert lyra(capsys, "list", "--tag", "GARDEN")[1] == "2025-03-02  Beds  #garden\n"
    assert lyra(capsys, "list", "--since", "2025-03-03", "--limit", "1")[1] == "2025-03-03  Rain.\n"
    status, out, _ = lyra(capsys, "show", "2025-03-03")
    assert out.splitlines() == [
        "Rain.",
        f"2025-03-03 00:00:00   {out.splitlines()[1].split()[-1]}",
        "mood: calm",
        "publish: yes",
        "",
        "Rain.",
    ]
    status, out, err = lyra(capsys, "search", "garlic in March?")
    assert out.splitlines()[:2] == ["[1] 2025-03-02 · Beds", "    Planted garlic."]
    assert 'note: "March" is 2025-03-01 to 2025-03-31\n' in err
    stats = json.loads(lyra(capsys, "stats", "--json")[1])
    assert (stats["entries"], stats["first"], stats["last"], stats["publish"]) == (2, "2025-03-02", "2025-03-03", 1)
    assert lyra(capsys, "export", "out")[1] == "wrote 1 entry to out\n"
    assert Path("out", "2025-03-03-rain.md").read_text().endswith("---\n\nRain.\n")
    assert lyra(capsys, "export", "out")[1] == "wrote 0 entries to out; 1 said so already\n"


def test_what_is_piped_becomes_an_entry(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("First line.\nSecond.\n"))
    _, out, _ = lyra(capsys, "add", "--journal", "notes", "--json")
    added = json.loads(out)
    assert added["entry"]["text"] == "First line.\nSecond."
    assert datetime.fromisoformat(added["entry"]["timestamp"]).date() - date.today() <= date.resolution  # noqa: DTZ011
    assert Path(added["file"]).parent == Path("notes")
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    status, _, err = lyra(capsys, "add")
    assert (status, err.splitlines()[0]) == (1, "error: the entry is empty")


def test_import_twice_adds_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert lyra(capsys, "import", str(SAMPLE), "--journal", "mine.json")[1] == "added 32 entries to mine.json\n"
    again = "added 0 entries to mine.json; 32 there already\n"
    assert lyra(capsys, "import", str(SAMPLE), "--journal", "mine.json")[1] == again
    found = json.loads(lyra(capsys, "search", "Biscuit's adoption", "--journal", "mine.json", "--json")[1])
    assert found["hits"][0]["id"] == "2025-04-19-biscuit-comes-home"


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        (("list", "--journal", "gone.json"), 1, "error: there is no journal at gone.json"),
        (("list", "--since", "March"), 2, "error: --since 'March' is not a date; write it like '2025-03-02'"),
        (("add", "x", "--date", "soon"), 2, "error: --date 'soon' is not an ISO 8601 date;"),
        (("show", "1999"), 1, "error: no entry's id or date begins with '1999'"),
        (("show", "2025-03"), 1, "error: 4 entries begin with '2025-03'"),
        (("show",), 2, "error: Missing argument 'ID'."),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], status: int, error: str) -> None:
    if words[0] == "show":
        words = (*words, "--journal", str(SAMPLE))
    found, out, err = lyra(capsys, *words)
    assert (found, out) == (status, "")
    assert error in err


def test_lines_fit_the_terminal_and_hold_no_controls(capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"id": "a", "timestamp": "2025-03-02", "text": "word " * 60 + "\x1b[31mred", "tags": ["t" * 50] * 3}
    Path("j.json").write_text(json.dumps([entry]))
    for words in (("list",), ("show", "a"), ("search", "word"), ("stats",)):
        out = lyra(capsys, *words, "--journal", "j.json")[1]
        assert "\x1b" not in out
        lines = [line for line in out.splitlines() if not line.startswith(("index", "tags"))]
        assert max(map(len, lines)) <= 80


def test_index_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert lyra(capsys, "index", "--journal", str(SAMPLE))[1] == "32 entries, 32 passages by words alone\n"


def test_an_entry_without_a_date_in_its_id_is_shown_by_its_date(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "j.json"
    entries = [
        {"id": name, "timestamp": f"2025-03-0{day}", "text": f"Day {day}."} for day, name in ((1, "a"), (2, "b"))
    ]
    file.write_text(json.dumps(entries))
    assert "Day 2." in lyra(capsys, "show", "2025-03-02", "--journal", str(file))[1]
    assert "2 entries begin with '2025-03'" in lyra(capsys, "show", "2025-03", "--journal", str(file))[2]
