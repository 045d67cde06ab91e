"""Disks that are full, fail, or lose the process in the middle of a write: the old file or the new, never a part."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lyra_emergence.whole_files import replace_file

from . import disk_shim
from .simulated_accelerator import CompilerMissingError
from .standin_hub import StandInHub

if TYPE_CHECKING:
    from collections.abc import Callable

    Program = Callable[..., Any]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the shim is made for Linux")


@pytest.fixture
def on_a_bad_disk(request: pytest.FixtureRequest, tmp_path: Path, home: Path) -> Program:
    """Runs a program whose calls on files under `home` can be made to fail."""
    assert request.config.cache is not None
    try:
        library = disk_shim.compile_shim(request.config.cache.mkdir("disk_shim"))
    except CompilerMissingError as error:
        pytest.skip(str(error))
    return lambda program, *arguments: disk_shim.run(library, home, program, *arguments)


# --- Small files -----------------------------------------------------------------------------------

# Each defines `work` (writes the file), `read` (what a reader gets), and what it may get.
CONFIGURATION = """
from lyra_emergence.config import ModelConfig, load_config, save_config
from lyra_emergence.errors import LyraError
path = folder / "deep" / "c.json"
def work(): save_config(ModelConfig(gpu_layers_fallback=2), path)
def old(): save_config(ModelConfig(gpu_layers_fallback=1), path)
def read(): return load_config(path).gpu_layers_fallback if path.exists() else None
OLD, NEW, REFUSES = 1, 2, LyraError
"""
FRAMEWORK = """
from lyra_emergence import framework
from lyra_emergence.cache_files import cache_path
path = cache_path("framework.json")
framework._versions = lambda: {}
def work(): framework._keep(framework.FrameworkCosts(2, 0))
def old(): framework._keep(framework.FrameworkCosts(1, 0))
def read():
    costs = framework.framework_costs()
    return costs.main_memory if costs.measured else None
OLD, NEW, REFUSES = 1, 2, None
"""
TRIALS = """
from lyra_emergence import trial
from lyra_emergence.activations import Activations
from lyra_emergence.cache_files import cache_path
from dataclasses import fields
path = cache_path("trials.json")
activations = Activations(**{field.name: 1 for field in fields(Activations)})
def work(): trial._write(path, {"key": trial.Trial((2,), activations)})
def old(): trial._write(path, {"key": trial.Trial((1,), activations)})
def read():
    held = trial._read(path)
    return held["key"].kv_cache[0] if held else None
OLD, NEW, REFUSES = 1, 2, None
"""
REFERENCE = """
from lyra_emergence.hub import RemoteModel, _commit, _remember
from huggingface_hub import constants
path = Path(constants.HF_HUB_CACHE) / "models--a--b" / "refs" / "main"
def work(): _remember(RemoteModel("a/b", "2" * 40, (), 0))
def old(): _remember(RemoteModel("a/b", "1" * 40, (), 0))
def read(): return _commit(path)
OLD, NEW, REFUSES = "1" * 40, "2" * 40, None
"""
WRITERS = {"configuration": CONFIGURATION, "framework": FRAMEWORK, "trials": TRIALS, "reference": REFERENCE}

SWEEP = """
def left(): return sorted(p.name for p in path.parent.glob("*") if p.name != "kernels")  # what all tests share
found = {"failed": 0, "refused": 0, "killed": 0, "wrong": []}
def expect(what, given, wanted):
    if given not in wanted: found["wrong"].append([what, repr(given), repr(wanted)])

