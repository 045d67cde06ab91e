"""The documented loading functions: a model from its id, placed by a plan, with progressive fallback.

`safe_load_pipeline` and `safe_load_model_with_config` with `HuggingFacePipeline.from_model_id` load through Lyra's own
path. Any other loader callable is called once per rung with the arguments it takes; only running out of memory moves
on to the next rung, and every other error surfaces unchanged.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lyra_emergence.config import load_config, resolve_config
from lyra_emergence.errors import ModelUnavailableError
from lyra_emergence.load_report import LoadEvent

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from langchain_huggingface import HuggingFaceEmbeddings, HuggingFacePipeline

    from lyra_emergence.config import ModelConfig
    from lyra_emergence.langchain import LyraPipeline
    from lyra_emergence.loaders.pipeline_arguments import PipelineArguments

__all__ = [
    "log_events",
    "safe_load_embeddings",
    "safe_load_model",
    "safe_load_model_with_config",
    "safe_load_pipeline",
    "safe_load_pipeline_legacy",
]

T = TypeVar("T")

_LANGCHAIN_EMBEDDINGS = "sentence-transformers/all-mpnet-base-v2"
"""What `HuggingFaceEmbeddings` loads when nothing is named."""

_LEVELS = {
    "demote": logging.INFO,
    "download": logging.INFO,
    "note": logging.WARNING,
    "ready": logging.INFO,
    "rung-failed": logging.WARNING,
    "rung-passed": logging.INFO,
}


def log_events(logger: logging.Logger) -> Callable[[LoadEvent], None]:
    """Return an event handler that writes each step of loading to `logger`: fallbacks as warnings, copies as debug.

    Where no logging is set up, Python shows warnings on stderr and drops the rest, whatever the logger's level. What
    the level allows is then shown in the same way, so that `logger.setLevel(logging.DEBUG)` is enough to see each step.
    """

    def log(event: LoadEvent) -> None:
        level = _LEVELS.get(event.kind, logging.DEBUG)
        if level >= logging.WARNING or logger.hasHandlers():
            logger.log(level, "%s", event.message)
        elif logger.isEnabledFor(level):
            record = logger.makeRecord(logger.name, level, __file__, 0, event.message, (), None)
            logging.StreamHandler().handle(record)

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
            `pipeline_kwargs`, `batch_size`, and LangChain's own (`callbacks`, ...). They stand above the configuration.

    Raises:
        ConfigError: The file, or an argument, is wrong; another task than "text-generation" is.
        ModelUnavailableError: The model is neither on disk nor to be had from the hub.
        DoesNotFitError: It fits nowhere.
    """
    from lyra_emergence.loaders.pipeline_arguments import read_arguments

    asked = read_arguments({**kwargs, "model_id": model_id, "task": task})
    config = resolve_config(config_path, overrides=asked.overrides, overrides_origin="call").config
    return _load_pipeline(config, asked, on_event)


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
        **kwargs: For the loader; they stand above the configuration. A loader is given only what it takes.

    Returns:
        What the loader returns; for `HuggingFacePipeline.from_model_id` a `LyraPipeline`, which is one.

    Raises:
        ConfigError: An argument cannot be honored.
        DoesNotFitError: Memory ran out and no fallback is left or allowed.
        BaseException: Whatever else the loader raises, unchanged.
    """
    from lyra_emergence.loaders.ladder import call_with_fallback

    config = config if config is not None else load_config()
    loader, args, kwargs = _unwrapped(model_loader, args, kwargs)
    if not _is_pipeline_loader(loader):
        return call_with_fallback(loader, config, args, kwargs, on_event)
    from lyra_emergence.loaders.pipeline_arguments import lay_over, named, read_arguments

    asked = read_arguments(named(args, kwargs))
    return cast("T", _load_pipeline(lay_over(config, asked.overrides), asked, on_event))


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
    from lyra_emergence.loaders.ladder import call_or_cpu

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

    all-MiniLM-L6-v2 is taken from the extra `offline` where the Hugging Face cache lacks it. Without a `model_name` it
    stands in for LangChain's default model, unless that one is in the cache.

    Args:
        on_event: Called when memory runs out; logs it by default.
        **kwargs: For `HuggingFaceEmbeddings`: `model_name`, `model_kwargs`, `encode_kwargs`, ...
    """
    from langchain_huggingface import HuggingFaceEmbeddings

    name = "model" if "model" in kwargs else "model_name"
    found = _embedding_folder(kwargs.get(name), on_event)
    if found is not None:
        kwargs[name] = found
    return safe_load_model(HuggingFaceEmbeddings, on_event=on_event, **kwargs)


def _embedding_folder(wanted: str | None, tell: Callable[[LoadEvent], None]) -> str | None:
    """Return the folder of the embedding model that was asked for, or None where LangChain has to find it."""
    from lyra_emergence.hub import find_local
    from lyra_emergence.journal.embeddings import MODEL_ID, find_embedding_files

    if wanted is None and (usual := find_local(_LANGCHAIN_EMBEDDINGS)) is not None:
        return str(usual)
    if wanted not in (None, MODEL_ID, MODEL_ID.rpartition("/")[2]):
        return None
    files, reason = find_embedding_files()
    if files is None:
        return None
    tell(LoadEvent("note" if wanted is None else "map", f"embeddings: {files.name}, {reason}"))
    return str(files.directory)


def _unwrapped(
    loader: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., T], tuple[Any, ...], dict[str, Any]]:
    """Return the loader within `functools.partial`, with the arguments that were bound to it."""
    inner: Any = loader
    while isinstance(inner, functools.partial):
        inner, args, kwargs = inner.func, (*inner.args, *args), {**inner.keywords, **kwargs}
    return inner, args, kwargs


def _is_pipeline_loader(loader: Callable[..., Any]) -> bool:
    if getattr(loader, "__name__", "") != "from_model_id":
        return False
    from langchain_huggingface import HuggingFacePipeline

    from lyra_emergence.langchain import LyraPipeline

    return bool(loader in (HuggingFacePipeline.from_model_id, LyraPipeline.from_model_id))


def _load_pipeline(
    config: ModelConfig, asked: PipelineArguments, on_event: Callable[[LoadEvent], None]
) -> LyraPipeline:
    from lyra_emergence.langchain import LyraPipeline
    from lyra_emergence.loading import load

    directory = _locate(config.model_id, asked, on_event)
    loaded = load(config, directory=directory, on_event=on_event)
    for note in loaded.plan.notes:
        on_event(LoadEvent("note", note))
    return LyraPipeline.from_loaded(
        loaded, model_id=str(directory.absolute()), batch_size=asked.batch_size, **asked.fields
    )


def _locate(model_id: str, asked: PipelineArguments, tell: Callable[[LoadEvent], None]) -> Path:
    """Return the folder of a model that was named, fetching it if it is not on disk."""
    from lyra_emergence.hub import download, find_local, look_up
    from lyra_emergence.units import format_bytes

    directory = find_local(model_id, revision=asked.revision)
    if directory is not None:
        return directory
    if asked.local_files_only:
        raise ModelUnavailableError(
            f"{model_id} is not on this machine, and 'local_files_only' forbids the download",
            hint="give a checkpoint's folder, or leave 'local_files_only' out",
        )
    remote = look_up(model_id, revision=asked.revision)
    tell(LoadEvent("download", f"downloading {model_id}, {format_bytes(remote.nbytes)}", 0, remote.nbytes))

    def report(file: str, done: int, total: int) -> None:
        if done >= total:
            tell(LoadEvent("download", f"{file} is here", done, total))

    return download(remote, progress=report)
