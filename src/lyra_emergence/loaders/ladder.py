"""Progressive fallback around loaders that Lyra does not own: the same ladder, one call per rung.

A loader is asked in the words it takes: `device_map` and the rest flat where it takes any keyword (as
`AutoModelForCausalLM.from_pretrained` does), or inside `model_kwargs` and `pipeline_kwargs` where it has those. What
the caller gave stands above the configuration, and is passed on as it is in the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from lyra_emergence.config.devices import AUTOMATIC, budget_bytes
from lyra_emergence.errors import DoesNotFitError, LyraError, is_out_of_memory, without_frames
from lyra_emergence.load_report import TRUST_WARNING, LoadEvent
from lyra_emergence.loaders.call import LoaderCall
from lyra_emergence.machine import Machine, probe_machine
from lyra_emergence.plan import hf_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from lyra_emergence.config import ModelConfig
    from lyra_emergence.placement import Placement

__all__ = ["call_or_cpu", "call_with_fallback"]

T = TypeVar("T")

DeviceMap = str | dict[str, int | str]


def call_with_fallback(
    loader: Callable[..., T],
    config: ModelConfig,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tell: Callable[[LoadEvent], None],
) -> T:
    """Call `loader` once per rung until one fits.

    The first call has the caller's own device, else the configuration's; the next has `gpu_layers_fallback` layers on
    accelerators, if the checkpoint is on disk and its layers are therefore known; the last is for the CPU.

    Raises:
        DoesNotFitError: Memory ran out on the last rung, or no fallback is allowed.
        BaseException: Whatever else the loader raises, unchanged.
    """
    from lyra_emergence.runtime.memory import give_back

    if config.trust_remote_code:
        tell(LoadEvent("note", TRUST_WARNING))
    machine = probe_machine(with_torch=True)
    call = LoaderCall.read(loader, args, kwargs)
    for rung, keywords in _rungs(call, config, machine, tell):
        try:
            return loader(*call.args, **keywords)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = without_frames(error)
        give_back()
        tell(LoadEvent("rung-failed", f"{rung}: out of memory ({_first_line(failure)})"))
        if not config.enable_progressive_fallback or _is_of_main_memory(failure, machine):
            break
    raise _refusal(failure, config) from failure


def call_or_cpu(
    loader: Callable[..., T],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tell: Callable[[LoadEvent], None],
) -> T:
    """Call `loader`, and once more on the CPU if memory runs out.

    A loader that cannot be told where to load is called once more as it was, after memory was given back.
    """
    from lyra_emergence.runtime.memory import give_back

    try:
        return loader(*args, **kwargs)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failure = without_frames(error)
    give_back()
    tell(LoadEvent("rung-failed", f"out of memory ({_first_line(failure)}): trying the CPU"))
    call = LoaderCall.read(loader, args, kwargs)
    return loader(*call.args, **call.on_cpu())


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _is_of_main_memory(error: BaseException, machine: Machine) -> bool:
    """Return whether main memory is what ran out, on a machine that has no other: the CPU rung would be the same."""
    return not machine.accelerators and (isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error))


def _rungs(
    call: LoaderCall, config: ModelConfig, machine: Machine, tell: Callable[[LoadEvent], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each rung with the keywords of its call; the later ones are worked out when they are needed."""
    model = _model_arguments(config)
    pipeline = config.to_pipeline_kwargs()
    wish = None if call.has_device else _wish(call, config, machine, tell)
    automatic = isinstance(wish, str) and wish in AUTOMATIC
    budgets = {"max_memory": _budgets(config, machine)} if automatic and config.max_memory else {}
    first = call.with_settings(model | budgets, pipeline)
    yield "first", first.on_cpu() if wish == "cpu" else first.on(wish)
    if wish == "cpu" or call.asks_for_cpu:
        return
    rest = call.with_settings(model, pipeline)
    middle = _middle_rung(call, config, machine) if call.takes_map else None
    if middle is not None:
        yield "fallback", rest.on(middle)
    yield "cpu", rest.on_cpu()


