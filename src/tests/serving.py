"""Servers for tests: a real process on loopback, and one in a thread of this process, for the simulated accelerator."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import families

if TYPE_CHECKING:
    from collections.abc import Iterator

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


@contextlib.contextmanager
def served(loaded: LoadedModel, engine: Engine, limits: Limits, **settings: Any) -> Iterator[str]:
    """Serve a model from a thread of this process; yield the URL."""
    from lyra_emergence.server.app import make_app
    from lyra_emergence.server.running import LyraServer, bound_socket

    ready = threading.Event()
    with bound_socket("127.0.0.1", 0) as bound:
        app = make_app(loaded, engine, limits, name="tiny")
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
