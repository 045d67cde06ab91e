"""Loading: open the checkpoint as a map, promote blocks in plan order, step down when memory runs out.

Never substitutes a model for the one that was named. Weights are mapped by
transformers' own `from_pretrained` on the CPU in their stored dtype, which costs no memory until pages are touched.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.checkpoint.unchanged import check_blocks, check_files
from lyra_emergence.distributed import is_divided
from lyra_emergence.errors import DoesNotFitError, is_out_of_memory, lacks_reason, without_frames
from lyra_emergence.guests import DEFAULT_LEAST_TOKENS, least_tokens
from lyra_emergence.hub import locate
from lyra_emergence.load_report import TRUST_WARNING, Attempt, LoadEvent, LoadReport
from lyra_emergence.machine import probe_machine
from lyra_emergence.opening import load_architecture, load_tokenizer, open_model
from lyra_emergence.packed_plan import keeps_packed
from lyra_emergence.plan import hf_device, make_plan
from lyra_emergence.turn_lock import TurnLock

if TYPE_CHECKING:
    from collections.abc import Callable

    from lyra_emergence.checkpoint import CheckpointIndex
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.placement import Placement
    from lyra_emergence.plan import Plan
    from lyra_emergence.runtime.blocks import LoadedForm, PlacedBlock
    from lyra_emergence.runtime.compiled_decode import CompiledDecode
    from lyra_emergence.runtime.cpu.packed_store import PackedStore
    from lyra_emergence.runtime.ladder import Ladder
    from lyra_emergence.runtime.residency import Residency
    from lyra_emergence.runtime.streaming import Stream

__all__ = ["Attempt", "LoadEvent", "LoadReport", "LoadedModel", "load"]

_TRIES = 2
"""Times that loading is begun: what another program took for a moment may be free again."""


@dataclass(slots=True)
class LoadedModel:
    """A model on its devices, ready to generate.

    Attributes:
        model: The transformers model.
        tokenizer: Its tokenizer.
        config: The configuration that it was loaded with.
        plan: What was planned.
        report: What came of it.
        blocks: The model's blocks with their present devices.
        residency: Moves the blocks while the model is in use.
        tell: Called with what happens to the model's memory, as `on_event` of `load`.
        compiled: The compiled step of one token, where the configuration asks for it and the model allows it.
        step_lock: Held while the model runs a step, so that several generators can share it; they get it in the order
            in which they asked.
    """

    model: Any
    tokenizer: Any
    config: ModelConfig
    plan: Plan
    report: LoadReport
    blocks: tuple[PlacedBlock, ...]
    residency: Residency = field(repr=False)
    tell: Callable[[LoadEvent], None] = field(repr=False)
    compiled: CompiledDecode | None = field(default=None, repr=False)
    step_lock: TurnLock = field(default_factory=TurnLock, repr=False)

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together that there is room for."""
        return self.plan.context_length

    @property
    def entry_device(self) -> str:
        """The device that token ids go to: the input embeddings'."""
        return self.residency.entry

    def close(self) -> None:
        """Drop every copy on every device; the model is of no use afterwards."""
        if self.compiled is not None:
            self.compiled.close()
        self.model = None
        self.residency.close()


def load(
    config: ModelConfig,
    *,
    directory: str | Path | None = None,
    plan: Plan | None = None,
    on_event: Callable[[LoadEvent], None] | None = None,
) -> LoadedModel:
    """Load a checkpoint onto the devices of its plan, or this process's share of it where torchrun runs several.

    Args:
        config: Placement, dtype and quantization.
        directory: The checkpoint's folder; by default where `config.model_id` is, fetched from the hub if it is not
            on this machine.
        plan: What `make_plan` returned for it; made here when absent.
        on_event: Called with every step.

    Raises:
        ModelUnavailableError: `config.model_id` is neither on this machine nor to be had from the hub.
        CheckpointError: The checkpoint is malformed, incomplete, has no tokenizer, or is no longer what was planned.
        DoesNotFitError: It fits nowhere, or memory ran out where the configuration allows no fallback.
        MissingExtraError: Quantization is asked for and bitsandbytes is not installed.
    """
    tell = on_event or (lambda _: None)
    if is_divided(config, None):
        from lyra_emergence.distributed.loading import load_divided

        return load_divided(config, Path(directory) if directory is not None else locate(config.model_id), plan, tell)
    from lyra_emergence.runtime.compute_threads import settle_for_fewer_threads
    from lyra_emergence.runtime.kernel_caches import keep_few_kernels
    from lyra_emergence.runtime.memory import free_bytes, give_back, return_freed_memory

    settle_for_fewer_threads()
    keep_few_kernels()
    for left in reversed(range(_TRIES)):
        return_freed_memory()
        try:
            return _load(config, directory, plan, tell)
        except DoesNotFitError:
            raise
        except Exception as error:
            if not (is_out_of_memory(error) or (left and lacks_reason(error))):
                raise
            failure = without_frames(error)
        give_back()
        if left:
            tell(LoadEvent("retry", _why_again(failure)))
    raise DoesNotFitError(
        f"out of memory while opening '{directory or config.model_id}': {_first_line(failure)}",
        needed=0,
        available=free_bytes("cpu"),
        device="cpu",
        hint="close what else uses the memory, or take a smaller model",
    ) from failure