def _wish(
    call: LoaderCall, config: ModelConfig, machine: Machine, tell: Callable[[LoadEvent], None]
) -> DeviceMap | None:
    """Return the configuration's device map as this machine can follow it; None leaves it to the loader."""
    wish: DeviceMap | None = config.device_map
    if not call.takes_map:
        return wish if wish == "cpu" else None
    if wish is None:
        # As in Lyra's own loader: what is left open is placed, where there is a choice.
        return "auto" if machine.accelerators else None
    if isinstance(wish, str):
        lacking = [wish] if wish not in AUTOMATIC and machine.find(wish) is None else []
        wish = "cpu" if lacking else wish
    else:
        lacking = sorted({str(d) for d in wish.values() if d != "disk" and machine.find(str(d)) is None})
        wish = {name: "cpu" if str(device) in lacking else device for name, device in wish.items()}
    if lacking:
        tell(LoadEvent("note", f"this machine lacks what 'device_map' names ({', '.join(lacking)}): the CPU is used"))
    return wish


def _middle_rung(call: LoaderCall, config: ModelConfig, machine: Machine) -> dict[str, int | str] | None:
    """Return the documented map for a model whose checkpoint is on disk; None where it would place no layer."""
    from lyra_emergence.checkpoint import read_checkpoint
    from lyra_emergence.hub import find_local
    from lyra_emergence.plan import make_plan

    if not config.gpu_layers_fallback:
        return None
    try:
        directory = find_local(call.model_id or config.model_id)
        if directory is None:
            return None
        plan = make_plan(config.model_copy(update={"device_map": "auto"}), read_checkpoint(directory), machine)
        placements = plan.with_layers(config.gpu_layers_fallback)
        devices = _whole_layers(placements)
        if not any(p.kind == "layer" and devices[p.block] != "cpu" for p in placements):
            return None
        return _by_module(devices, directory, config)
    except (LyraError, OSError, ValueError):
        return None  # a checkpoint of another kind than a causal language model's: its loader knows it, this does not


def _whole_layers(placements: Sequence[Placement]) -> dict[str, int | str]:
    """Return the map with layers whole, which is how transformers places them: on the CPU where their experts are."""
    devices: dict[str, int | str] = {}
    layer = ""
    for placement in placements:
        # What the plan leaves on disk is mapped from there on the CPU.
        device = "cpu" if placement.device == "disk" else placement.device
        if placement.kind == "experts":
            devices[layer] = "cpu" if device == "cpu" else devices[layer]
            continue
        layer = placement.block if placement.kind == "layer" else layer
        devices[placement.block] = hf_device(device)
    return devices


def _by_module(devices: Mapping[str, int | str], directory: Path, config: ModelConfig) -> dict[str, int | str]:
    """Return the map by the model's own module names, which a checkpoint's may lack the prefix of."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = config.trust_remote_code
    shape = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(shape, trust_remote_code=trust)
    modules = {path for path, _ in skeleton.named_modules()}
    prefix = skeleton.base_model_prefix
    return {name if name in modules else f"{prefix}.{name}": device for name, device in devices.items()}


def _budgets(config: ModelConfig, machine: Machine) -> dict[int | str, int]:
    """Return bytes for every device: transformers neither reads percentages nor looks at what is free.

    A device that the user left out counts with what it has free; transformers would leave out the CPU, and use a disk.
    """
    limits = {device: device.free_bytes for device in (*machine.accelerators, machine.cpu)}
    for name, amount in (config.max_memory or {}).items():
        device = machine.find(name)
        if device is not None:
            limits[device] = min(limits[device], budget_bytes(amount, device.total_bytes))
    return {hf_device(device.name): nbytes for device, nbytes in limits.items()}


def _model_arguments(config: ModelConfig) -> dict[str, Any]:
    """Return the rest of the configuration as transformers takes it: quantization is an object there."""
    model: dict[str, Any] = {}
    if config.dtype is not None:
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


def _refusal(failure: BaseException, config: ModelConfig) -> DoesNotFitError:
    free = probe_machine(with_torch=True).cpu.free_bytes
    hint = "take a smaller model, or close what else uses the memory"
    if not config.enable_progressive_fallback:
        hint = 'set "enable_progressive_fallback": true, or a lower "max_memory"'
    return DoesNotFitError(f"out of memory while loading: {failure}", needed=0, available=free, hint=hint)
