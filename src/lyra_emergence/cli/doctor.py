"""`lyra.py doctor`: what this installation has, what it lacks, and what the bundled model is. Loads nothing."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from lyra_emergence.cli.findings import find_all
from lyra_emergence.cli.progress import working
from lyra_emergence.cli.start import go_offline
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lyra_emergence.cli.console import Console, Style
    from lyra_emergence.cli.findings import Finding, Level
    from lyra_emergence.cli.options import Options

__all__ = ["run_doctor"]

_STYLES: Final[dict[Level, Style]] = {"ok": "green", "note": "cyan", "problem": "red"}
_CARD_SECTION = re.compile(r"^## +(.+)$", re.MULTILINE)


def run_doctor(options: Options, console: Console) -> int:
    """Print what was found and the bundled model's card; return 1 if there is a problem, else 0."""
    if options.offline:
        go_offline()
    with working(console, "looking around"):
        findings = list(find_all(options, console))
    card = _card()
    if options.json:
        console.print(
            json.dumps({"findings": [asdict(finding) for finding in findings], "bundled_model": card}, indent=2)
        )
    else:
        console.print("\n".join((*_lines(findings, console), "", *_card_lines(card, console))))
    return int(any(finding.level == "problem" for finding in findings))


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
