"""Draws docs/images/plan.svg: what `lyra.py plan` prints for a model on other hardware, as a terminal shows it.

    uv run python -m benchmarks.plan_image

The checkpoint is phi-2's real shape with its real tensors' names and no data: planning reads headers only.
"""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from src.tests.paper_checkpoints import phi2

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "plan.svg"
COMMAND = ("plan", "microsoft/phi-2", "--gpu", "6GB", "--ram", "16GB")


def main() -> None:
    """Run the command in an empty folder and write what it printed as an SVG without outside fonts."""
    with tempfile.TemporaryDirectory() as folder:
        phi2(Path(folder, "microsoft", "phi-2"))
        printed = _on_a_terminal([sys.executable, "-m", "lyra_emergence.cli", *COMMAND], Path(folder))
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(Text.from_ansi(f"$ uv run lyra.py {' '.join(COMMAND)}\n\n{printed}"))
    svg = console.export_svg(title="lyra.py plan")
    # Rich names its fonts by address; a reader's own monospace font does, and nothing is fetched.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    IMAGE.parent.mkdir(exist_ok=True)
    IMAGE.write_text(svg.replace("Fira Code", "ui-monospace, Consolas"), encoding="utf-8")


def _on_a_terminal(command: list[str], folder: Path) -> str:
    """Return what a command prints to a terminal of 80 columns, colors included."""
    master, terminal = pty.openpty()
    environment = {"TERM": "xterm-256color", "COLUMNS": "80", "HOME": str(folder), "PYTHONUTF8": "1"}
    with subprocess.Popen(  # this interpreter and Lyra
        command, cwd=folder, env=environment, stdout=terminal, stderr=subprocess.DEVNULL
    ):
        os.close(terminal)
        printed = b""
        try:
            while piece := os.read(master, 65536):
                printed += piece
        except OSError:  # Linux says so when the program has closed its end
            pass
    os.close(master)
    return printed.decode().replace("\r\n", "\n")


if __name__ == "__main__":
    main()
