"""A model that is loaded by another thread, while a person already types."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from lyra_emergence.cli.console import Console
from lyra_emergence.cli.progress import LoadProgress
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from lyra_emergence.cli.ready import OpenModel, Ready
    from lyra_emergence.load_report import LoadEvent

__all__ = ["LoadFailed", "ModelBehind"]

_LOOK_SECONDS: Final = 0.05
"""How often the main thread looks up while it waits: Ctrl-C takes effect in between."""
_LABEL: Final = "loading the model"


class LoadFailed(Exception):  # noqa: N818 - it carries the error
    """The model that was waited for cannot be had.

    Attributes:
        error: Why.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class ModelBehind:
    """Loads one model in a thread of its own.

    Args:
        ready: What loads it.
        console: Where its warnings go, once `tell` is called: a line in the middle of a prompt would garble it.

    Attributes:
        on_change: Called in the thread when `state` changes and at the end.
    """

    def __init__(self, ready: Ready, console: Console) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._ready = ready
        self._console = _Deferred(console)
        self._state = _LABEL
        self._model: OpenModel | None = None
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to load, if that has not begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._load, daemon=True, name="lyra-load")
            self._thread.start()

    @property
    def state(self) -> str:
        """What is being done, in a few words; empty at the end."""
        return "" if self._ended.is_set() else self._state

    @property
    def running(self) -> bool:
        """Whether it has begun and not ended."""
        return self._thread is not None and not self._ended.is_set()

    @property
    def error(self) -> BaseException | None:
        """Why it failed; None as long as it did not."""
        return self._error

    @property
    def model(self) -> OpenModel | None:
        """The model, once it is there."""
        return self._model

    def tell(self) -> None:
        """Print what was to be said meanwhile."""
        self._console.release()

    def wait(self) -> OpenModel:
        """Return the model as soon as it is there, saying meanwhile how far it is.

        Raises:
            LoadFailed: It could not be loaded.
            KeyboardInterrupt: Ctrl-C was pressed; the load goes on.
        """
        self.start()
        if not self._ended.is_set():
            self._wait_visibly()
        self.tell()
        if self._error is not None:
            raise LoadFailed(self._error)
        if self._model is None:
            raise AssertionError("the load ended without a model and without an error")
        return self._model

    def _wait_visibly(self) -> None:
        target = self._console.target
        shown = ""
        try:
            while not self._ended.wait(_LOOK_SECONDS):
                text = f"{self._state}..."[: target.width - 1]
                if target.shows_progress and text != shown:
                    target.stderr.write("\r" + text.ljust(len(shown)))
                    target.stderr.flush()
                    shown = text
        finally:
            if shown:
                target.stderr.write("\r" + " " * len(shown) + "\r")
                target.stderr.flush()

    def _load(self) -> None:
        try:
            with LoadProgress(self._console) as progress:
                self._model = self._ready.open(lambda event: self._heard(event, progress))
        except BaseException as error:  # noqa: BLE001 - it is raised again where it is waited for
            self._error = error
        self._ended.set()
        self.on_change()

    def _heard(self, event: LoadEvent, progress: LoadProgress) -> None:
        progress(event)
        if event.total:
            self._state = f"{_LABEL} {format_bytes(event.done)} of {format_bytes(event.total)}"
        elif event.kind == "compile":
            self._state = event.message
        self.on_change()
        time.sleep(0)  # let the main thread draw


class _Deferred(Console):
    """A console that keeps its lines until they are released."""

    def __init__(self, target: Console) -> None:
        streams = {"stdin": target.stdin, "stdout": target.stdout, "stderr": target.stderr}
        super().__init__(verbose=target.verbose, environ=target.environ, **streams)
        self.target = target
        self._lines: list[str] = []

    @property
    def shows_progress(self) -> bool:
        """Never: someone types."""
        return False

    def say(self, text: str = "") -> None:
        """Keep a line."""
        self._lines.append(text)

    def release(self) -> None:
        """Print the lines that were kept."""
        lines, self._lines = self._lines, []
        for line in lines:
            self.target.say(line)