def _load(
    config: ModelConfig, directory: str | Path | None, plan: Plan | None, tell: Callable[[LoadEvent], None]
) -> LoadedModel:
    started = time.perf_counter()
    folder = Path(directory) if directory is not None else locate(config.model_id)
    index = read_checkpoint(folder)
    if plan is None:
        plan = make_plan(config, index, probe_machine(with_torch=True))
    else:
        planned = plan.footprint.blocks
        check_blocks(index, ((b.name, b.kind) for b in planned), {b.name: b.weights for b in planned if b.mapped})
    if plan.footprint.quantization is not None:
        from lyra_emergence.runtime.quantized import require_bitsandbytes

        require_bitsandbytes(plan.footprint.quantization)
    if config.trust_remote_code:
        tell(LoadEvent("note", TRUST_WARNING))
    architecture = load_architecture(folder, config)
    tokenizer = load_tokenizer(folder, config, architecture)
    packed = _open_packed(index, plan, config, tell)
    model = open_model(index, config, architecture)
    map_seconds = time.perf_counter() - started
    check_files(index)
    tell(LoadEvent("map", f"{plan.model} is open, {len(index.tensors)} tensors mapped"))
    blocks, residency, ladder = _promote(model, plan, config, packed, tell)
    if config.cpu_kernels:
        _speed_up(model, blocks, tell)
    residency.stream = _stream(blocks, ladder.placements, index, tell)
    device_map = {block.name: hf_device(block.device) for block in blocks if block.name}
    report = LoadReport(
        attempts=tuple(ladder.attempts),
        device_map=device_map,
        seconds=time.perf_counter() - started,
        map_seconds=map_seconds,
        bytes_mapped=index.nbytes,
        notes=plan.notes,
    )
    tell(LoadEvent("ready", f"ready on rung '{report.rung}' in {report.seconds:.1f} s"))
    compiled = None
    if config.compile_decode:
        from lyra_emergence.runtime.compiled_decode import compiled_decode

        compiled = compiled_decode(model, residency, tell, quantized=plan.footprint.quantization is not None)
    return LoadedModel(model, tokenizer, config, plan, report, blocks, residency, tell, compiled)


def _why_again(failure: BaseException) -> str:
    if lacks_reason(failure):
        return f"loading failed without a reason, and is begun anew: {_first_line(failure)}"
    return f"memory ran out while loading, and is asked for again: {_first_line(failure)}"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _open_packed(
    index: CheckpointIndex, plan: Plan, config: ModelConfig, tell: Callable[[LoadEvent], None]
) -> PackedStore | None:
    """Return where packed weights for the CPU are kept, or None. Called before the checkpoint is mapped."""
    quantization = plan.footprint.quantization
    if quantization is None or not keeps_packed(config, index):
        return None
    from lyra_emergence.runtime.cpu.packed_store import PackedStore

    layers = [p.weights for p in plan.placements if p.kind == "layer" and p.device == "cpu"]
    return PackedStore.open(index, quantization, sum(layers), config.packed_cache_bytes, tell)


def _promote(
    model: Any, plan: Plan, config: ModelConfig, packed: PackedStore | None, tell: Callable[[LoadEvent], None]
) -> tuple[tuple[PlacedBlock, ...], Residency, Ladder]:
    from lyra_emergence.runtime.handover import Handover
    from lyra_emergence.runtime.ladder import Ladder
    from lyra_emergence.runtime.residency import Residency
    from lyra_emergence.runtime.splitting import split_into_blocks

    names = [(p.block, p.kind) for p in plan.placements]
    blocks = split_into_blocks(model, names, _form(plan, model, config), packed)
    ladder = Ladder(blocks, plan, tell)
    ladder.descend()
    if packed is not None:
        packed.stop_keeping()
    model.config.dtype = blocks_dtype(plan)
    least = _least_tokens(plan, ladder.placements, tell)
    return blocks, Residency(model, plan, blocks, Handover(model), least), ladder


def _least_tokens(plan: Plan, placements: tuple[Placement, ...], tell: Callable[[LoadEvent], None]) -> int:
    """Return from how many tokens on accelerators run what main memory holds, measured where NVML names the GPUs."""
    from lyra_emergence.speed import cached_rates, rates

    if not any(placement.through for placement in placements):
        return DEFAULT_LEAST_TOKENS
    # As planning named the devices, which it did without torch where it could.
    machine = probe_machine(with_torch=False)
    if not machine.accelerators:
        return least_tokens(placements, plan.footprint, cached_rates(probe_machine(with_torch=True)))
    if cached_rates(machine) is None:
        tell(LoadEvent("note", "measuring how fast this machine is, once, for where long prompts run"))
    try:
        return least_tokens(placements, plan.footprint, rates(machine))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return DEFAULT_LEAST_TOKENS


def _stream(
    blocks: tuple[PlacedBlock, ...],
    placements: tuple[Placement, ...],
    index: CheckpointIndex,
    tell: Callable[[LoadEvent], None],
) -> Stream | None:
    if not any(placement.streamed for placement in placements):
        return None
    from lyra_emergence.runtime.streaming import start_streaming

    return start_streaming(blocks, placements, index, tell)


def _speed_up(model: Any, blocks: tuple[PlacedBlock, ...], tell: Callable[[LoadEvent], None]) -> None:
    from lyra_emergence.runtime.cpu import speed_up

    try:
        speed_up(model, blocks, tell)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # Measuring takes more than running; what has no kernels by now runs as torch has it.


def blocks_dtype(plan: Plan) -> Any:
    """Return the torch dtype that the plan's model computes in."""
    import torch

    return getattr(torch, plan.footprint.dtype)


def _form(plan: Plan, model: Any, config: ModelConfig) -> LoadedForm:
    from lyra_emergence.runtime.blocks import LoadedForm

    return LoadedForm(blocks_dtype(plan), model.dtype, plan.footprint.quantization, config.cpu_kernels)
