"""A plan for several machines, on paper: every layout that holds the model, the best first, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lyra_emergence.errors import DoesNotFitError
from lyra_emergence.fleet.layouts import mixed_layout, uniform_layout
from lyra_emergence.fleet.machines import MOST_GPUS, UTILIZATION, MachineKind
from lyra_emergence.fleet.pace import GPU_STEP, NETWORK_STEP
from lyra_emergence.fleet.shards import obstacle, shard
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lyra_emergence.fleet.layouts import Layout
    from lyra_emergence.fleet.machines import Hardware
    from lyra_emergence.fleet.shards import FleetModel

__all__ = ["FleetPlan", "as_many_as_planned", "fewest_machines", "like_these", "plan_fleet"]

JSON_FORMAT = "lyra.fleet/1"
_AS_FAST = 0.99
"""The share of the best speed from which two layouts count as equally fast."""
_STATED = {
    "bandwidth": ("--bandwidth", "a GPU reads its memory at {}/s"),
    "flops": ("--tflops", "a GPU computes {} TFLOP/s"),
    "gpu_link": ("--gpu-link", "GPUs of a machine exchange {}/s"),
    "link": ("--link", "machines exchange {}/s"),
}


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """How a model can be laid out over machines.

    Attributes:
        model: What was planned for.
        machines: The machines.
        hardware: How fast they are, as stated or assumed.
        layouts: The chosen one, then the others, fastest first.
        reason: Why the first is chosen.
        passed_over: Why some sizes of tensor parallelism are not among the layouts, a sentence each.
        notes: What the figures rest on, and what they leave out, a sentence each.
    """

    model: FleetModel
    machines: tuple[MachineKind, ...]
    hardware: Hardware
    layouts: tuple[Layout, ...]
    reason: str
    passed_over: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def chosen(self) -> Layout:
        """The layout to take."""
        return self.layouts[0]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data; `format` names the version of this form."""
        footprint = self.model.footprint
        return {
            "format": JSON_FORMAT,
            "model": self.model.index.name,
            "dtype": footprint.dtype,
            "quantization": footprint.quantization,
            "context_length": footprint.context_length,
            "batch": footprint.batch,
            "weights": footprint.weights,
            "machines": [asdict(kind) | {"limit": kind.limit} for kind in self.machines],
            "hardware": asdict(self.hardware) | {"assumed": list(self.hardware.assumed)},
            "layouts": [_layout_data(layout) for layout in self.layouts],
            "reason": self.reason,
            "passed_over": list(self.passed_over),
            "notes": list(self.notes),
        }


def _layout_data(layout: Layout) -> dict[str, Any]:
    stages = [asdict(stage) | {"used": stage.used, "unused": stage.unused} for stage in layout.stages]
    return {
        "tensor_parallel": layout.tensor,
        "pipeline_parallel": len(layout.stages),
        "replicas": layout.replicas,
        "machines": layout.machines,
        "gpus": layout.gpus,
        "idle_gpus": layout.idle,
        "sequences": layout.sequences,
        "stages": stages,
        "traffic": asdict(layout.traffic),
        "speed": asdict(layout.speed),
    }


def plan_fleet(model: FleetModel, machines: Sequence[MachineKind], hardware: Hardware) -> FleetPlan:
    """Return the layouts of a model over machines, the best first.

    The best is the fastest for one conversation; of those that are as fast, the one with the fewest GPUs for a replica.

    Raises:
        DoesNotFitError: The machines do not hold the model; the error says how many like these would.
    """
    found, passed_over = _layouts(model, machines, hardware)
    if not found:
        raise _refusal(model, machines, hardware)
    found.sort(key=lambda layout: (-_pace(layout), layout.gpus))
    equal = [layout for layout in found if _pace(layout) >= _AS_FAST * _pace(found[0])]
    best = min(equal, key=lambda layout: (layout.gpus, -layout.replicas))
    layouts = (best, *(layout for layout in found if layout is not best))
    notes = (*model.footprint.notes, *_notes(hardware, best))
    return FleetPlan(model, tuple(machines), hardware, layouts, _reason(layouts), tuple(passed_over), notes)


def fewest_machines(model: FleetModel, like: MachineKind, hardware: Hardware) -> Layout | None:
    """Return the fastest layout over the fewest such machines that hold a model; None where `MOST_GPUS` GPUs do not."""
    found, _ = _layouts(model, (as_many_as_planned(like),), hardware)
    return min(found, key=lambda layout: (layout.machines, -_pace(layout)), default=None)


