"""What a model that does not fit this machine would fit: how many machines like it, and the commands for them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lyra_emergence.fleet.handover import hand_over, model_word
from lyra_emergence.fleet.machines import Hardware, MachineKind
from lyra_emergence.fleet.planning import as_many_as_planned, fewest_machines, like_these
from lyra_emergence.fleet.shards import FleetModel
from lyra_emergence.placement import DISK

if TYPE_CHECKING:
    from lyra_emergence.checkpoint import CheckpointIndex
    from lyra_emergence.machine import Machine
    from lyra_emergence.plan import Plan

__all__ = ["kind_of", "machines_hint", "machines_instead"]

_USUAL_GPU = 24 * 10**9
"""Bytes of the GPU that is spoken of where a machine has none."""


def kind_of(machine: Machine) -> MachineKind:
    """Return what a machine is in a fleet: its GPUs, each as large as the smallest; one of 24 GB where it has none."""
    sizes = [device.total_bytes for device in machine.accelerators]
    return MachineKind(1, len(sizes) or 1, min(sizes, default=_USUAL_GPU))


def machines_instead(plan: Plan, index: CheckpointIndex, machine: Machine) -> str:
    """Return the command that plans for as many machines like this as hold a model, if most layers are on disk here.

    "" where they are not, or no number of such machines holds it.
    """
    devices = [placement.device for placement in plan.placements if placement.kind == "layer"]
    if 2 * devices.count(DISK) <= len(devices):
        return ""
    kind = kind_of(machine)
    layout = fewest_machines(FleetModel(index, plan.footprint), kind, Hardware())
    if layout is None:
        return ""
    gpus = f"{kind.gpus}x" if kind.gpus > 1 else ""
    size = f"{math.floor(kind.nbytes / 1e8) / 10:g}GB"
    return f"lyra.py plan {model_word(index)} --machines {layout.machines}x{gpus}{size}"


def machines_hint(model: FleetModel, machine: Machine, *, trust_remote_code: bool = False) -> str:
    """Return how many machines like this one hold a model, and the commands for them; "" where no number does."""
    kind = kind_of(machine)
    layout = fewest_machines(model, kind, Hardware())
    if layout is None:
        return ""
    lines = hand_over(model, layout, (as_many_as_planned(kind),), trust_remote_code=trust_remote_code).lines()
    return "\n".join((f"{like_these(kind, layout.machines)} would hold it", *lines))
