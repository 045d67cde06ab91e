"""The documented loading functions: a model from its id, placed by a plan, with progressive fallback.

`safe_load_pipeline` and `safe_load_model_with_config` with `HuggingFacePipeline.from_model_id` load through Lyra's own
path. Any other loader callable is called once per rung with the arguments it takes; only running out of memory moves
on to the next rung, and every other error surfaces unchanged.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TypeVar

from lyra_emergence.config import ModelConfig, load_config
from lyra_emergence.errors import ConfigError
from lyra_emergence.load_report import LoadEvent

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from langchain_huggingface import HuggingFaceEmbeddings, HuggingFacePipeline

    from lyra_emergence.langchain import LyraPipeline

__all__ = [
    "log_events",
    "safe_load_embeddings",
    "safe_load_model",
    "safe_load_model_with_config",
    "safe_load_pipeline",
    "safe_load_pipeline_legacy",
]

T = TypeVar("T")

_LEVELS = {
    "demote": logging.INFO,
    "note": logging.WARNING,
    "ready": logging.INFO,
    "rung-failed": logging.WARNING,
    "rung-passed": logging.INFO,
}


def log_events(logger: logging.Logger) -> Callable[[LoadEvent], None]:
    """Return an event handler that writes each step of loading to `logger`: fallbacks as warnings, copies as debug."""

    def log(event: LoadEvent) -> None:
        logger.log(_LEVELS.get(event.kind, logging.DEBUG), "%s", event.message)

    return log


_log = log_events(logging.getLogger(__name__))


def safe_load_pipeline(
    model_id: str,
    task: str,
    config_path: str | Path | None = None,
    *,
    on_event: Callable[[LoadEvent], None] = _log,
    **kwargs: Any,
) -> LyraPipeline:
    """Load a model for LangChain, as a configuration file says.

    Args:
        model_id: A hub id or the folder of a checkpoint; stands above the file's.
        task: "text-generation".
        config_path: The configuration file; by default the first one in the documented places, if any.
        on_event: Called with every step of loading; logs it by default.
        **kwargs: What `HuggingFacePipeline.from_model_id` takes: `device`, `device_map`, `model_kwargs`,
            `pipeline_kwargs`, `batch_size`. They stand above the configuration.

    Raises:
        ConfigError: The file, or an argument, is wrong.
        ModelUnavailableError: The model is neither on disk nor to be had from the hub.
        DoesNotFitError: It fits nowhere.
    """
    return _load_pipeline(load_config(config_path), model_id, task, on_event, kwargs)


def safe_load_model_with_config(
    model_loader: Callable[..., T],
    config: ModelConfig | None = None,
    *args: Any,
    on_event: Callable[[LoadEvent], None] = _log,
    **kwargs: Any,
) -> T:
    """Load a model with any loader, placed and with fallback as a configuration says.

    Args:
        model_loader: `HuggingFacePipeline.from_model_id`, `AutoModelForCausalLM.from_pretrained`, or any callable.
        config: The configuration; by default the one that `load_config()` finds.
        *args: For the loader; the model id first, where it takes one.
        on_event: Called with every step; logs it by default.
        **kwargs: For the loader; they stand above the configuration.

    Returns:
        What the loader returns; for `HuggingFacePipeline.from_model_id` a `LyraPipeline`, which is one.

    Raises:
        DoesNotFitError: Memory ran out and no fallback is left or allowed.
    """
    from lyra_emergence.loader_ladder import call_with_fallback

    config = config if config is not None else load_config()
    if _is_pipeline_loader(model_loader):
        model_id, task, rest = _pipeline_arguments(args, kwargs, config)
        made: Any = _load_pipeline(config, model_id, task, on_event, rest)
        return made  # type: ignore[no-any-return]
    return call_with_fallback(model_loader, config, args, kwargs, on_event)


def safe_load_model(
    model_loader: Callable[..., T], *args: Any, on_event: Callable[[LoadEvent], None] = _log, **kwargs: Any
) -> T:
    """Call a loader, and once more on the CPU if memory runs out.

    Args:
        model_loader: Any callable that loads a model.
        *args: For the loader.
        on_event: Called when memory runs out; logs it by default.
        **kwargs: For the loader. The second call asks for the CPU the way the loader takes it: `device_map="cpu"`,
            `device=-1`, or `device` in its `model_kwargs`.

    Raises:
        BaseException: Whatever the loader raises for another reason, unchanged.
    """
    from lyra_emergence.loader_ladder import call_or_cpu

    return call_or_cpu(model_loader, args, kwargs, on_event)


def safe_load_pipeline_legacy(
    model_id: str, task: str, *, on_event: Callable[[LoadEvent], None] = _log, **kwargs: Any
) -> HuggingFacePipeline:
    """Load LangChain's own pipeline without a plan: on its default device, and on the CPU if memory runs out there.

    Args:
        model_id: A hub id or the folder of a checkpoint.
        task: "text-generation" and the other tasks of `HuggingFacePipeline.from_model_id`.
        on_event: Called when memory runs out; logs it by default.
        **kwargs: For `HuggingFacePipeline.from_model_id`.
    """
    from langchain_huggingface import HuggingFacePipeline

    return safe_load_model(HuggingFacePipeline.from_model_id, model_id, task, on_event=on_event, **kwargs)


def safe_load_embeddings(*, on_event: Callable[[LoadEvent], None] = _log, **kwargs: Any) -> HuggingFaceEmbeddings:
    """Load LangChain's embeddings, and on the CPU if memory runs out.

    Args:
        on_event: Called when memory runs out; logs it by default.
        **kwargs: For `HuggingFaceEmbeddings`: `model_name`, `model_kwargs`, `encode_kwargs`, ...
    """
    from langchain_huggingface import HuggingFaceEmbeddings

    return safe_load_model(HuggingFaceEmbeddings, on_event=on_event, **kwargs)


def _is_pipeline_loader(loader: Callable[..., Any]) -> bool:
    from langchain_huggingface import HuggingFacePipeline

    return bool(loader == HuggingFacePipeline.from_model_id)


def _pipeline_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], config: ModelConfig
) -> tuple[str, str, dict[str, Any]]:
    """Return (model id, task, the rest) from the arguments of `HuggingFacePipeline.from_model_id`."""
    names = ("model_id", "task", "backend", "device", "device_map", "model_kwargs", "pipeline_kwargs", "batch_size")
    given = dict(zip(names, args, strict=False)) | kwargs
    return given.pop("model_id", config.model_id), given.pop("task", config.task), given


def _load_pipeline(
    config: ModelConfig,
    model_id: str,
    task: str,
    on_event: Callable[[LoadEvent], None],
    kwargs: dict[str, Any],
) -> LyraPipeline:
    from lyra_emergence.hub import locate

    from lyra_emergence.langchain import LyraPipeline
    from lyra_emergence.loading import load

    batch_size = kwargs.pop("batch_size", 4)
    chosen = _with_arguments(config, model_id, task, kwargs)
    loaded = load(chosen, directory=_locate(model_id), on_event=on_event)
    for note in loaded.plan.notes:
        on_event(LoadEvent("note", note))
    return LyraPipeline.from_loaded(loaded, model_id=model_id, batch_size=batch_size)


def _locate(model_id: str) -> Path:
    """Return the folder of a model that was named, fetching it if it is not on disk."""
    from lyra_emergence.hub import download, find_local, look_up

    return find_local(model_id) or download(look_up(model_id))


def _with_arguments(config: ModelConfig, model_id: str, task: str, kwargs: dict[str, Any]) -> ModelConfig:
    """Lay the arguments of `HuggingFacePipeline.from_model_id` over a configuration."""
    model_kwargs = dict(kwargs.pop("model_kwargs", None) or {})
    overrides: dict[str, Any] = {"model_id": model_id, "task": task}
    if "torch_dtype" in model_kwargs:
        model_kwargs["dtype"] = model_kwargs.pop("torch_dtype")
    if model_kwargs.get("dtype") is not None:
        model_kwargs["dtype"] = str(model_kwargs["dtype"]).removeprefix("torch.")
    known = set(ModelConfig.model_fields)
    unknown = sorted(name for name in model_kwargs if name not in known)
    unknown += sorted(set(kwargs) - {"device", "device_map", "pipeline_kwargs", "backend"})
    if unknown:
        raise ConfigError(
            "arguments that Lyra's loader does not take:",
            problems=tuple(f"'{name}'" for name in unknown),
            hint="use safe_load_pipeline_legacy for LangChain's own loader",
        )
    overrides |= model_kwargs
    device_map = _device_argument(kwargs)
    if device_map is not None:
        overrides["device_map"] = device_map
    overrides["pipeline_kwargs"] = (config.pipeline_kwargs or {}) | (kwargs.get("pipeline_kwargs") or {}) or None
    return ModelConfig(**(config.model_dump() | overrides))


def _device_argument(kwargs: dict[str, Any]) -> Any:
    """Return the device map that `device` (LangChain: -1 is the CPU) or `device_map` asks for, or None."""
    device = kwargs.get("device")
    if device is None:
        return kwargs.get("device_map")
    if isinstance(device, int):
        return "cpu" if device < 0 else {"": device}
    return str(device)
