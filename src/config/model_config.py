"""The documented import path of the configuration; the code lives in `lyra_emergence.config`."""

from __future__ import annotations

from lyra_emergence.config import (
    CONFIG_LOCATIONS,
    ModelConfig,
    ResolvedConfig,
    config_schema,
    load_config,
    resolve_config,
    save_config,
)

__all__ = [
    "CONFIG_LOCATIONS",
    "ModelConfig",
    "ResolvedConfig",
    "config_schema",
    "load_config",
    "resolve_config",
    "save_config",
]
