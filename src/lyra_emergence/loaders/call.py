"""A call of a loader that Lyra does not own, and how to ask such a loader for a device."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

__all__ = ["LoaderCall"]

_PLACING: Final = ("device", "device_map")
_ADJUSTED: Final = frozenset({*_PLACING, "model_kwargs", "pipeline_kwargs"})
_MODEL_NAMES: Final = ("model_id", "pretrained_model_name_or_path", "model", "model_name")
_POSITIONAL: Final = inspect.Parameter.POSITIONAL_OR_KEYWORD
_CPU: Final = ("cpu", -1)


@dataclass(frozen=True, slots=True)
class LoaderCall:
    """The arguments of one call, and the keywords that its loader takes.

    Attributes:
        args: Positional arguments; what may have to change is among the keywords.
        keywords: Keyword arguments. Dicts within are the caller's own and are never changed.
        takes: The names that the loader's signature has.
        takes_any: Whether it takes any other keyword as well.
    """

    args: tuple[Any, ...]
    keywords: Mapping[str, Any]
    takes: frozenset[str]
    takes_any: bool

    @classmethod
    def read(cls, loader: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Self:
        """Return the call of `loader` with these arguments."""
        try:
            parameters = tuple(inspect.signature(loader).parameters.values())
        except (TypeError, ValueError):  # a callable of C without a signature
            return cls(args, kwargs, frozenset(), takes_any=False)
        names = frozenset(p.name for p in parameters if p.kind in (_POSITIONAL, inspect.Parameter.KEYWORD_ONLY))
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        kept, named = _named_from_first_adjusted(parameters, args)
        return cls(kept, {**named, **kwargs}, names, takes_any)

    @property
    def takes_map(self) -> bool:
        """Whether it can be given a `device_map`."""
        return self._takes("device_map")

    @property
    def has_device(self) -> bool:
        """Whether the caller chose a device: then the configuration's map does not apply."""
        return bool(self._devices())

    @property
    def asks_for_cpu(self) -> bool:
        """Whether the caller chose the CPU."""
        return any(str(device) == str(cpu) for device in self._devices() for cpu in _CPU)

    @property
    def model_id(self) -> str | None:
        """The model that the call names, if it does so in a usual way."""
        if self.args:
            return self.args[0] if isinstance(self.args[0], str) else None
        named = next((self.keywords[name] for name in _MODEL_NAMES if name in self.keywords), None)
        return named if isinstance(named, str) else None

    def with_settings(self, model: Mapping[str, Any], pipeline: Mapping[str, Any]) -> LoaderCall:
        """Return the call with settings below the caller's own, where its loader takes them.

        Args:
            model: For the model: `max_memory`, `dtype`, ...
            pipeline: For the pipeline around it: `max_new_tokens`, ...
        """
        keywords = dict(self.keywords)
        if self._has_model_kwargs:
            keywords["model_kwargs"] = {**model, **self._model_kwargs()}
        else:
            keywords = {name: value for name, value in model.items() if self._takes(name)} | keywords
        if "pipeline_kwargs" in self.takes:
            keywords["pipeline_kwargs"] = {**pipeline, **(keywords.get("pipeline_kwargs") or {})}
        return replace(self, keywords=keywords)

    def on(self, device_map: Any) -> dict[str, Any]:
        """Return the keywords that ask for `device_map`; None leaves them as they are."""
        if device_map is None or not self.takes_map:
            return dict(self.keywords)
        return self._unplaced() | {"device_map": device_map}

    def on_cpu(self) -> dict[str, Any]:
        """Return the keywords that ask for the CPU in the loader's own words."""
        if "device" in self.takes:
            # LangChain and pipelines count devices: -1 is the CPU. With a map of "cpu", which leaves no trace in the
            # model, they would move it to the first GPU. Others take torch's names.
            return self._unplaced() | {"device": -1 if "task" in self.takes else "cpu"}
        if "model_kwargs" in self.takes and "device_map" not in self.takes:
            return self._unplaced() | {"model_kwargs": self._model_kwargs() | {"device": "cpu"}}
        return self._unplaced() | ({"device_map": "cpu"} if self.takes_map else {})

    @property
    def _has_model_kwargs(self) -> bool:
        # Without a device map beside them they are something else's: `HuggingFaceEmbeddings` hands its own on flat.
        return "model_kwargs" in self.takes and "device_map" in self.takes

    def _takes(self, name: str) -> bool:
        return self.takes_any or name in self.takes

    def _model_kwargs(self) -> dict[str, Any]:
        return dict(self.keywords.get("model_kwargs") or {})

    def _devices(self) -> list[Any]:
        places = (self.keywords, self._model_kwargs())
        return [place[name] for place in places for name in _PLACING if place.get(name) is not None]

    def _unplaced(self) -> dict[str, Any]:
        """Return the keywords without any device."""
        keywords = {name: value for name, value in self.keywords.items() if name not in _PLACING}
        if any(name in self._model_kwargs() for name in _PLACING):
            keywords["model_kwargs"] = {k: v for k, v in self._model_kwargs().items() if k not in _PLACING}
        return keywords


def _named_from_first_adjusted(
    parameters: tuple[inspect.Parameter, ...], args: tuple[Any, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (positional, by name): from the first argument on that a rung may change, all are given by name."""
    names = [p.name for p in parameters if p.kind in (inspect.Parameter.POSITIONAL_ONLY, _POSITIONAL)]
    first = next((i for i, name in enumerate(names[: len(args)]) if name in _ADJUSTED), len(args))
    if len(args) > len(names):
        return args, {}
    return args[:first], dict(zip(names[first:], args[first:], strict=False))
