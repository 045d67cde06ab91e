"""The configuration: its keys, and the value of each from the command line, the environment, a file or the defaults.

`ModelConfig(...)` is what its caller says and nothing else. `resolve_config` and `load_config` lay the sources over
each other, the higher one winning key by key:

    command line (or call)  >  environment (LYRA_<KEY>)  >  file  >  default

`max_memory` and `pipeline_kwargs` are merged entry by entry, so that LYRA_MAX_MEMORY=0=4GB leaves the file's limit for
"cpu" as it is; null in a higher source clears all entries below it. `device_map` and lists are replaced.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lyra_emergence.config.checks import check_together, check_values
from lyra_emergence.config.devices import budget_bytes, device_key
from lyra_emergence.config.environment import parse_memory_limits, read_environment, variable_for
from lyra_emergence.config.files import CONFIG_LOCATIONS, discover, read_config_file, write_config_file
from lyra_emergence.config.model import ModelConfig, config_schema
from lyra_emergence.config.problems import Problems

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "CONFIG_LOCATIONS",
    "ModelConfig",
    "ResolvedConfig",
    "budget_bytes",
    "config_schema",
    "device_key",
    "load_config",
    "resolve_config",
    "save_config",
    "variable_for",
]

Origin = Literal["default", "file", "named file", "environment", "command line", "call"]
_MERGED = ("max_memory", "pipeline_kwargs")


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """The effective configuration, and where it comes from.

    Attributes:
        config: The values; the caller's own copy.
        path: The file that was used, or None.
        origins: Where each key was set: "default", "file" (discovered), "named file", "environment", "command line"
            or "call". A merged key ("max_memory") has the highest source that touched it, and each of its entries
            ("max_memory.0") its own.
        notes: What the user should know, such as a variable that looks like a slip.
    """

    config: ModelConfig
    path: Path | None
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()


def resolve_config(
    path: str | Path | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    overrides_origin: Literal["command line", "call"] = "command line",
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> ResolvedConfig:
    """Return the configuration that all sources together give.

    Args:
        path: A configuration file; where None, the first of `CONFIG_LOCATIONS` that exists, else no file.
        overrides: Values above all others. None clears a key; `max_memory` may be text ("0=6GB,cpu=16GB").
        overrides_origin: What `origins` calls the overrides.
        environ: The environment; by default this process's.
        directory: Where the file is looked for; by default the current directory.

    Raises:
        ConfigError: A named file is missing, or a source is wrong; every problem of every source is listed.
    """
    problems = Problems()
    named = path is not None
    file = _expanded(path) if path is not None else discover(directory or Path())
    layers = _Layers()
    if file is not None:
        layers.add(read_config_file(file, problems), "named file" if named else "file", str(file))
    values, notes = read_environment(os.environ if environ is None else environ, problems)
    layers.add(values, "environment", "the environment")
    layers.add(_check_overrides(overrides or {}, overrides_origin, problems), overrides_origin, overrides_origin)
    check_together(layers.values, problems, layers.sources)
    if problems.lines:
        raise problems.error(hint=_hint(file, named=named))
    return ResolvedConfig(ModelConfig(**layers.values), file, layers.origins, notes)


def load_config(config_path: str | Path | None = None) -> ModelConfig:
    """Return the configuration from a file, with the environment above it and the defaults below.

    The file is parsed once and again after it changed; each call returns its own copy.

    Args:
        config_path: The file; where None, the first of `CONFIG_LOCATIONS` that exists, else the defaults.

    Raises:
        ConfigError: A named file is missing, or a source is wrong; every problem is listed.
    """
    return resolve_config(config_path).config


def save_config(config: ModelConfig, config_path: str | Path) -> None:
    """Write every key of `config` to `config_path`, whole or not at all.

    Args:
        config: The configuration.
        config_path: The file; missing folders are made, a file that stands there is replaced in one step.

    Raises:
        ConfigError: A dict of `config` was changed in place to something wrong.
        LyraError: The file cannot be written; what stood there still does.
    """
    values = config.model_dump()
    problems = Problems()
    check_values(values, problems)
    check_together(values, problems)
    problems.raise_if_any()
    write_config_file(_expanded(config_path), values)


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # "~somebody" who is no user of this machine, or no home: a name like any other
        return Path(path)


class _Layers:
    """Checked values laid over each other, lowest first.

    Attributes:
        values: The result.
        origins: Origin by key, and by entry of a merged key.
        sources: The same in words for a message: a file's name instead of "file".
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = dict.fromkeys(ModelConfig.model_fields, "default")
        self.sources: dict[str, str] = {}

    def add(self, values: Mapping[str, Any], origin: Origin, source: str) -> None:
        for key, value in values.items():
            below = self.values.get(key)
            if key in _MERGED:
                if value is None:
                    self._forget_entries(key)
                else:
                    self.origins |= dict.fromkeys((f"{key}.{entry}" for entry in value), origin)
                    value = {**(below or {}), **value}  # noqa: PLW2901 - the merged value is the key's value
            self.values[key] = value
            self.origins[key] = origin
            self.sources[key] = variable_for(key) if origin == "environment" else source

    def _forget_entries(self, key: str) -> None:
        self.origins = {name: origin for name, origin in self.origins.items() if not name.startswith(f"{key}.")}


def _check_overrides(overrides: Mapping[str, Any], origin: str, problems: Problems) -> dict[str, Any]:
    found = Problems(origin)
    raw = dict(overrides)
    if isinstance(raw.get("max_memory"), str):
        raw["max_memory"] = parse_memory_limits(raw["max_memory"], "max_memory", found)
    values = check_values(raw, found)
    problems.lines += found.lines
    return values


def _hint(file: Path | None, *, named: bool) -> str:
    if file is not None and named and not file.exists():
        return "check the path, or write an example there with: lyra.py config init PATH"
    return "'lyra.py config schema' describes every key"
