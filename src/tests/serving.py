"""Servers for tests: a real process on loopback, and one in a thread of this process, for the simulated accelerator."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyra_emergence.turn_lock import TurnLock

from . import families

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

    from lyra_emergence.journal import JournalIndex
    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.server.engine import Engine
    from lyra_emergence.server.guard import Limits

ROOT = Path(__file__).parents[2]
WORDS = families.STORY.split()


def story(words: int) -> str:
    """The story's first words; from there on the tiny checkpoints recite it."""
    return " ".join(WORDS[:words])


class ServerProcess:
    """`lyra.py serve` in a process of its own."""

    def __init__(self, directory: Path, home: Path, *arguments: str, **environ: str) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith("LYRA_")}
        own |= {"HOME": str(home), "XDG_CACHE_HOME": str(home), "HF_HOME": str(home), "PYTHONPATH": str(ROOT / "src")}
        own |= {"LYRA_CPU_KERNELS": "false", "OMP_NUM_THREADS": "1", **environ}
        self.errors = home / "stderr"
        with self.errors.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "lyra.py"), "serve", "--port", "0", "--model", str(directory), *arguments],
                cwd=home,
                env=own,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), self.said
        self.root = self.url.removesuffix("/v1")

    @property
    def said(self) -> str:
        return self.errors.read_text()

    def end(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()


class PacedLock(TurnLock):
    """A model's lock that lets so many through as a test grants; all of them before `hold` and after `let_go`."""

    def __init__(self) -> None:
        super().__init__()
        self._granting = threading.Condition()
        self._granted: int | None = None

    def hold(self, granted: int = 0) -> None:
        with self._granting:
            self._granted = granted
            self._granting.notify_all()

    def let_go(self) -> None:
        with self._granting:
            self._granted = None
            self._granting.notify_all()

    def acquire(self) -> None:
        with self._granting:
            self._granting.wait_for(lambda: self._granted is None or self._granted > 0)
            if self._granted is not None:
                self._granted -= 1
        super().acquire()


def sample_journal() -> JournalIndex:
    """The sample journal as the bundled model is given it."""
    from lyra_emergence.bundled import BUNDLED_PASSAGE_LENGTH
    from lyra_emergence.journal import JournalIndex, read_journal

    journal = JournalIndex(read_journal(ROOT / "data" / "journal" / "sample.json"))
    return journal.with_passages(BUNDLED_PASSAGE_LENGTH, by_words=True)


def told_events(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    """Yield the events of a stream as (name, data)."""
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


@contextlib.contextmanager
def served(
    loaded: LoadedModel,
    engine: Engine,
    limits: Limits,
    *,
    journal: JournalIndex | None = None,
    passages: int = 3,
    name: str = "tiny",
    port: int = 0,
    **settings: Any,
) -> Iterator[str]:
    """Serve a model from a thread of this process; yield the URL."""
    from lyra_emergence.server.app import make_app
    from lyra_emergence.server.running import LyraServer, bound_socket

    ready = threading.Event()
    with bound_socket("127.0.0.1", port) as bound:
        app = make_app(loaded, engine, limits, name=name, journal=journal, passages=passages)
        server = LyraServer(app, engine, on_ready=ready.set, **settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        port = bound.getsockname()[1]
        thread.start()
        try:
            assert ready.wait(60)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