def as_many_as_planned(like: MachineKind) -> MachineKind:
    """Return as many machines of a kind as are planned for."""
    return MachineKind(max(1, MOST_GPUS // like.gpus), like.gpus, like.nbytes)


def _layouts(model: FleetModel, machines: Sequence[MachineKind], hardware: Hardware) -> tuple[list[Layout], list[str]]:
    found: list[Layout] = []
    passed_over = []
    gpus = sum(kind.gpus_in_all for kind in machines)
    for size in _sizes(machines):
        if against := obstacle(model, size):
            passed_over.append(f"tensor {size}: {against}")
            continue
        shards = shard(model, size)
        made = [uniform_layout(model, shards, kind, gpus - kind.gpus_in_all, hardware) for kind in machines]
        if len(machines) > 1 and not any(layout.machines == 1 for layout in made if layout):
            made.append(mixed_layout(model, shards, machines, hardware))
        held = [layout for layout in made if layout is not None]
        found += held
        if not held:
            passed_over.append(f"tensor {size}: no pipeline over these machines holds the model")
    return found, passed_over


def _sizes(machines: Sequence[MachineKind]) -> list[int]:
    """Return the sizes to try: powers of 2, and whole machines and their halves."""
    most = max(kind.gpus for kind in machines)
    whole = {kind.gpus for kind in machines}
    halves = {kind.gpus // 2 for kind in machines if kind.gpus % 2 == 0}
    return sorted({*(1 << power for power in range(most.bit_length())), *whole, *halves})


def _pace(layout: Layout) -> float:
    return layout.speed.decode_tokens_per_second.likely


def _refusal(model: FleetModel, machines: Sequence[MachineKind], hardware: Hardware) -> DoesNotFitError:
    footprint = model.footprint
    available = sum(kind.limit * kind.gpus_in_all for kind in machines)
    needed = footprint.weights + footprint.kv_cache
    enough = fewest_machines(model, machines[0], hardware)
    tries = ["a shorter context (--context)", *["--4bit"] * (footprint.quantization is None), "larger GPUs"]
    hint = f"try {', or '.join(tries)}"
    if enough is not None:
        hint = f"{like_these(machines[0], enough.machines)} would hold it; or {hint}"
    listed = " and ".join(map(str, machines))
    return DoesNotFitError(
        f"the model does not fit {listed}: weights and KV cache alone are {format_bytes(needed)}, and its layers "
        f"cannot be divided so that each GPU holds its part within {UTILIZATION:.0%}, "
        f"{format_bytes(available)} in all",
        needed=needed,
        available=available,
        hint=hint,
    )


def like_these(kind: MachineKind, count: int) -> str:
    """Return `count` machines of a kind in words."""
    return str(MachineKind(count, kind.gpus, kind.nbytes))


def _reason(layouts: Sequence[Layout]) -> str:
    best, *others = layouts
    if not others:
        return "the only layout that holds the model" if best.gpus > 1 else "one GPU holds the model"
    faster = [layout for layout in others if _pace(layout) > _pace(best)]
    if faster:
        return "as fast for one conversation as any other, with the fewest GPUs for a replica"
    return "the fastest for one conversation"


def _notes(hardware: Hardware, best: Layout) -> Iterator[str]:
    figures = {
        "bandwidth": format_bytes(int(hardware.bandwidth)),
        "flops": f"{hardware.flops / 1e12:g}",
        "gpu_link": format_bytes(int(hardware.gpu_link)),
        "link": format_bytes(int(hardware.link)),
    }
    assumed = [f"{_STATED[name][1].format(figures[name])} ({_STATED[name][0]})" for name in hardware.assumed]
    if assumed:
        yield f"assumed: {'; '.join(assumed)}"
    yield (
        f"assumed: a message takes {GPU_STEP * 1e6:g} us within a machine and {NETWORK_STEP * 1e6:g} us between "
        "machines; no figure of speed here was measured"
    )
    yield (
        f"{UTILIZATION:.0%} of each GPU is filled, as vLLM does by default; buffers of NCCL and CUDA graphs are not "
        "counted and need to find room in the rest"
    )
    if best.idle:
        yield f"{best.idle} GPU{'s' * (best.idle > 1)} would be idle"