for before in (False, True):
    was = OLD if before else None
    for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
        for ever in (0, 1):
            nth = 0
            while True:
                nth += 1
                path.unlink(missing_ok=True)
                if before: old()
                disk.disk_fail_at(nth, code, ever)
                refused = False
                try:
                    work()
                except Exception as error:
                    refused = True
                    expect(f"error at {nth}", type(error), [REFUSES])
                    expect(f"text at {nth}", str(error).endswith(os.strerror(code).lower()), [True])
                met = disk.disk_injected()
                disk.disk_fail_at(0, 0, 0)
                if not met:
                    expect("end", read(), [NEW])
                    break
                found["failed"] += 1
                found["refused"] += refused
                expect(f"after failure at {nth}", read(), [was] if refused else [was, NEW])
                expect(f"left after failure at {nth}", left(), [[], [path.name]])
    nth = 0
    while True:
        nth += 1
        path.unlink(missing_ok=True)
        if before: old()
        if not killed_at(nth, work):
            expect("last", read(), [NEW])
            break
        found["killed"] += 1
        expect(f"after death at {nth}", read(), [was, NEW])
        rest = [name for name in left() if name != path.name]
        expect(f"left after death at {nth}", len(rest), [0, 1])
        for name in rest:
            os.utime(path.parent / name, (0, 0))
        work()
        expect(f"again after death at {nth}", (read(), left()), [(NEW, [path.name])])
print(json.dumps(found))
"""


@pytest.mark.parametrize("name", WRITERS)
def test_a_small_file_is_written_whole_or_not_at_all(name: str, on_a_bad_disk: Program) -> None:
    found = on_a_bad_disk(WRITERS[name] + SWEEP)
    assert found["wrong"] == []
    # open, write, fsync and rename at least; a folder's own sync is not needed for what a reader sees.
    assert found["failed"] >= 2 * 3 * 2 * 4
    assert found["killed"] >= 2 * 4
    assert found["refused"] == 0 or name == "configuration"


def test_what_a_dead_process_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    target = tmp_path / "a[b].json"
    stale, fresh, other = (
        tmp_path / name for name in (f".{target.name}.0123456789ab.tmp", f".{target.name}.ba9876543210.tmp", ".tmp")
    )
    for path in (stale, fresh, other):
        path.touch()
    os.utime(stale, (0, 0))
    replace_file(target, b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([target.name, fresh.name, other.name])


# --- What reaches the terminal, and questions that are kept --------------------------------------------


@pytest.mark.parametrize("command", [["--version"], ["config", "show"], ["config", "schema"], ["plan"]])
def test_an_output_that_cannot_be_written_is_told_in_a_line(command: list[str], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lyra_emergence.cli", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == [
        "error: the output cannot be written: no space left on device",
        "hint: free some space, or write elsewhere",
    ]


HISTORY = """
import io
from lyra_emergence.cli.editor import _history
from lyra_emergence.cli.console import Console
said = io.StringIO()
history = _history(Console(stderr=said), keep=True)
history.append_string("before")
disk.disk_fail_at(1, errno.ENOSPC, 1)
history.append_string("lost")
history.append_string("lost too")
disk.disk_fail_at(0, 0, 0)
history.append_string("after")
kept = list(_history(Console(stderr=said), keep=True).load_history_strings())
print(json.dumps({"said": said.getvalue(), "kept": kept}))
"""


def test_a_chat_goes_on_where_questions_cannot_be_kept(on_a_bad_disk: Program) -> None:
    found = on_a_bad_disk(HISTORY)
    assert found["said"] == "note: the data folder cannot be written: questions are not kept for next time\n"
    assert found["kept"][0] == "after"
    assert found["kept"][-1] == "before"


# --- Reading ---------------------------------------------------------------------------------------

READS = """
from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.config import load_config
from lyra_emergence.errors import LyraError
from lyra_emergence.hub.files import has_weights
from lyra_emergence.journal import read_journal
place = Path(sys.argv[2])
work = {
    "checkpoint": lambda: repr(read_checkpoint(place / "model").tensors),
    "configuration": lambda: repr(load_config(place / "c.json")),
    "journal": lambda: repr(read_journal(place / "journal.json").entries),
    "weights": lambda: repr(has_weights(place / "model")),
}
disk.disk_reset(os.fsencode(place))
whole = {name: read() for name, read in work.items()}
from lyra_emergence.config import files
files._cache.clear()
disk.disk_cut_reads(7)
short = {name: read() == whole[name] for name, read in work.items()}
disk.disk_cut_reads(0)
broken = {}
for name, read in work.items():
    for nth in range(1, 100):
        files._cache.clear()
        before = disk.disk_injected()
        disk.disk_fail_read_at(nth, errno.EIO)
        try:
            ended = read() == whole[name]
        except LyraError as error:
            ended = str(error)
        disk.disk_fail_read_at(0, 0)
        if disk.disk_injected() == before:
            break
        broken.setdefault(name, []).append(ended)
