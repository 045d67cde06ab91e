"""The plan: where every block goes, before anything is loaded.

A plan is a ladder of placements (`ladder.py`). Loading starts at the first rung that fits, and steps down when memory
runs out all the same. Where no rung reaches what is wanted, other contexts and packings are tried (`remedies.py`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lyra_emergence.budgets import Request, read_request
from lyra_emergence.compiler import find_compiler
from lyra_emergence.config.devices import AUTOMATIC
from lyra_emergence.errors import DoesNotFitError
from lyra_emergence.filling import place
from lyra_emergence.footprint import (
    PREFILL_CHUNK,
    Footprint,
    estimate_footprint,
    is_known,
)
from lyra_emergence.ladder import NO_LAYER_FITS, Rung, RungName, build_ladder, forced_placements
from lyra_emergence.packed_plan import with_kept_weights
from lyra_emergence.placement import CPU, DISK, DeviceUse, Placement, measure_use, refuse
from lyra_emergence.remedies import SHORTEST_CONTEXT, attempts
from lyra_emergence.trial import find_trial
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lyra_emergence.checkpoint import CheckpointIndex
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.machine import Machine
    from lyra_emergence.packing import Quantization
    from lyra_emergence.remedies import Attempt, Goal

__all__ = ["DeviceUse", "Placement", "Plan", "Rung", "RungName", "make_plan"]

JSON_FORMAT = "lyra.plan/1"
NOT_COMPILED = "'compile_decode' has no effect: "
PACKED = "its layers are packed"
NOT_ON_ONE = "the model does not lie wholly on one accelerator"


@dataclass(frozen=True, slots=True)
class Plan:
    """Where every block goes, before anything is loaded.

    Attributes:
        model: The checkpoint's name: a hub id, or its folder's.
        footprint: The bytes that the plan rests on.
        request: Budgets and pinned blocks.
        rungs: The ladder, best first.
        start: The index of the first rung that fits.
        notes: Warnings for the user, one sentence each.
    """

    model: str
    footprint: Footprint
    request: Request
    rungs: tuple[Rung, ...]
    start: int
    notes: tuple[str, ...]

    @property
    def rung(self) -> Rung:
        """The rung that loading starts at."""
        return self.rungs[self.start]

    @property
    def placements(self) -> tuple[Placement, ...]:
        """The placements of the rung that loading starts at."""
        return self.rung.placements

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together that the plan has room for."""
        return self.footprint.context_length

    @property
    def devices(self) -> tuple[DeviceUse, ...]:
        """How full each device is at the start rung."""
        return self.use_of(self.placements)

    def use_of(self, placements: tuple[Placement, ...]) -> tuple[DeviceUse, ...]:
        """Return how full each device is under `placements`."""
        return measure_use(placements, self.footprint, (*self.request.accelerators, self.request.cpu))

    def with_layers(self, count: int, limits: Mapping[str, int] | None = None) -> tuple[Placement, ...]:
        """Return the documented map with at most `count` layers on accelerators.

        The embeddings go with them, norm and head to the CPU.

        Args:
            count: The most layers to place there.
            limits: Bytes that an accelerator really allows, by device name, where less than its budget.
        """
        measured = tuple(
            replace(budget, limit=min(budget.limit, (limits or {}).get(budget.device, budget.limit)))
            for budget in self.request.accelerators
        )
        return place(self.footprint, self.request, accelerators=measured, layer_limit=count)

    def device_map(self) -> dict[str, int | str]:
        """Return the start rung as transformers writes it: 0 for the first accelerator, "mps", "cpu", "disk"."""
        return {p.block: hf_device(p.device) for p in self.placements}

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data; `format` names the version of this form."""
        return {
            "format": JSON_FORMAT,
            "model": self.model,
            "dtype": self.footprint.dtype,
            "quantization": self.footprint.quantization,
            "context_length": self.context_length,
            "batch": self.footprint.batch,
            "rung": self.rung.name,
            "device_map": self.device_map(),
            "devices": [asdict(use) | {"used": use.used, "unused": use.unused} for use in self.devices],
            "placements": [asdict(p) for p in self.placements],
            "rungs": [
                {"name": r.name, "fits": r.fits, "reason": r.reason, "layers": _layers_by_device(r.placements)}
                for r in self.rungs
            ],
            "notes": list(self.notes),
        }


def hf_device(name: str) -> int | str:
    """Return a device's name as transformers writes it in a device map: an ordinal for every indexed accelerator."""
    _, colon, ordinal = name.partition(":")
    return int(ordinal) if colon else name


