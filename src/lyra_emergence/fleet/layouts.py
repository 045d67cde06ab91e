"""Layouts of a model over machines: tensor parallel within a machine, a pipeline over them, replicas with the rest.

Invariants: a group of GPUs that share each layer never leaves its machine; every machine of a replica runs as many
stages as the others, as vLLM's `--nnodes` wants it; stages are contiguous and each has a layer at least; no GPU holds
more than its limit; the fewest machines that hold the model are used, and on these the fewest stages. A replica whose
stages are all alike uses machines of one kind; one of several kinds takes those with the largest GPUs first.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lyra_emergence.fleet.machines import RESERVED_BYTES
from lyra_emergence.fleet.pace import predict_speed, traffic_of
from lyra_emergence.fleet.partition import divide, fits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lyra_emergence.fleet.machines import Hardware, MachineKind
    from lyra_emergence.fleet.pace import Traffic
    from lyra_emergence.fleet.shards import FleetModel, Shards
    from lyra_emergence.speed import Speed

__all__ = ["Layout", "Stage", "mixed_layout", "uniform_layout"]


@dataclass(frozen=True, slots=True)
class Stage:
    """What each GPU of one stage holds, in bytes.

    Attributes:
        machine: The machine of the replica that runs it, from 0.
        layers: How many layers it has.
        limit: What the GPU may be filled with.
        weights: Its share of the weights.
        kv_cache: Its share of the keys and values of all sequences at the full context.
        activations: Temporaries at their most.
        reserved: What CUDA and its libraries take.
    """

    machine: int
    layers: int
    limit: int
    weights: int
    kv_cache: int
    activations: int
    reserved: int = RESERVED_BYTES

    @property
    def used(self) -> int:
        """Everything together, in bytes."""
        return self.weights + self.kv_cache + self.activations + self.reserved

    @property
    def unused(self) -> int:
        """Bytes of the limit that stay free."""
        return self.limit - self.used


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to lay a model out.

    Attributes:
        tensor: GPUs that share each layer.
        stages: The stages of one replica, in order.
        machines: Machines of one replica.
        replicas: Copies of the model that the fleet has room for in this way.
        idle: GPUs that are left over.
        sequences: Conversations at the full context that a replica has room for at once.
        traffic: Bytes that cross links for a token.
        speed: How fast one conversation runs.
    """

    tensor: int
    stages: tuple[Stage, ...]
    machines: int
    replicas: int
    idle: int
    sequences: int
    traffic: Traffic
    speed: Speed

    @property
    def gpus(self) -> int:
        """GPUs of one replica."""
        return self.tensor * len(self.stages)

    @property
    def gpus_per_machine(self) -> int:
        """GPUs of a replica on each of its machines."""
        return self.gpus // self.machines

    @property
    def fullest(self) -> Stage:
        """The stage that has the least left on each of its GPUs."""
        return min(self.stages, key=lambda stage: stage.unused)


