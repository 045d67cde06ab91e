"""Planning for more machines than this one, on paper, and the commands that hand a model over to them.

From the footprint of a model and the sizes of machines to layouts over them (`planning.py`), and from a layout to
commands (`handover.py`). Needs no torch, loads nothing, and reaches no machine.
"""

from __future__ import annotations

from lyra_emergence.fleet.layouts import Layout, Stage
from lyra_emergence.fleet.machines import Hardware, MachineKind, read_machines
from lyra_emergence.fleet.planning import FleetPlan, fewest_machines, plan_fleet
from lyra_emergence.fleet.shards import FleetModel

__all__ = [
    "FleetModel",
    "FleetPlan",
    "Hardware",
    "Layout",
    "MachineKind",
    "Stage",
    "fewest_machines",
    "plan_fleet",
    "read_machines",
]
