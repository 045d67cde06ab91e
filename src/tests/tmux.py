"""A terminal as a person has one: tmux runs the program, keys are sent, and panes are captured.

with Tmux(["lyra.py"], columns=80, environ={...}) as terminal:
    terminal.wait_for("> ")
    terminal.type("Who dug up a basil plant?", "Enter")
    terminal.wait_for("[1] 2025-05-12")
    print(terminal.screen())

Every terminal has a tmux server of its own, which ends with it.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["MISSING", "Tmux"]

MISSING = shutil.which("tmux") is None
_LOOK_SECONDS = 0.02


class Tmux:
    """A terminal.

    Args:
        command: What runs in it; its exit status is on the screen afterwards as "status N".
        directory: Where it runs.
        columns: The screen's width.
        rows: Its height.
        environ: Variables beside, or in place of, those of this process.
    """

    def __init__(
        self,
        command: Sequence[str],
        directory: Path,
        *,
        columns: int = 80,
        rows: int = 24,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        # Not below the test's own folder: the name of a socket may have 108 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="lyra-tmux-"))
        self._socket = str(self._folder / "s")
        set_up = " ".join(f"{name}={shlex.quote(value)}" for name, value in (environ or {}).items())
        # Ctrl-C reaches the shell as well, and must not end it.
        line = f"unset COLUMNS LINES; trap : INT; {set_up} {shlex.join(command)}; echo status $?; exec cat"
        self._size = (columns, rows)
        self._arguments = ["-c", str(directory), "-x", str(columns), "-y", str(rows), f"sh -c {shlex.quote(line)}"]

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        # UTF-8 or not is the program's own matter: -u lets tmux show whatever it writes.
        self._tmux("-u", "-f", "/dev/null", "new-session", "-d", *self._arguments)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["tmux", "-S", self._socket, "kill-server"], check=False, capture_output=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def type(self, *keys: str) -> None:
        """Send text, or keys by tmux's names: "Enter", "C-c", "Tab"."""
        for key in keys:
            literal = [] if re.fullmatch(r"Enter|Tab|Escape|Up|BSpace|[CM]-\w", key) else ["-l"]
            self._tmux("send-keys", *literal, "--", key)

    def screen(self, *, colors: bool = False, history: bool = False) -> str:
        """Return what is on the screen, with its colors as escape sequences where asked for."""
        options = [*(["-e"] if colors else []), *(["-S", "-"] if history else [])]
        return self._tmux("capture-pane", "-p", *options)

    def wait_for(self, wanted: str, seconds: float = 20) -> str:
        """Return the screen as soon as it matches the pattern `wanted`, tried on each line and on the whole."""
        end = time.monotonic() + seconds
        while not re.search(wanted, screen := self.screen(), re.MULTILINE):
            assert time.monotonic() < end, f"no {wanted!r} on the screen:\n{screen}"
            time.sleep(_LOOK_SECONDS)
        return screen

    def ready(self) -> str:
        """Return the screen as soon as it ends with an empty prompt and the status line, where keys are read."""
        return self.wait_for(r"^>\s*\n\s*\S[^\n]*\s*\Z")

    def process(self, name: str) -> int:
        """Return the id of the process in this terminal whose command line holds `name`, the shell's own excepted."""
        pane = int(self._tmux("display-message", "-p", "#{pane_pid}"))
        listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], check=True, capture_output=True, text=True).stdout
        rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
        family = {pane}
        for _ in range(4):
            family |= {int(pid) for pid, parent, _ in rows if int(parent) in family}
        return next(int(pid) for pid, _, args in rows if int(pid) in family - {pane} and name in args)

    def _tmux(self, *arguments: str) -> str:
        done = subprocess.run(["tmux", "-S", self._socket, *arguments], check=True, capture_output=True, text=True)
        return done.stdout
