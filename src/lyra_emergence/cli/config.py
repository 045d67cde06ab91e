"""`lyra.py config validate|show|schema|init`: check, look into and write configuration files."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lyra_emergence.cli.console import Console
from lyra_emergence.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lyra_emergence.config import ResolvedConfig

__all__ = ["config_app"]

_WIDEST_KEY: Final = 34
_WIDEST_ORIGIN: Final = 12
_SCHEMA_NAME: Final = "model_config.schema.json"
_MERGED: Final = ("max_memory", "pipeline_kwargs")

config_app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Check, show and write the configuration.",
)


@config_app.command("validate")
def validate_command(
    *,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="the file [the one that would be found]", show_default=False)
    ] = None,
) -> int:
    """Check a configuration file and the environment."""
    from lyra_emergence.config import CONFIG_LOCATIONS, resolve_config, variable_for

    console = Console()
    resolved = resolve_config(file)
    _say_notes(resolved, console)
    if resolved.path is None:
        console.print("ok: no file, all defaults")
        console.note(f"looked for {', '.join(CONFIG_LOCATIONS)}")
    else:
        console.print(f"ok: {resolved.path} ({'named' if file else 'found'})")
    changed = [
        variable_for(key) for key, origin in resolved.origins.items() if origin == "environment" and "." not in key
    ]
    if changed:
        console.note(f"the environment sets {', '.join(changed)}")
    return 0


@config_app.command("show")
def show_command(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="values and origins as one JSON object")] = False,
    model_config: Annotated[
        Path | None, typer.Option("--model-config", metavar="PATH", help="configuration file")
    ] = None,
) -> int:
    """Show every value and where it comes from."""
    from lyra_emergence.config import resolve_config

    console = Console()
    resolved = resolve_config(model_config)
    _say_notes(resolved, console)
    if as_json:
        console.print(json.dumps(_as_json(resolved), indent=2, ensure_ascii=False))
    else:
        console.print("\n".join(_rows(resolved, console)))
    return 0


def _say_notes(resolved: ResolvedConfig, console: Console) -> None:
    for note in resolved.notes:
        console.note(note)


def _as_json(resolved: ResolvedConfig) -> dict[str, Any]:
    return {
        "file": None if resolved.path is None else str(resolved.path),
        "values": resolved.config.model_dump(),
        "origins": dict(resolved.origins),
    }


def _rows(resolved: ResolvedConfig, console: Console) -> Iterator[str]:
    """Yield a line per value: key, origin, value; a long value goes on below itself."""
    file = "none found" if resolved.path is None else str(resolved.path)
    yield f"file: {file}"
    yield ""
    rows = list(_flat(resolved))
    key_width = min(_WIDEST_KEY, max(len(key) for key, _, _ in rows))
    indent = key_width + _WIDEST_ORIGIN + 4
    for key, origin, value in rows:
        lines = textwrap.wrap(value, max(20, console.width - indent), break_on_hyphens=False) or [""]
        source = console.style(origin.ljust(_WIDEST_ORIGIN), "dim", stream=console.stdout)
        yield f"{key.ljust(key_width)}  {source}  {lines[0]}"
        yield from (" " * indent + line for line in lines[1:])


def _flat(resolved: ResolvedConfig) -> Iterator[tuple[str, str, str]]:
    for key, value in resolved.config.model_dump().items():
        origin = resolved.origins[key]
        if isinstance(value, dict) and value:
            for entry, item in value.items():
                path = f"{key}.{entry}"
                yield path, resolved.origins[path] if key in _MERGED else origin, _text(item)
        else:
            yield key, origin, _text(value)


def _text(value: object) -> str:
    """Return `value` as the file writes it, without quotes; control characters stay escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text[1:-1] if isinstance(value, str) and "\\" not in text else text


@config_app.command("schema")
def schema_command() -> int:
    """Print the JSON Schema, for editors."""
    Console().print(_schema_text())
    return 0


@config_app.command("init")
def init_command(
    *,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="the file to write")] = Path("config/model_config.json"),
    force: Annotated[bool, typer.Option("--force", help="replace a file that is there")] = False,
) -> int:
    """Write the documented example, and its schema."""
    from lyra_emergence.config.files import write_whole
    from lyra_emergence.config.model import EXAMPLE

    schema = path.with_name(_SCHEMA_NAME)
    if path == schema:
        raise ConfigError(f"{path} is the schema's own name", hint="choose another name for the configuration")
    example = json.dumps({"$schema": f"./{_SCHEMA_NAME}", **EXAMPLE}, indent=2) + "\n"
    # The schema first: a configuration that stands has the schema that it refers to.
    texts = {schema: _schema_text() + "\n", path: example}
    if not force:
        for file, text in texts.items():
            _refuse_to_replace(file, text)
    for file, text in texts.items():
        write_whole(file, text)
        Console().print(f"wrote {file}")
    return 0


def _refuse_to_replace(file: Path, text: str) -> None:
    if not os.path.lexists(file):
        return
    if not (file.is_file() and file.read_bytes() == text.encode()):
        raise ConfigError(f"{file} exists", hint="add --force to replace it, or choose another path")


def _schema_text() -> str:
    from lyra_emergence.config import config_schema

    return json.dumps(config_schema(), indent=2, ensure_ascii=False)
