"""Run any Hugging Face causal language model in the memory that a machine really has.

Names are loaded on first use, so that `import lyra_emergence` costs milliseconds and planning never pays for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "lyra_emergence":
    # Two copies of one module would mean two exception trees: `except LyraError` would miss half of the errors.
    raise ImportError(f"import it as 'lyra_emergence', not as {__name__!r}")

if TYPE_CHECKING:
    from lyra_emergence.chat import ChatSession
    from lyra_emergence.checkpoint import CheckpointIndex, read_checkpoint
    from lyra_emergence.config import ModelConfig, load_config, resolve_config, save_config
    from lyra_emergence.device_fallback import (
        safe_load_embeddings,
        safe_load_model,
        safe_load_model_with_config,
        safe_load_pipeline,
        safe_load_pipeline_legacy,
    )
    from lyra_emergence.errors import ConfigError, DoesNotFitError, GenerationError, LyraError
    from lyra_emergence.footprint import Footprint, estimate_footprint
    from lyra_emergence.generation import Chunk, GenerationOptions, stream_generate
    from lyra_emergence.hub import find_local
    from lyra_emergence.langchain import LyraPipeline
    from lyra_emergence.loading import LoadedModel, LoadReport, load
    from lyra_emergence.machine import Machine, probe_machine
    from lyra_emergence.plan import Placement, Plan, make_plan

_HOMES = {
    "ChatSession": "chat",
    "CheckpointIndex": "checkpoint",
    "Chunk": "generation",
    "ConfigError": "errors",
    "DoesNotFitError": "errors",
    "Footprint": "footprint",
    "GenerationError": "errors",
    "GenerationOptions": "generation",
    "LoadReport": "loading",
    "LoadedModel": "loading",
    "LyraError": "errors",
    "LyraPipeline": "langchain",
    "Machine": "machine",
    "ModelConfig": "config",
    "Placement": "plan",
    "Plan": "plan",
    "estimate_footprint": "footprint",
    "find_local": "hub",
    "load": "loading",
    "load_config": "config",
    "make_plan": "plan",
    "probe_machine": "machine",
    "read_checkpoint": "checkpoint",
    "resolve_config": "config",
    "safe_load_embeddings": "device_fallback",
    "safe_load_model": "device_fallback",
    "safe_load_model_with_config": "device_fallback",
    "safe_load_pipeline": "device_fallback",
    "safe_load_pipeline_legacy": "device_fallback",
    "save_config": "config",
    "stream_generate": "generation",
}

__all__ = [
    "ChatSession",
    "CheckpointIndex",
    "Chunk",
    "ConfigError",
    "DoesNotFitError",
    "Footprint",
    "GenerationError",
    "GenerationOptions",
    "LoadReport",
    "LoadedModel",
    "LyraError",
    "LyraPipeline",
    "Machine",
    "ModelConfig",
    "Placement",
    "Plan",
    "estimate_footprint",
    "find_local",
    "load",
    "load_config",
    "make_plan",
    "probe_machine",
    "read_checkpoint",
    "resolve_config",
    "safe_load_embeddings",
    "safe_load_model",
    "safe_load_model_with_config",
    "safe_load_pipeline",
    "safe_load_pipeline_legacy",
    "save_config",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'lyra_emergence' has no attribute {name!r}")
    return getattr(import_module(f"lyra_emergence.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
