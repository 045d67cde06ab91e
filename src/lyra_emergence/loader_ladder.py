"""Progressive fallback around loaders that Lyra does not own: the same ladder, one call per rung.

A loader is asked in the words it takes: `device_map` and the rest flat where it takes any keyword (as
`AutoModelForCausalLM.from_pretrained` does), or inside `model_kwargs` and `pipeline_kwargs` where it has those.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lyra_emergence.errors import DoesNotFitError, LyraError, is_out_of_memory, without_frames
from lyra_emergence.load_report import LoadEvent
from lyra_emergence.machine import Machine, probe_machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lyra_emergence.config import ModelConfig

__all__ = ["call_or_cpu", "call_with_fallback"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Takes:
    """Which keywords a loader takes."""

    names: frozenset[str]
    any_name: bool

    @classmethod
    def read(cls, loader: Callable[..., Any]) -> _Takes:
        try:
            parameters = inspect.signature(loader).parameters
        except (TypeError, ValueError):
            return cls(frozenset(), any_name=False)
        names = frozenset(n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        return cls(names, any(p.kind is p.VAR_KEYWORD for p in parameters.values()))

    def __contains__(self, name: str) -> bool:
        return self.any_name or name in self.names


def call_with_fallback(
    loader: Callable[..., T],
    config: ModelConfig,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tell: Callable[[LoadEvent], None],
) -> T:
    """Call `loader` once per rung until one fits.

    Raises:
        DoesNotFitError: Memory ran out on the last rung, or no fallback is allowed.
        BaseException: Whatever else the loader raises, unchanged.
    """
    from lyra_emergence.runtime.memory import give_back

    machine = probe_machine(with_torch=True)
    takes = _Takes.read(loader)
    failure: BaseException | None = None
    for rung, device_map in _rungs(config, args, kwargs, machine):
        arguments = _arguments(takes, config, kwargs, device_map, machine)
        try:
            return loader(*args, **arguments)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = without_frames(error)
        give_back()
        tell(LoadEvent("rung-failed", f"{rung}: out of memory ({str(failure).splitlines()[0]})"))
        if not config.enable_progressive_fallback:
            break
    raise _refusal(failure, config) from failure


def call_or_cpu(
    loader: Callable[..., T],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tell: Callable[[LoadEvent], None],
) -> T:
    """Call `loader`, and once more on the CPU if memory runs out."""
    from lyra_emergence.runtime.memory import give_back

    try:
        return loader(*args, **kwargs)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = str(error).splitlines()[0]
        without_frames(error)
    give_back()
    tell(LoadEvent("rung-failed", f"out of memory ({message}): trying the CPU"))
    return loader(*args, **_on_cpu(_Takes.read(loader), kwargs))


def _rungs(
    config: ModelConfig, args: tuple[Any, ...], kwargs: Mapping[str, Any], machine: Machine
) -> Iterator[tuple[str, Any]]:
    wish = kwargs.get("device_map", config.device_map)
    yield "first", wish
    if not machine.accelerators or wish == "cpu":
        return
    middle = _middle_rung(config, args, machine)
    if middle is not None:
        yield "fallback", middle
    yield "cpu", "cpu"


def _middle_rung(config: ModelConfig, args: tuple[Any, ...], machine: Machine) -> dict[str, int | str] | None:
    """Return the documented map for a model whose checkpoint is on disk; None where its layers are not known."""
    from lyra_emergence.hub import find_local

    from lyra_emergence.checkpoint import read_checkpoint
    from lyra_emergence.plan import hf_device, make_plan

    model_id = args[0] if args and isinstance(args[0], str) else config.model_id
    if not config.gpu_layers_fallback:
        return None
    try:
        directory = find_local(model_id)
        if directory is None:
            return None
        plan = make_plan(config.model_copy(update={"device_map": "auto"}), read_checkpoint(directory), machine)
    except LyraError:
        return None
    placements = plan.with_layers(config.gpu_layers_fallback)
    return {p.block: hf_device("cpu" if p.device == "disk" else p.device) for p in placements}


def _arguments(
    takes: _Takes, config: ModelConfig, kwargs: Mapping[str, Any], device_map: Any, machine: Machine
) -> dict[str, Any]:
    """Return the loader's keywords for one rung; the caller's own stand above the configuration's."""
    model = _model_arguments(config, machine)
    arguments = dict(kwargs)
    if device_map is not None and "device_map" in takes:
        arguments["device_map"] = device_map
        arguments.pop("device", None)
    if "model_kwargs" in takes.names:
        arguments["model_kwargs"] = model | dict(kwargs.get("model_kwargs") or {})
        if "device_map" in arguments:
            arguments["model_kwargs"].pop("device_map", None)
    elif takes.any_name:
        arguments = model | arguments
    if "pipeline_kwargs" in takes.names:
        arguments["pipeline_kwargs"] = config.to_pipeline_kwargs() | dict(kwargs.get("pipeline_kwargs") or {})
    return arguments


def _model_arguments(config: ModelConfig, machine: Machine) -> dict[str, Any]:
    """Return the configuration as transformers takes it: ordinals as numbers, quantization as an object."""
    model: dict[str, Any] = {}
    if config.max_memory and config.device_map is not None:
        found = {key: machine.find(str(key)) for key in config.max_memory}
        model["max_memory"] = {
            (device.index if device.index is not None else "cpu"): config.max_memory[key]
            for key, device in found.items()
            if device is not None
        }
    if config.dtype not in (None, "auto"):
        model["dtype"] = config.dtype
    if config.trust_remote_code:
        model["trust_remote_code"] = True
    if config.load_in_8bit or config.load_in_4bit:
        from transformers import BitsAndBytesConfig

        from lyra_emergence.runtime.quantized import require_bitsandbytes

        require_bitsandbytes("8bit" if config.load_in_8bit else "4bit")
        model["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=config.load_in_8bit, load_in_4bit=config.load_in_4bit
        )
    return model


def _on_cpu(takes: _Takes, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords that ask a loader for the CPU in its own words."""
    arguments = {name: value for name, value in kwargs.items() if name not in ("device", "device_map")}
    if "device" in takes.names:
        # LangChain's from_model_id counts devices: -1 is the CPU. Others take torch's names.
        return arguments | {"device": -1 if "task" in takes.names else "cpu"}
    if "device_map" in takes.names:
        return arguments | {"device_map": "cpu"}
    if "model_kwargs" in takes.names:
        return arguments | {"model_kwargs": dict(kwargs.get("model_kwargs") or {}) | {"device": "cpu"}}
    return arguments | {"device_map": "cpu"} if takes.any_name else arguments


def _refusal(failure: BaseException | None, config: ModelConfig) -> DoesNotFitError:
    free = probe_machine(with_torch=True).cpu.free_bytes
    hint = "take a smaller model, or close what else uses the memory"
    if not config.enable_progressive_fallback:
        hint = 'set "enable_progressive_fallback": true, or a lower "max_memory"'
    return DoesNotFitError(f"out of memory while loading: {failure}", needed=0, available=free, hint=hint)
