"""Draws docs/images/chat.svg: a chat with the bundled model, as tmux captured it.

    uv run python -m benchmarks.chat_image

Needs tmux. Keys are sent to the real program; what its screen shows is drawn.
"""

from __future__ import annotations

import io
import re
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from src.tests.tmux import Tmux

ROOT = Path(__file__).parents[1]
IMAGE = ROOT / "docs" / "images" / "chat.svg"
COLUMNS, ROWS = 80, 24
ENVIRON = {"HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Hold the conversation and write its screen as an SVG without outside fonts."""
    command = [sys.executable, str(ROOT / "lyra.py"), "--no-log", "--model", "lyra-emergence/bundled"]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "data", Path(folder, "data"))
        screen = _screen(command, Path(folder))
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(screen.rstrip("\n")))
    svg = console.export_svg(title="uv run lyra.py")
    # Rich names its fonts by address; a reader's own monospace font does, and nothing is fetched.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    IMAGE.write_text(svg.replace("Fira Code", "ui-monospace, Consolas"), encoding="utf-8")


def _screen(command: list[str], folder: Path) -> str:
    with Tmux(command, folder, columns=COLUMNS, rows=ROWS, environ=ENVIRON) as terminal:
        terminal.ready()
        for question, answered in (("Who dug up a basil plant?", "2025-05-12"), ("/sources", "snap peas")):
            terminal.type(question, "Enter")
            terminal.wait_for(answered, 120)
            terminal.ready()
        terminal.type("/s", "Tab")
        terminal.wait_for("/stats")
        return terminal.screen(colors=True)


if __name__ == "__main__":
    main()
