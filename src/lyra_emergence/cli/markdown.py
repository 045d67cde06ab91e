"""Markdown of a streaming answer, rendered on a terminal.

Blocks that are complete are printed for good; the one that still grows is redrawn in place, at most the last lines that
fit the screen. Line breaks stay as the model wrote them. Covers no links that a terminal could open, no images and no
HTML: those stay text, since what a model writes must not hide where it leads. Controls must be stripped before.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar, Final

from lyra_emergence.cli.console import writing_output
from lyra_emergence.errors import LyraError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lyra_emergence.cli.console import Console

__all__ = ["BlockSplitter", "MarkdownStream", "renders_markdown"]

_NEEDED: Final = "•─│▌"
"""What rich draws lists, rules, tables and quotes with."""
_REDRAW_SECONDS: Final = 0.05
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


def renders_markdown(console: Console) -> bool:
    """Return whether answers go to a terminal that can show rendered Markdown."""
    return console.answers_to_terminal and not console.dumb and console.can_show(_NEEDED)


class BlockSplitter:
    """Splits Markdown that arrives in pieces into blocks that can be rendered one by one.

    A block ends at blank lines outside a fence of code that are followed by a line without indentation: what is
    indented may belong to a list above.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._partial = ""
        self._fence = ""
        self._blank = False

    @property
    def rest(self) -> str:
        """The block that is not complete."""
        return "".join(self._lines) + self._partial

    def feed(self, text: str) -> list[str]:
        """Return the blocks that `text` completes."""
        done: list[str] = []
        *whole, self._partial = (self._partial + text).split("\n")
        for line in whole:
            done += self._take(line + "\n")
        if self._blank and self._partial and not self._partial[0].isspace():
            done += self._end()
        return done

    def _take(self, line: str) -> list[str]:
        done = self._end() if self._blank and line.strip() and not line[0].isspace() else []
        self._lines.append(line)
        marker = _FENCE.match(line)
        if self._fence:
            closes = marker is not None and marker[1].startswith(self._fence) and not line[marker.end() :].strip()
            self._fence = "" if closes else self._fence
        elif marker is not None:
            self._fence = marker[1]
        self._blank = not self._fence and not line.strip()
        return done

    def _end(self) -> list[str]:
        block, self._lines, self._blank = "".join(self._lines), [], False
        return [block] if block.strip() else []


class MarkdownStream:
    """Renders one answer on stdout.

    Args:
        console: Where it goes.
    """

    def __init__(self, console: Console) -> None:
        from rich.console import Console as RichConsole

        self._rich = RichConsole(
            file=console.stdout,
            width=console.width,
            force_terminal=True,
            no_color=not console.colored(console.stdout),
            highlight=False,
            markup=False,
            emoji=False,
        )
        self._splitter = BlockSplitter()
        self._live: Any = None
        self._printed = False
        self._drawn = 0.0
        self._lock = threading.RLock()
        self._later: threading.Timer | None = None

    def feed(self, text: str) -> None:
        """Show more of the answer."""
        with self._lock:
            done = self._splitter.feed(text)
            if done:
                self._stop()
            with writing_output():
                for block in done:
                    self._print(block)
                if done or time.monotonic() - self._drawn >= _REDRAW_SECONDS:
                    self._draw()
                else:
                    self._draw_later()

    def close(self) -> None:
        """Show the rest for good, and give the cursor back."""
        with self._lock:
            self._stop()
            with writing_output():
                if self._splitter.rest.strip():
                    self._print(self._splitter.rest)

    def _draw_later(self) -> None:
        """Draw what has come so far though nothing comes after it: a model may think, a server may hang."""
        if self._later is None:
            self._later = threading.Timer(_REDRAW_SECONDS, self._draw_late)
            self._later.daemon = True
            with contextlib.suppress(RuntimeError):  # no thread can be had: the next piece draws it
                self._later.start()

    def _draw_late(self) -> None:
        with self._lock:
            if self._later is not None:
                with contextlib.suppress(OSError, ValueError, LyraError):  # the next piece meets it as well, and tells
                    self._draw()

    def _draw(self) -> None:
        from rich.live import Live

        self._drawn = time.monotonic()
        self._later = None
        if not self._splitter.rest.strip():
            return
        if self._live is None:
            self._live = Live(
                console=self._rich,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        self._live.update(_Lines(self._block(self._splitter.rest), _last), refresh=True)

    def _stop(self) -> None:
        self._later = None
        if self._live is not None:
            with writing_output():
                self._live.stop()
            self._live = None

    def _print(self, block: str) -> None:
        self._rich.print(self._block(block))
        self._printed = True

    def _block(self, text: str) -> Any:
        from rich.console import Group

        block = _Lines(_markdown(text), _without_margins)
        return Group("", block) if self._printed else block


class _Lines:
    """Something rendered, of whose lines `choose` takes some."""

    def __init__(self, whole: Any, choose: Callable[[list[Any], int], list[Any]]) -> None:
        self._whole = whole
        self._choose = choose

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich.segment import Segment

        lines = console.render_lines(self._whole, options.update(height=None), pad=False)
        for line in self._choose(lines, console.size.height):
            yield from line
            yield Segment.line()


def _last(lines: list[Any], height: int) -> list[Any]:
    """Return as many of the last lines as fit the screen beside the cursor's own line."""
    return lines[-max(1, height - 1) :]


def _without_margins(lines: list[Any], _height: int) -> list[Any]:
    """Return the lines without empty ones at both ends: rich puts them around some kinds of block only."""
    told = [number for number, line in enumerate(lines) if "".join(segment.text for segment in line).strip()]
    return lines[told[0] : told[-1] + 1] if told else lines


def _markdown(text: str) -> Any:
    from markdown_it import MarkdownIt
    from rich.markdown import Heading, Markdown

    class LeftHeading(Heading):
        LEVEL_ALIGN: ClassVar = dict.fromkeys(Heading.LEVEL_ALIGN, "left")

    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    # "[1]: Garden plans" is a line of sources and no definition; an image would be shown as its title alone.
    parser.disable(["reference", "image"])
    rendered = Markdown("", hyperlinks=False)
    rendered.elements = {**Markdown.elements, "heading_open": LeftHeading}  # type: ignore[misc]
    rendered.parsed = parser.parse(text)
    for token in rendered.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return rendered
