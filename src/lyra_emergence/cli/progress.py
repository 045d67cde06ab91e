"""Progress of downloads and loading on stderr: a bar on a terminal, one line at the end elsewhere."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from lyra_emergence import hub
from lyra_emergence.cli.console import strip_controls
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lyra_emergence.cli.console import Console
    from lyra_emergence.hub import RemoteModel
    from lyra_emergence.loading import LoadEvent

__all__ = ["LoadProgress", "fetch", "working"]


@contextmanager
def working(console: Console, what: str) -> Iterator[None]:
    """Show that `what` is under way, on a terminal only, and take it away when it is over."""
    if not console.shows_progress:
        yield
        return
    text = f"{what}..."
    console.stderr.write(text)
    console.stderr.flush()
    try:
        yield
    finally:
        console.stderr.write("\r" + " " * len(text) + "\r")
        console.stderr.flush()


class LoadProgress:
    """Shows the events of one load: call it with each of them, inside `with`.

    Each fallback is a line of its own that stays: what happened, why, and what is tried now.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Any = None
        self._task: Any = None
        self._started = 0.0
        self._failure = ""

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._console.shows_progress:
            self._bar, self._task = _start_bar(self._console, "opening the model")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._tell_failure("")

    def __call__(self, event: LoadEvent) -> None:
        """Show one event."""
        self._console.debug(f"{time.monotonic() - self._started:6.2f} s  {event.kind}: {event.message}")
        if self._bar is not None and event.kind == "compile":
            self._bar.update(self._task, description=event.message)
        if self._bar is not None and event.total:
            self._bar.update(self._task, description="loading", completed=event.done, total=event.total)
            self._bar.update(self._task, amount=f"{format_bytes(event.done)} of {format_bytes(event.total)}")
        if event.kind == "rank":
            self._console.note(event.message)
        if event.kind == "rung-failed":
            self._failure = event.message
        elif self._failure:
            self._tell_failure(f"; {event.message}")

    def _tell_failure(self, now: str) -> None:
        """Say in one line that a rung failed and what is done `now`; the bar makes way for it."""
        if not self._failure:
            return
        if self._bar is not None:
            self._bar.stop()
        self._console.warning(self._failure + now)
        self._failure = ""
        if self._bar is not None and now:
            self._bar.start()


def fetch(remote: RemoteModel, console: Console) -> Path:
    """Download a model with a progress bar, and return its folder."""
    free = f"{format_bytes(hub.free_disk())} free on the disk"
    console.note(f"downloading {remote.model_id}: {format_bytes(remote.nbytes)}, {free}")
    if not console.shows_progress:
        folder = hub.download(remote)
        console.note(f"downloaded {remote.model_id}")
        return folder
    bar, task = _start_bar(console, "downloading")
    try:
        return hub.download(remote, progress=_per_file(bar, task, remote.nbytes))
    finally:
        bar.stop()


def _per_file(bar: Any, task: Any, total: int) -> Any:
    done: dict[str, int] = {}

    def show(name: str, file_done: int, _file_total: int) -> None:
        done[name] = file_done
        label = strip_controls(name, one_line=True)
        so_far = sum(done.values())
        amount = f"{format_bytes(so_far)} of {format_bytes(total)}"
        bar.update(task, completed=so_far, total=total, description=label, amount=amount)

    return show


def _start_bar(console: Console, label: str) -> tuple[Any, Any]:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeElapsedColumn(),
        console=RichConsole(file=console.stderr, no_color=not console.colored(console.stderr)),
        transient=True,
        # Warnings are printed by us through the same stream while the bar is up: rich moves it below them.
        redirect_stdout=False,
        redirect_stderr=True,
    )
    bar.start()
    return bar, bar.add_task(label, total=None, amount="")
