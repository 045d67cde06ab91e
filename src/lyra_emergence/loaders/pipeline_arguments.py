"""The arguments of `HuggingFacePipeline.from_model_id`, read as settings of a configuration.

Whatever Lyra's loader cannot honor is an error that names the argument: code that was written for the base class either
keeps its meaning or is told.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PipelineArguments", "lay_over", "named", "read_arguments"]

DEFAULT_BATCH_SIZE: Final = 4
_LEGACY: Final = "safe_load_pipeline_legacy loads with LangChain's own loader, which takes them"
_BACKENDS: Final = ("default", "ipex")
_PLACING: Final = ("device", "device_map")
# They tell transformers how to read a checkpoint, or what to do on a disk; Lyra's loader needs neither.
_WITHOUT_EFFECT: Final = frozenset({"offload_folder", "offload_state_dict", "use_cache", "use_fast", "use_safetensors"})
_REMEDIES: Final = {
    "quantization_config": "write 'load_in_8bit': True or 'load_in_4bit': True",
    "max_length": "write 'max_new_tokens' in 'pipeline_kwargs'",
    "temperature": "write it in 'pipeline_kwargs'",
}


@dataclass(frozen=True, slots=True)
class PipelineArguments:
    """What a call asks for.

    Attributes:
        overrides: Keys of the configuration that the call sets.
        fields: Fields of the LangChain object: `callbacks`, `tags`, ...
        batch_size: What the object shows as its batch size.
        revision: Branch, tag or commit of the model; None for the default.
        local_files_only: Whether a download is forbidden.
    """

    overrides: Mapping[str, Any]
    fields: Mapping[str, Any]
    batch_size: int
    revision: str | None
    local_files_only: bool


def named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of `from_model_id` by name.

    Raises:
        TypeError: They are more than it takes, or one is given twice.
    """
    from langchain_huggingface import HuggingFacePipeline

    bound: dict[str, Any] = inspect.signature(HuggingFacePipeline.from_model_id).bind_partial(*args, **kwargs).arguments
    further: dict[str, Any] = bound.pop("kwargs", {})
    return bound | further


def read_arguments(given: Mapping[str, Any]) -> PipelineArguments:
    """Sort the named arguments of a call.

    Raises:
        ConfigError: An argument cannot be honored, or two contradict each other; every problem is listed.
    """
    from lyra_emergence.langchain import LyraPipeline

    rest = dict(given)
    model_kwargs = {k: v for k, v in (rest.pop("model_kwargs", None) or {}).items() if k not in _WITHOUT_EFFECT}
    overrides: dict[str, Any] = {name: rest.pop(name) for name in ("model_id", "task") if name in rest}
    overrides |= {"pipeline_kwargs": rest.pop("pipeline_kwargs")} if rest.get("pipeline_kwargs") else {}
    problems = [*_contradictions(rest, model_kwargs), *_backend_problem(rest.pop("backend", "default"))]
    placing = {name: rest.pop(name, None) for name in _PLACING}
    batch_size = rest.pop("batch_size", DEFAULT_BATCH_SIZE)
    revision = model_kwargs.pop("revision", None)
    local_files_only = bool(model_kwargs.pop("local_files_only", False))
    dtype = model_kwargs.pop("torch_dtype", None)
    if model_kwargs.get("dtype", dtype) is not None:
        overrides["dtype"] = str(model_kwargs.pop("dtype", dtype))
    overrides |= {k: model_kwargs.pop(k) for k in tuple(model_kwargs) if k in ModelConfig.model_fields}
    fields = {name: rest.pop(name) for name in tuple(rest) if name in _own_fields(LyraPipeline)}
    problems += [f"'{name}'{_remedy(name)}" for name, value in {**rest, **model_kwargs}.items() if value is not None]
    if problems:
        raise ConfigError("arguments that Lyra's loader does not take:", problems=tuple(problems), hint=_LEGACY)
    device_map = _device_map(placing["device"], placing["device_map"])
    if device_map is not None:
        overrides["device_map"] = device_map
    return PipelineArguments(overrides, fields, batch_size, revision, local_files_only)


def lay_over(config: ModelConfig, overrides: Mapping[str, Any]) -> ModelConfig:
    """Return `config` with `overrides` above it; `config` itself is left as it is.

    `pipeline_kwargs` and `max_memory` are merged entry by entry, as between a file and the command line.

    Raises:
        ConfigError: A value is wrong; every problem is listed.
    """
    values = dict(overrides)
    checked = ModelConfig(**overrides)
    for name in ("pipeline_kwargs", "max_memory"):
        below, above = getattr(config, name), getattr(checked, name)
        if below and above:
            values[name] = below | above
    return ModelConfig(**(config.model_dump() | values))


def _own_fields(pipeline: Any) -> set[str]:
    return set(pipeline.model_fields) - {"pipeline", "model_id", "model_kwargs", "pipeline_kwargs", "batch_size"}


def _remedy(name: str) -> str:
    return f": {_REMEDIES[name]}" if name in _REMEDIES else ""


def _contradictions(given: Mapping[str, Any], model_kwargs: Mapping[str, Any]) -> list[str]:
    said = [f"'{name}'" for name in _PLACING if given.get(name) is not None]
    said += ["'model_kwargs.device_map'"] if model_kwargs.get("device_map") is not None else []
    return [f"{' and '.join(said)} together: keep one"] if said[1:] else []


def _backend_problem(backend: object) -> list[str]:
    return [] if backend in _BACKENDS else [f"'backend' {backend!r}"]


def _device_map(device: Any, device_map: Any) -> Any:
    """Return the map that `device` (as LangChain counts: -1 is the CPU) or `device_map` asks for, or None."""
    if device is None:
        if isinstance(device_map, dict):
            return {name: where if isinstance(where, int) else str(where) for name, where in device_map.items()}
        return None if device_map is None else str(device_map)
    if isinstance(device, int):
        return "cpu" if device < 0 else {"": device}
    return str(device)