def _layers_by_device(placements: tuple[Placement, ...]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for placement in placements:
        if placement.kind == "layer":
            counts[placement.device] = counts.get(placement.device, 0) + 1
    return counts


def make_plan(config: ModelConfig, index: CheckpointIndex, machine: Machine, *, batch: int = 1) -> Plan:
    """Plan where every block of a checkpoint goes on a machine.

    Where the model does not fit the fastest memory as it was asked for, what `remedies.attempts` lists is tried, and
    what is taken is said in the plan's notes.

    Args:
        config: What the user wants.
        index: The checkpoint.
        machine: Its devices and their free bytes.
        batch: Sequences that run together.

    Raises:
        ConfigError: The configuration contradicts the model (a context beyond its own, a map of unknown modules), or
            the batch is not positive.
        DoesNotFitError: No rung fits; the error says what is needed, what is there and what to try.
    """
    footprints: dict[tuple[int, Quantization | None], Footprint] = {}
    failure: DoesNotFitError | None = None
    first: Attempt | None = None
    for attempt in attempts(config, index):
        first = first or attempt
        key = (attempt.context, attempt.quantization)
        if key not in footprints:
            like = next((made for (_, form), made in footprints.items() if form == attempt.quantization), None)
            made = measure_footprint(config, index, attempt.context, batch, attempt.quantization, like=like)
            footprints[key] = made if like else with_kept_weights(made, config, index)
        try:
            plan = _plan(config, index, machine, footprints[key])
        except DoesNotFitError as error:
            if attempt.goal == "any" and attempt.quantization == first.quantization:
                failure = error
            continue
        if _reaches(plan, attempt.goal):
            return replace(plan, notes=(*plan.notes, *_taken(attempt, first, plan)))
    assert failure is not None
    assert first is not None
    tried = footprints[first.context, first.quantization]
    raise _with_machines(failure, config, index, machine, tried)


def _with_machines(
    failure: DoesNotFitError, config: ModelConfig, index: CheckpointIndex, machine: Machine, tried: Footprint
) -> DoesNotFitError:
    """Return the error with how many machines like this one would hold the model, and the commands for them."""
    if config.device_map not in (None, *AUTOMATIC):
        return failure  # the remedy is another map
    from lyra_emergence.fleet import FleetModel
    from lyra_emergence.fleet.remedy import machines_hint

    stored = ""
    if tried.quantization == "8bit":
        tried = measure_footprint(config, index, tried.context_length, tried.batch, None)
        stored = "\nvLLM packs to 4 bits only: weights are counted as they are stored"
    hint = machines_hint(FleetModel(index, tried), machine, trust_remote_code=config.trust_remote_code)
    failure.hint += f"\n{hint}{stored}" if hint else ""
    return failure


def _reaches(plan: Plan, goal: Goal) -> bool:
    if goal == "any":
        return True
    if any(placement.device == DISK for placement in plan.placements):
        return False
    fast = any(budget.limit for budget in plan.request.accelerators)
    return goal == "memory" or plan.rung.name == "full" or not fast


def _taken(attempt: Attempt, first: Attempt, plan: Plan) -> Iterator[str]:
    """Yield what was changed so that the model fits, a sentence each."""
    wholly = attempt.goal == "fast"
    if attempt.context != first.context:
        kept = ", so that nothing has to leave the fastest memory" if wholly else ""
        yield f"the context is shortened to {attempt.context} tokens: {first.context} do not fit{kept}"
    if attempt.quantization != first.quantization:
        bits = "8" if attempt.quantization == "8bit" else "4"
        size = format_bytes(plan.footprint.weights)
        yield f"the layers are packed to {bits} bits ({size} of weights), which 'allow_quantization' permits"


def measure_footprint(
    config: ModelConfig,
    index: CheckpointIndex,
    context: int,
    batch: int,
    quantization: Quantization | None,
    *,
    like: Footprint | None = None,
) -> Footprint:
    """Return the bytes that a checkpoint takes, with a trial forward where its model type is not a known one.

    `like` is its footprint at another context, whose weights are the same.

    Raises:
        ConfigError: As `estimate_footprint`.
    """
    estimate = partial(
        estimate_footprint,
        index,
        context_length=context,
        batch=batch,
        dtype=config.dtype,
        quantization=quantization,
        like=like,
        cpu_kernels=config.cpu_kernels and find_compiler() is not None,
        chunk=config.prefill_chunk or PREFILL_CHUNK,
    )
    estimated = estimate()
    if is_known(index) or not index.model_type:
        return estimated
    trial, reason = find_trial(
        index,
        context=context,
        batch=batch,
        dtype=estimated.dtype,
        chunk=config.prefill_chunk or PREFILL_CHUNK,
        trust_remote_code=config.trust_remote_code,
    )
    if trial is not None:
        return estimate(trial=trial)
    return replace(estimated, notes=(*estimated.notes, f"no trial forward: {reason}"))


def _plan(config: ModelConfig, index: CheckpointIndex, machine: Machine, footprint: Footprint) -> Plan:
    request = read_request(config, machine, footprint)
    rungs = tuple(build_ladder(config, footprint, request))
    start = next((i for i, rung in enumerate(rungs) if rung.fits), None)
    if start is None:
        placements = rungs[-1].placements or forced_placements(footprint, request)
        budgets = (*request.accelerators, request.cpu)
        raise refuse(measure_use(placements, footprint, budgets), _remedy(config, footprint, request))
    said = (*_not_followed(rungs[: start + 1], request), *_clamped(config, footprint.context_length))
    said += _uncompiled(config, footprint, rungs[start].placements)
    notes = (*machine.notes, *request.notes, *footprint.notes, *said)
    return Plan(index.name, footprint, request, rungs, start, notes)


def _not_followed(rungs: tuple[Rung, ...], request: Request) -> tuple[str, ...]:
    # That a model is larger than the GPU is what the plan is for; that a wish was not followed has to be said.
    if request.pinned or request.whole_on is not None:
        return () if rungs[0].fits else (f"the device map does not fit: {rungs[0].reason}",)
    wanted = any(budget.limit for budget in request.accelerators)
    alone = any(rung.reason == NO_LAYER_FITS for rung in rungs)
    return (f"{NO_LAYER_FITS}: all run on the CPU",) if wanted and alone else ()


def _clamped(config: ModelConfig, context: int) -> tuple[str, ...]:
    wanted = (config.pipeline_kwargs or {}).get("max_new_tokens")
    if wanted is None or wanted < context:
        return ()
    room = f"max_new_tokens {wanted} is more than the context of {context} tokens has room for"
    return (f"{room}: answers are clamped to what the prompt leaves",)


def _uncompiled(config: ModelConfig, footprint: Footprint, placements: tuple[Placement, ...]) -> tuple[str, ...]:
    """Say that steps will not be compiled though that is asked for."""
    devices = {placement.device for placement in placements}
    if not config.compile_decode:
        return ()
    if footprint.quantization is not None:
        return (NOT_COMPILED + PACKED,)
    return (NOT_COMPILED + NOT_ON_ONE,) if len(devices) > 1 or devices <= {CPU, DISK} else ()


def _remedy(config: ModelConfig, footprint: Footprint, request: Request) -> str:
    tries = []
    if footprint.context_length > SHORTEST_CONTEXT:
        tries.append(f"a shorter context (--context {max(SHORTEST_CONTEXT, footprint.context_length // 4)})")
    if footprint.batch > 1:
        tries.append("fewer sequences at once (--batch)")
    # Packed weights cannot stay on disk: they help only where the weights have to be in memory anyway.
    in_memory = not all(block.mapped for block in footprint.blocks) or request.whole_on is not None
    if in_memory and footprint.quantization != "4bit":
        tries.append('"load_in_4bit": true')
    converted = not all(block.home_is_copy for block in footprint.blocks)
    if converted and footprint.quantization is None and request.whole_on is None:
        tries.append("the checkpoint's own dtype, which can stay on disk")
    if config.max_memory:
        tries.append('a larger "max_memory"')
    if request.whole_on or request.pinned:
        tries.append('"device_map": "auto"')
    if not config.enable_progressive_fallback:
        tries.append('"enable_progressive_fallback": true')
    tries.append("a smaller model")
    return "try " + ", or ".join(tries)
