"""`lyra.py cache`, `lyra.py cache clear`: what Lyra keeps on disk to start faster, and removing it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lyra_emergence.cli.console import Console, strip_controls
from lyra_emergence.cli.status import FAILED
from lyra_emergence.errors import LyraError
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lyra_emergence.cache_contents import Cached

__all__ = ["cache_app"]

JSON_FORMAT: Final = "lyra.cache/1"
_KINDS: Final = ("packed", "kernels", "measured")
_WIDEST_NAME: Final = 34
_NARROWEST_NAME: Final = 12
_BESIDE_NAME: Final = 46
"""Columns that a line takes beside the name of a checkpoint."""
_MINUTE, _HOUR, _DAY = 60, 3600, 86400

cache_app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    help="Show or remove what is kept to start faster.",
)

JsonOption = Annotated[bool, typer.Option("--json", help="as one JSON object")]


@cache_app.callback()
def show_command(context: typer.Context, *, as_json: JsonOption = False) -> int:
    """Show what is kept on disk to start faster: packed weights, compiled kernels, measurements."""
    if context.invoked_subcommand is not None:
        return 0
    from lyra_emergence.cache_contents import cached

    console = Console()
    found = cached()
    limit = _limit()
    if as_json:
        console.print(json.dumps(_as_json(found, limit), indent=2))
    else:
        console.print("\n".join(_lines(found, limit, console)))
    return 0


@cache_app.command("clear")
def clear_command(
    *,
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="a model, or packed, kernels or measured [all]", show_default=False),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="remove without asking")] = False,
    as_json: JsonOption = False,
) -> int:
    """Remove it: all, one kind, or the packed weights of a model."""
    from lyra_emergence.cache_contents import cached, remove

    console = Console()
    chosen = _chosen(cached(), name)
    if not chosen and not as_json:
        console.print("nothing is kept")
        return 0
    if chosen and not yes and not _agrees(chosen, console):
        console.say("nothing was removed")
        return FAILED
    gone = [one for one in chosen if remove(one)]
    left = [one for one in chosen if one not in gone]
    if as_json:
        held = {"removed": [_entry(one) for one in gone], "left": [_entry(one) for one in left]}
        console.print(json.dumps({"format": JSON_FORMAT, **held}, indent=2))
    else:
        console.print(f"removed {_count(gone)}")
    for one in left:
        console.warning(f"{one.path} could not be removed: it may be in use, or the folder is not yours to write to")
    return FAILED if left else 0


def _limit() -> int:
    """Return the bytes that packed weights may take, by the configuration that is found here."""
    from lyra_emergence.config import ModelConfig, resolve_config

    try:
        return resolve_config(None).config.packed_cache_bytes
    except LyraError:
        return ModelConfig().packed_cache_bytes


def _chosen(found: Sequence[Cached], name: str | None) -> list[Cached]:
    if name is None:
        return list(found)
    chosen = [one for one in found if name in (one.kind, one.name, one.path.name, one.source)]
    if not chosen and name not in _KINDS:
        names = dict.fromkeys([*(one.name for one in found if one.kind == "packed"), *_KINDS])
        raise LyraError(
            f"nothing called '{strip_controls(name, one_line=True)}' is kept",
            hint=f"name one of {', '.join(strip_controls(known, one_line=True) for known in names)}",
        )
    return chosen


def _agrees(chosen: Sequence[Cached], console: Console) -> bool:
    """Ask the person at the terminal.

    Raises:
        LyraError: There is none.
    """
    if not console.interactive:
        raise LyraError(f"{_count(chosen)} would be removed, and nobody is there to ask", hint="add --yes")
    for one in chosen:
        console.say(f"  {one.kind:<9} {_name(one)}, {one.about}, {format_bytes(one.nbytes)}")
    console.stderr.write(f"Remove {_count(chosen)}? It is made anew when it is needed. [y/N] ")
    console.stderr.flush()
    return console.stdin.readline().strip().lower() in {"y", "yes"}


def _count(found: Sequence[Cached]) -> str:
    return f"{len(found)} item{'' if len(found) == 1 else 's'}, {format_bytes(sum(one.nbytes for one in found))}"


def _name(one: Cached) -> str:
    return strip_controls(one.name, one_line=True)


def _entry(one: Cached) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "name": one.name,
        "about": one.about,
        "path": str(one.path),
        "bytes": one.nbytes,
        "used": one.used,
        "source": one.source,
    }


def _as_json(found: Sequence[Cached], limit: int) -> dict[str, Any]:
    from lyra_emergence.cache_files import cache_path

    return {
        "format": JSON_FORMAT,
        "folder": str(cache_path("")),
        "packed_cache": limit,
        "packed_bytes": sum(one.nbytes for one in found if one.kind == "packed"),
        "bytes": sum(one.nbytes for one in found),
        "items": [_entry(one) for one in found],
    }


def _lines(found: Sequence[Cached], limit: int, console: Console) -> Iterator[str]:
    from lyra_emergence.cache_files import cache_path

    yield f"folder: {cache_path('')}"
    yield ""
    room = max(_NARROWEST_NAME, console.width - _BESIDE_NAME)
    wide = max([len("name"), *(min(room, _WIDEST_NAME, len(_label(one))) for one in found)])
    if found:
        yield console.style(_line("what", "name", "size", "last used", wide), "dim", stream=console.stdout)
    for one in found:
        yield _line(one.kind, _cut(_label(one), wide), format_bytes(one.nbytes), _ago(one.age), wide)
    if not found:
        yield "nothing is kept"
    yield ""
    packed = sum(one.nbytes for one in found if one.kind == "packed")
    allowed = f"'packed_cache' allows {format_bytes(limit)}" if limit else "'packed_cache' is 0: none are kept"
    yield f"packed weights: {format_bytes(packed)}; {allowed}"
    yield f"in all: {format_bytes(sum(one.nbytes for one in found))}; lyra.py cache clear [NAME] removes it"


def _label(one: Cached) -> str:
    return f"{_name(one)}, {one.about}" if one.kind == "packed" else one.about


def _line(what: str, name: str, size: str, used: str, wide: int) -> str:
    return f"{what:<9}  {name:<{wide}}  {size:>8}  {used}"


def _cut(text: str, wide: int) -> str:
    """Return `text` in at most `wide` columns; what goes is the middle, since ends tell models apart."""
    if len(text) <= wide:
        return text
    head = (wide - 3) // 2
    return f"{text[:head]}...{text[len(text) - (wide - 3 - head) :]}"


def _ago(seconds: float) -> str:
    if seconds < _MINUTE:
        return "just now"
    for unit, size in (("day", _DAY), ("hour", _HOUR), ("minute", _MINUTE)):
        count = int(seconds // size)
        if count:
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "just now"
