"""Which model to run, and what to do when it is not on this machine.

The rule: what a person named is never replaced, and what nobody named is never downloaded by surprise.

- Named (`--model`, a `--model-config` file, the environment): taken from disk, else fetched; an error where that fails.
- Not named (a default, or a configuration file that was merely found): taken from disk; else a person at a terminal
  chooses between the download, whose size is shown, and the bundled model; everyone else gets the bundled model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from lyra_emergence import bundled, hub
from lyra_emergence.errors import ModelUnavailableError
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lyra_emergence.config import ModelConfig, ResolvedConfig
    from lyra_emergence.hub import RemoteModel

__all__ = ["Chooser", "ModelChoice", "choose_model", "describe_download", "find_model", "is_named"]

NOT_NAMED: Final = frozenset({"default", "file"})
"""Origins of `model_id` that no person stated for this run."""

_USING: Final = "using the bundled model"
_GENERATION: Final = (
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "max_repeats",
)

Answer = Literal["download", "bundled"]


class Chooser(Protocol):
    """Asks the person at the terminal."""

    def __call__(self, remote: RemoteModel, /) -> Answer:
        """Return what to do about a model that would have to be downloaded."""


class Hub(Protocol):
    """What this module needs of `lyra_emergence.hub`."""

    def find_local(self, model_id: str, /) -> Path | None:
        """Return the model's folder on this machine."""

    def look_up(self, model_id: str, /) -> RemoteModel:
        """Return what a download would fetch."""


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """The model of this run.

    Attributes:
        config: The configuration for it: the resolved one, or, where the bundled model stands in, without the settings
            that were written for the other model.
        directory: The checkpoint's folder.
        notes: What to tell the user about the choice, a line each.
        stands_in: Whether the bundled model replaces the configured one.
        remote: The model on the hub, where it is only planned for and `directory` holds nothing.
    """

    config: ModelConfig
    directory: Path
    notes: tuple[str, ...] = ()
    stands_in: bool = False
    remote: RemoteModel | None = None


def is_named(resolved: ResolvedConfig) -> bool:
    """Return whether a person named the model for this run, so that nothing may replace it."""
    return resolved.origins.get("model_id", "default") not in NOT_NAMED


def choose_model(
    resolved: ResolvedConfig, *, fetch: Callable[[RemoteModel], Path], choose: Chooser | None, source: Hub | None = None
) -> ModelChoice:
    """Return the model to run, downloading it where the rule above allows that.

    Args:
        resolved: The configuration, and where each of its values came from.
        fetch: Downloads a model.
        choose: Asks the person at the terminal; None where there is none.
        source: Finds models; `lyra_emergence.hub` where None.

    Raises:
        ModelUnavailableError: The model was named and can be had neither from disk nor from the hub.
    """
    hub_ = source or _HUB
    config = resolved.config
    directory = hub_.find_local(config.model_id)
    if directory is not None:
        return ModelChoice(config, directory)
    if is_named(resolved):
        return ModelChoice(config, fetch(hub_.look_up(config.model_id)))
    if choose is None:
        return _stand_in(resolved, f"{_missing(resolved)} (--model {config.model_id} downloads it); {_USING}")
    try:
        remote = hub_.look_up(config.model_id)
    except ModelUnavailableError as error:
        return _stand_in(resolved, f"{error}; {_USING}")
    if choose(remote) == "download":
        return ModelChoice(config, fetch(remote))
    return _stand_in(resolved, _USING)


def find_model(resolved: ResolvedConfig, *, source: Hub | None = None) -> ModelChoice:
    """Return the model to plan for: from disk, or, where a person named it, what the hub lists of it.

    Raises:
        ModelUnavailableError: The model was named, is not on this machine, and the hub does not show it.
    """
    hub_ = source or _HUB
    directory = hub_.find_local(resolved.config.model_id)
    if directory is not None:
        return ModelChoice(resolved.config, directory)
    if is_named(resolved):
        remote = hub_.look_up(resolved.config.model_id)
        note = f"{remote.model_id} is not on this machine: planned from its headers; a download is"
        notes = (f"{note} {describe_download(remote)}",)
        return ModelChoice(resolved.config, Path(remote.model_id), notes, remote=remote)
    return _stand_in(resolved, f"{_missing(resolved)}; planning the bundled model")


class _LibraryHub:
    def find_local(self, model_id: str, /) -> Path | None:
        return hub.find_local(model_id)

    def look_up(self, model_id: str, /) -> RemoteModel:
        return hub.look_up(model_id)


_HUB: Final = _LibraryHub()


def _missing(resolved: ResolvedConfig) -> str:
    asked_by = f" (from {resolved.path})" if resolved.path is not None else " (the default)"
    return f"{resolved.config.model_id}{asked_by} is not on this machine"


def _stand_in(resolved: ResolvedConfig, note: str) -> ModelChoice:
    changes, ignored = _written_for_another_model(resolved.config, resolved.origins)
    if ignored:
        note += f", which ignores {', '.join(ignored)}"
    config = resolved.config.model_copy(update={"model_id": bundled.BUNDLED_ID, **changes})
    return ModelChoice(config, bundled.bundled_directory(), (note,), stands_in=True)


def _written_for_another_model(
    config: ModelConfig, origins: Mapping[str, str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what replaces the settings that make sense for the configured model only, and their names.

    A map of module names, a context beyond the bundled model's and a quantization that saves memory on billions of
    weights would each turn "use the bundled model" into an error; sampling that suits a large model makes a small one
    babble; limits of memory and length made for gigabytes only bring warnings. What a person set for this run stays.
    """
    found = {
        "device_map": isinstance(config.device_map, dict),
        "context_length": config.context_length is not None,
        "dtype": config.dtype is not None,
        "max_memory": config.max_memory is not None,
        "load_in_8bit": config.load_in_8bit,
        "load_in_4bit": config.load_in_4bit,
        "allow_quantization": config.allow_quantization,
    }
    ignored = [key for key, is_set in found.items() if is_set and origins.get(key) in NOT_NAMED]
    changes: dict[str, Any] = {key: False if getattr(config, key) is True else None for key in ignored}
    settings = dict(config.pipeline_kwargs or {})
    sampling = [key for key in _GENERATION if key in settings and origins.get(f"pipeline_kwargs.{key}") in NOT_NAMED]
    if sampling:
        changes["pipeline_kwargs"] = {key: value for key, value in settings.items() if key not in sampling}
    return changes, (*ignored, *sampling)


def describe_download(remote: RemoteModel) -> str:
    """Return the download's size and file count for a person: "5.56 GB in 9 files"."""
    count = len(remote.files)
    return f"{format_bytes(remote.nbytes)} in {count} file{'' if count == 1 else 's'}"
