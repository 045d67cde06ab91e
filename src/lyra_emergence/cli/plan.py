"""`lyra.py plan`: where each layer would go, as bars, a strip and the ladder, or as JSON. Loads nothing."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from lyra_emergence.cli.models import find_model
from lyra_emergence.cli.options import say_notes
from lyra_emergence.cli.plan_view import explain_block, render_plan, render_speed
from lyra_emergence.cli.progress import working
from lyra_emergence.distributed import find_launch, is_divided
from lyra_emergence.errors import ConfigError
from lyra_emergence.placement import DISK
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lyra_emergence.checkpoint import CheckpointIndex
    from lyra_emergence.cli.console import Console
    from lyra_emergence.cli.models import ModelChoice
    from lyra_emergence.cli.options import Options
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.machine import Machine
    from lyra_emergence.plan import Plan
    from lyra_emergence.speed import Speed
    from lyra_emergence.what_if import Scenario

__all__ = ["PlanRequest", "make_plan_for", "measure_machine", "run_plan", "speed_of"]

_LEAST_PLAIN = 1_000_000
"""Bytes below which a size without a unit is a slip."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What `plan` is asked for beside the configuration.

    Attributes:
        explain: A block whose place is to be explained.
        what_if: Whether other contexts and quantizations are compared.
        batch: Sequences that run together.
        gpus: Sizes of GPUs to plan for in place of those here, as written: "24GB".
        ram: Size of main memory to plan for in place of what is here.
        check: Whether the plan is carried out and measured.
        measure: Whether this machine is measured anew: what torch takes, and how fast it is.
    """

    explain: str | None = None
    what_if: bool = False
    batch: int = 1
    gpus: tuple[str, ...] = ()
    ram: str | None = None
    check: bool = False
    measure: bool = False

    def machine(self) -> Machine:
        """Return the machine to plan for.

        Raises:
            ConfigError: A size is none.
        """
        from lyra_emergence.machine import probe_machine, with_hardware

        gpus = [_size(written, "--gpu") for written in self.gpus]
        ram = None if self.ram is None else _size(self.ram, "--ram")
        machine = probe_machine()
        return with_hardware(machine, gpus, ram) if gpus or ram is not None else machine

    def without_foreign_limits(self, config: ModelConfig, options: Options) -> ModelConfig:
        """Return `config` without limits of memory that were written for the hardware that this plan replaces."""
        limits = dict(config.max_memory or {})
        given = {limit.partition("=")[0].strip() for limit in options.max_memory}
        replaced = {key for key in limits if (self.ram if key == "cpu" else self.gpus) and key not in given}
        if not replaced:
            return config
        kept = {key: limit for key, limit in limits.items() if key not in replaced}
        return config.model_copy(update={"max_memory": kept or None})


def run_plan(options: Options, request: PlanRequest, console: Console) -> int:
    """Print the plan for the configured model and return 0.

    Raises:
        ConfigError: The configuration is wrong, a size is none, or there is no block to explain.
        DoesNotFitError: No placement fits.
        ModelUnavailableError: A named model can be had neither here nor from the hub.
    """
    if request.check:
        from lyra_emergence.cli.check import run_check

        return run_check(options, request, console)
    if request.measure:
        measure_machine(console, fresh=True)
    machine = request.machine()
    resolved = options.resolve()
    say_notes(resolved, console)
    with working(console, "reading the plan"):
        choice = find_model(resolved)
        choice = replace(choice, config=request.without_foreign_limits(choice.config, options))
        index = read_index(choice)
    for note in choice.notes:
        console.note(note)
    if request.what_if:
        from lyra_emergence.what_if import contexts_of, what_if

        contexts = contexts_of(index, choice.config.context_length)
        scenarios = what_if(choice.config, index, machine, contexts, batch=request.batch)
        console.print(_what_if_text(choice.config.model_id, scenarios, console, as_json=options.json))
        return 0
    if is_divided(choice.config, find_launch(os.environ)):
        from lyra_emergence.cli.ranks import print_plans

        return print_plans(choice.config, index, machine, request, console, as_json=options.json)
    from lyra_emergence.plan import make_plan

    plan = make_plan(choice.config, index, machine, batch=request.batch)
    for note in plan.notes:
        console.warning(note)
    speed = speed_of(plan, machine)
    if options.json:
        console.print(json.dumps(plan.to_json() | {"speed": asdict(speed) if speed else None}, indent=2))
    elif request.explain is not None:
        console.print(explain_block(plan, request.explain))
    else:
        console.print("\n".join(render_plan(plan, choice.config.model_id, console)))
        imagined = bool(request.gpus) or request.ram is not None
        console.print("\n".join(render_speed(speed, console, known=imagined)))
        _say_machines(plan, index, machine, console)
    return 0


def _say_machines(plan: Plan, index: CheckpointIndex, machine: Machine, console: Console) -> None:
    """Say how many machines would hold a model that this one reads from disk for the most part."""
    if not any(placement.device == DISK for placement in plan.placements):
        return
    from lyra_emergence.fleet.remedy import machines_instead

    if command := machines_instead(plan, index, machine):
        console.note(f"most layers are read from disk for each token; more machines would hold them:\n    {command}")


def speed_of(plan: Plan, machine: Machine) -> Speed | None:
    """Return how fast a plan will run; None where this machine, or a device of the plan, was not measured."""
    from lyra_emergence.speed import cached_rates, predict

    rates = cached_rates(machine)
    if rates is None:
        return None
    footprint = plan.footprint
    shares = {block.name: block.active_share for block in footprint.blocks}
    return predict(footprint, plan.placements, rates, active_share=shares, heads_per_key=footprint.heads_per_key)


def measure_machine(console: Console, *, fresh: bool = False) -> None:
    """Measure what Python and torch take and how fast this machine is, where it was not yet, or `fresh`."""
    from lyra_emergence.cache_files import cache_path
    from lyra_emergence.framework import framework_costs, measure_framework
    from lyra_emergence.machine import probe_machine
    from lyra_emergence.speed import cached_rates, rates

    if fresh or not framework_costs().measured:
        with working(console, "measuring what Python and torch take, once for this machine"):
            measure_framework()
    with working(console, "measuring how fast this machine is"):
        # As planning will name the devices, which it does without torch.
        rates(probe_machine(), fresh=fresh)
    if not framework_costs().measured or cached_rates(probe_machine()) is None:
        console.warning(f"{cache_path('')} cannot be written: what was measured is not kept, and not used")


def _size(written: str, option: str) -> int:
    from lyra_emergence.units import parse_bytes

    try:
        size = parse_bytes(written)
    except ValueError as error:
        raise ConfigError(f"in '{option}': {error}") from None
    if size <= 0:
        raise ConfigError(f"in '{option}': {written} holds nothing; write a size such as 24GB")
    if written.strip().isdecimal() and size < _LEAST_PLAIN:
        raise ConfigError(f"in '{option}': {written} is {written} bytes; write the unit, such as {written.strip()}GB")
    return size


def _what_if_text(name: str, scenarios: Sequence[Scenario], console: Console, *, as_json: bool) -> str:
    from lyra_emergence.what_if import JSON_FORMAT

    if not as_json:
        return "\n".join(_what_if_lines(name, scenarios, console))
    found = [scenario.to_json() for scenario in scenarios]
    return json.dumps({"format": JSON_FORMAT, "model": name, "scenarios": found}, indent=2)


def _what_if_lines(name: str, scenarios: Sequence[Scenario], console: Console) -> Iterator[str]:
    yield console.style(name, "bold", stream=console.stdout)
    yield ""
    yield "context".rjust(9) + "".join(title.rjust(22) for title in ("as configured", "8 bits", "4 bits"))
    rows: dict[int, list[str]] = {}
    for scenario in scenarios:
        rows.setdefault(scenario.context_length, []).append(_what_if_cell(scenario).rjust(22))
    for context, cells in rows.items():
        yield f"{context:9,}" + "".join(cells)
    yield ""
    yield "bytes in all, and where: all layers on accelerators (full), some (n/layers), none (cpu)"


def _what_if_cell(scenario: Scenario) -> str:
    if scenario.plan is None:
        return "does not fit"
    fast, layers = scenario.layers
    where = "cpu" if fast == 0 else "full" if scenario.plan.rung.name == "full" else f"{fast}/{layers}"
    return f"{format_bytes(scenario.nbytes)} {where}"


def make_plan_for(choice: ModelChoice, *, with_torch: bool | None = None) -> Plan:
    """Plan the chosen model on this machine, or this process's share of it; `with_torch` is `probe_machine`'s."""
    from lyra_emergence.machine import probe_machine
    from lyra_emergence.plan import make_plan

    index = read_index(choice)
    launch = find_launch(os.environ)
    if is_divided(choice.config, launch):
        from lyra_emergence.distributed.rank_plan import own_plan

        return own_plan(choice.config, index, launch)
    return make_plan(choice.config, index, probe_machine(with_torch=with_torch))


def read_index(choice: ModelChoice) -> CheckpointIndex:
    """Return what the chosen model's checkpoint holds, from its folder or from the hub."""
    if choice.remote is not None:
        from lyra_emergence.hub.headers import read_remote_checkpoint

        return read_remote_checkpoint(choice.remote)
    from lyra_emergence.checkpoint import read_checkpoint

    return read_checkpoint(choice.directory)
