"""`lyra.py cache`: what it shows, and what it removes."""

from __future__ import annotations

import io
import json
import os
import time
from typing import TYPE_CHECKING

import pytest

from lyra_emergence.cache_contents import cached
from lyra_emergence.cache_files import cache_path
from lyra_emergence.cli import main
from lyra_emergence.cli.cache import _ago, _agrees, _cut
from lyra_emergence.cli.console import Console
from lyra_emergence.packed_files import ABOUT, FORMAT, packed_folder

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with the packed weights of two models, compiled kernels and two files of figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def write_about(path: Path, model: str, directory: str, bits: str) -> None:
    about = {"format": FORMAT, "model": model, "directory": directory, "quantization": bits, "weights": "0"}
    (path / ABOUT).write_text(json.dumps(about))


@pytest.fixture
def _full() -> None:
    for model, bits, days, nbytes in (("microsoft/phi-2", "4bit", 2, 1_500_000), ("tiny", "8bit", 0.1, 100_000)):
        path = packed_folder() / f"{bits}-{'0' * 16}"
        path.mkdir(parents=True)
        (path / "layer.safetensors").write_bytes(bytes(nbytes))
        about = {
            "format": FORMAT,
            "model": model,
            "directory": f"/models/{model}",
            "quantization": bits,
            "weights": "0",
        }
        (path / ABOUT).write_text(json.dumps(about))
        then = time.time() - days * 86400
        os.utime(path / ABOUT, (then, then))
    cache_path("kernels").mkdir()
    (cache_path("kernels") / "0.so").write_bytes(bytes(80_000))
    cache_path("rates.json").write_text("{}")
    cache_path("framework.json").write_text("{}")


@pytest.mark.usefixtures("_full")
def test_a_table_of_what_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == (
        f"folder: {folder}/cache/lyra-emergence\n"
        "\n"
        "what       name                            size  last used\n"
        "packed     tiny, 8 bits                  100 kB  2 hours ago\n"
        "packed     microsoft/phi-2, 4 bits      1.50 MB  2 days ago\n"
        "kernels    compiled for this CPU        80.0 kB  just now\n"
        "measured   what Python and torch take       2 B  just now\n"
        "measured   how fast this machine is         2 B  just now\n"
        "\n"
        "packed weights: 1.60 MB; 'packed_cache' allows 20.0 GB\n"
        "in all: 1.68 MB; lyra.py cache clear [NAME] removes it\n"
    )


@pytest.mark.usefixtures("_full")
def test_the_same_as_data(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYRA_PACKED_CACHE", "3GB")
    assert main(["cache", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["packed_cache"]) == ("lyra.cache/1", 3 * 10**9)
    assert [(item["kind"], item["name"], item["about"]) for item in found["items"]] == [
        ("packed", "tiny", "8 bits"),
        ("packed", "microsoft/phi-2", "4 bits"),
        ("kernels", "kernels", "compiled for this CPU"),
        ("measured", "framework.json", "what Python and torch take"),
        ("measured", "rates.json", "how fast this machine is"),
    ]
    assert found["bytes"] == sum(item["bytes"] for item in found["items"])
    assert found["items"][1]["source"] == "/models/microsoft/phi-2"


def test_an_empty_cache_folder(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYRA_PACKED_CACHE", "0")
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[2:] == [
        "nothing is kept",
        "",
        "packed weights: 0 B; 'packed_cache' is 0: none are kept",
        "in all: 0 B; lyra.py cache clear [NAME] removes it",
    ]
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == "nothing is kept\n"
    assert main(["cache", "clear", "packed"]) == 0
    assert main(["cache", "clear", "--json"]) == 0


@pytest.mark.usefixtures("_full")
@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("microsoft/phi-2", ["tiny", "kernels", "framework.json", "rates.json"]),
        ("/models/tiny", ["microsoft/phi-2", "kernels", "framework.json", "rates.json"]),
        ("packed", ["kernels", "framework.json", "rates.json"]),
        ("kernels", ["tiny", "microsoft/phi-2", "framework.json", "rates.json"]),
        ("measured", ["tiny", "microsoft/phi-2", "kernels"]),
        ("rates.json", ["tiny", "microsoft/phi-2", "kernels", "framework.json"]),
        (None, []),
    ],
)
def test_what_is_named_goes(name: str | None, left: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "clear", *([name] if name else []), "--yes"]) == 0
    assert [one.name for one in cached()] == left
    assert capsys.readouterr().out.startswith(f"removed {5 - len(left)} item")


@pytest.mark.usefixtures("_full")
def test_removed_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "clear", "tiny", "--yes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert ([item["name"] for item in found["removed"]], found["left"]) == (["tiny"], [])


@pytest.mark.usefixtures("_full")
def test_nobody_to_ask_and_nothing_of_that_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "clear", "packed"]) == 1
    assert capsys.readouterr().err == (
        "error: 2 items, 1.60 MB would be removed, and nobody is there to ask\nhint: add --yes\n"
    )
    assert main(["cache", "clear", "phi", "--yes"]) == 1
    assert capsys.readouterr().err == (
        "error: nothing called 'phi' is kept\nhint: name one of tiny, microsoft/phi-2, packed, kernels, measured\n"
    )
    assert len(cached()) == 5


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("_full")
@pytest.mark.parametrize(
    ("reply", "agreed"), [("y\n", True), ("YES\n", True), ("\n", False), ("n\n", False), ("", False)]
)
def test_a_person_is_asked(reply: str, agreed: bool) -> None:
    stderr = _Terminal()
    console = Console(stdin=_Terminal(reply), stderr=stderr, environ={"NO_COLOR": "1"})
    assert _agrees(cached()[:2], console) is (reply.strip().lower() in ("y", "yes"))
    assert stderr.getvalue() == (
        "  packed    tiny, 8 bits, 100 kB\n"
        "  packed    microsoft/phi-2, 4 bits, 1.50 MB\n"
        "Remove 2 items, 1.60 MB? It is made anew when it is needed. [y/N] "
    )


@pytest.mark.usefixtures("_full")
def test_what_cannot_be_removed_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lyra_emergence.packed_room.shutil.rmtree", lambda *_, **__: None)
    assert main(["cache", "clear", "tiny", "--yes"]) == 1
    said = capsys.readouterr()
    assert said.out == "removed 0 items, 0 B\n"
    assert "could not be removed: it may be in use" in said.err


def test_a_name_from_a_stranger_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    path = packed_folder() / "4bit-0"
    path.mkdir(parents=True)
    name = "a\x1b[31m" + "b" * 90
    write_about(path, name, "", "4bit")
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines()[2:])) <= 80


def test_small_words() -> None:
    assert [_ago(seconds) for seconds in (0, 59, 60, 7199, 7200, 86400, 3e6)] == [
        "just now", "just now", "1 minute ago", "1 hour ago", "2 hours ago", "1 day ago", "34 days ago",
    ]  # fmt: skip
    assert [_cut("abcdefghij", wide) for wide in (10, 9, 8)] == ["abcdefghij", "abc...hij", "ab...hij"]