def uniform_layout(
    model: FleetModel, shards: Shards, kind: MachineKind, others: int, hardware: Hardware
) -> Layout | None:
    """Return the layout over machines of one kind; None where they do not hold the model.

    Args:
        model: The model.
        shards: What a GPU has of it in a group of the size wanted.
        kind: The machines.
        others: GPUs of the fleet that are not theirs.
        hardware: How fast they are.
    """
    slots = kind.gpus // shards.size
    found = _fewest(shards, kind, slots) if slots else None
    if found is None:
        return None
    machines, each = found
    replicas = kind.count * (slots // each) if machines == 1 else kind.count // machines
    idle = others + kind.gpus_in_all - replicas * machines * each * shards.size
    return _layout(model, shards, [kind.limit] * machines, each, hardware, replicas=replicas, idle=idle)


def mixed_layout(model: FleetModel, shards: Shards, kinds: Sequence[MachineKind], hardware: Hardware) -> Layout | None:
    """Return the layout of one replica over machines of several kinds, the largest first; None where there is none."""
    able = [kind for kind in kinds if kind.gpus >= shards.size]
    limits = [kind.limit for kind in able for _ in range(kind.count)]
    slots = [kind.gpus // shards.size for kind in able for _ in range(kind.count)]
    gpus = sum(kind.gpus_in_all for kind in kinds)
    for machines in range(2, min(len(limits), len(shards.layers)) + 1):
        each = min(slots[:machines])
        stages = machines * each
        if len(set(limits[:machines])) == 1 or stages > len(shards.layers):
            continue
        if fits(_costs(shards), _rooms(shards, limits[:machines], each)):
            idle = gpus - stages * shards.size
            return _layout(model, shards, limits[:machines], each, hardware, idle=idle)
    return None


def _fewest(shards: Shards, kind: MachineKind, slots: int) -> tuple[int, int] | None:
    """Return the fewest machines that hold the model, and the fewest stages on each of them; None for too few."""
    costs, layers = _costs(shards), len(shards.layers)

    def holds(machines: int, each: int) -> bool:
        return fits(costs, _rooms(shards, [kind.limit] * machines, each))

    if max(costs) > kind.limit - RESERVED_BYTES:
        return None
    each = _first(range(1, min(slots, layers) + 1), lambda number: holds(1, number))
    if each is not None:
        return 1, each
    most = min(kind.count, layers)
    machines = _first(range(2, min(most, layers // slots) + 1), lambda number: holds(number, slots))
    if machines is not None:
        return machines, _first(range(1, slots + 1), lambda number: holds(machines, number)) or slots
    # More machines than that find too few layers for all their GPUs.
    for more in range(max(2, layers // slots + 1), most + 1):
        if holds(more, layers // more):
            return more, layers // more
    return None


def _first(numbers: range, holds: Callable[[int], bool]) -> int | None:
    """Return the first of `numbers` for which `holds`; where it does once, it does for all that follow."""
    at = bisect_left(numbers, True, key=holds)
    return numbers[at] if at < len(numbers) else None


def _costs(shards: Shards) -> list[int]:
    return [layer.weights + layer.kv_cache for layer in shards.layers]


def _rooms(shards: Shards, limits: Sequence[int], each: int) -> list[int]:
    """Return the bytes that every stage has for layers, with `each` stages on each machine."""
    stages = len(limits) * each
    return [limits[at // each] - _besides(shards, at, stages) for at in range(stages)]


def _besides(shards: Shards, at: int, stages: int) -> int:
    ends = {"first": at == 0, "last": at == stages - 1}
    return RESERVED_BYTES + shards.beside(**ends) + shards.temporaries(**ends)


def _layout(
    model: FleetModel,
    shards: Shards,
    limits: Sequence[int],
    each: int,
    hardware: Hardware,
    *,
    replicas: int = 1,
    idle: int,
) -> Layout:
    counts = divide(_costs(shards), _rooms(shards, limits, each))
    assert counts is not None
    stages = tuple(_stages(shards, counts, limits, each))
    traffic = traffic_of(model, shards.size, counts, [stage.machine for stage in stages])
    return Layout(
        tensor=shards.size,
        stages=stages,
        machines=len(limits),
        replicas=replicas,
        idle=idle,
        sequences=min(_sequences(stage, model.footprint.batch) for stage in stages),
        traffic=traffic,
        speed=predict_speed(model, shards, traffic, hardware),
    )


def _stages(shards: Shards, counts: Sequence[int], limits: Sequence[int], each: int) -> Iterator[Stage]:
    start = 0
    for at, layers in enumerate(counts):
        mine = shards.layers[start : start + layers]
        ends = {"first": at == 0, "last": at == len(counts) - 1}
        yield Stage(
            machine=at // each,
            layers=layers,
            limit=limits[at // each],
            weights=sum(layer.weights for layer in mine) + shards.beside(**ends),
            kv_cache=sum(layer.kv_cache for layer in mine),
            activations=shards.temporaries(**ends),
        )
        start += layers


def _sequences(stage: Stage, batch: int) -> int:
    """Return how many conversations a stage has room for: prompts are read in turn, so that activations do not grow."""
    if not stage.kv_cache:
        return batch
    return math.floor((stage.unused + stage.kv_cache) * batch / stage.kv_cache)