print(json.dumps({"short": short, "broken": broken}))
"""


def test_reads_that_come_in_pieces_or_fail(
    on_a_bad_disk: Program, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    from .families import build_checkpoint

    build_checkpoint("llama", tmp_path / "model", max_shard_size="100KB")
    (tmp_path / "c.json").write_text('{"gpu_layers_fallback": 3}')
    (tmp_path / "journal.json").write_text('[{"id": "a", "timestamp": "2025-03-02", "text": "The river was high."}]')
    found = on_a_bad_disk(READS, str(tmp_path))
    assert found["short"] == dict.fromkeys(("checkpoint", "configuration", "journal", "weights"), True)
    assert set(found["broken"]) == {"checkpoint", "configuration", "journal", "weights"}
    for name, ends in found["broken"].items():
        for ended in ends:
            assert ended is False if name == "weights" else "input/output error" in str(ended).lower(), (name, ended)


# --- Downloads -------------------------------------------------------------------------------------

ID = "lyra/small"
DOWNLOAD = """
import threading
from lyra_emergence.errors import ModelUnavailableError
from lyra_emergence.hub import download, find_local, look_up
ID = sys.argv[2]
remote = look_up(ID)
cache = Path(os.environ["HF_HOME"])
def wipe():
    import shutil
    shutil.rmtree(cache, ignore_errors=True)
found = {"refused": [], "killed": 0, "half": 0, "wrong": []}
disk.disk_fail_at(0, 0, 0)
download(remote)
total = disk.disk_calls()
good = {file: (find_local(ID) / file).read_bytes() for file in remote.files}
def check(what):
    folder = find_local(ID)
    if folder is not None and {file: (folder / file).read_bytes() for file in remote.files} != good:
        found["wrong"].append(what)
    return folder is not None
for nth in sorted({1, 2, 3, *range(4, total - 4, max(1, total // 8))}):
    wipe()
    disk.disk_fail_at(nth, errno.ENOSPC, 1)
    try:
        download(remote)
    except ModelUnavailableError as error:
        found["refused"].append(str(error))
    if not disk.disk_injected(): found["wrong"].append(f"failure {nth} was not met")
    disk.disk_fail_at(0, 0, 0)
    check(f"after failure {nth}")
    if not download(remote) or not check(f"again after failure {nth}"): found["wrong"].append(f"again {nth}")
    wipe()
    found["killed"] += killed_at(nth, lambda: download(remote))
    found["half"] += not check(f"after death {nth}")
    if not download(remote) or not check(f"again after death {nth}"): found["wrong"].append(f"again {nth}")
print(json.dumps(found))
"""


def test_a_download_meets_a_full_disk_or_dies_anywhere(
    on_a_bad_disk: Program, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "served"
    served.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (served / name).write_bytes(b"{}")
    (served / "model.safetensors").write_bytes(bytes(range(256)) * 200)
    with StandInHub() as hub:
        hub.add(ID, served)
        for name, value in hub.environment(home).items():
            monkeypatch.setenv(name, value)
        found = on_a_bad_disk(DOWNLOAD, ID)
    assert found["wrong"] == []
    assert found["killed"] >= 8
    assert found["half"] >= 4
    assert len(found["refused"]) >= 4
    assert {said.partition(":")[0] for said in found["refused"]} <= {"the disk is full"}
