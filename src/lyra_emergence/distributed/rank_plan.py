"""The plan of each process that runs a part of a divided model: all of its share on its one device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from lyra_emergence.budgets import read_request
from lyra_emergence.distributed.layout import Layout, check_options, settle
from lyra_emergence.errors import ConfigError, DoesNotFitError
from lyra_emergence.footprint import default_context, is_known
from lyra_emergence.ladder import build_ladder, forced_placements
from lyra_emergence.machine import probe_machine
from lyra_emergence.placement import CPU, DeviceUse, measure_use, refuse
from lyra_emergence.plan import Plan, measure_footprint
from lyra_emergence.remedies import attempts

if TYPE_CHECKING:
    from lyra_emergence.checkpoint import CheckpointIndex
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.distributed.launch import Launch
    from lyra_emergence.distributed.shares import Division
    from lyra_emergence.footprint import Footprint
    from lyra_emergence.machine import Machine

__all__ = ["RankPlan", "device_of", "own_plan", "plan_here", "plan_ranks"]

_SHORTENED: Final = "the context is shortened to {} tokens: {} do not fit"
_REMEDY: Final = "try more processes, or a shorter context (--context), or a smaller model"
_REASON: Final = "this process's share, which does not move"


@dataclass(frozen=True, slots=True)
class RankPlan:
    """The share of one process.

    Attributes:
        rank: Its number.
        plan: Its blocks, on its device.
    """

    rank: int
    plan: Plan

    @property
    def use(self) -> DeviceUse:
        """How full its device is."""
        return next(use for use in self.plan.devices if use.weights or use.kv_cache)

    def to_json(self) -> dict[str, Any]:
        """Return the share as plain data, in bytes."""
        use = self.use
        names = ("device", "weights", "kv_cache", "activations", "reserved", "used", "limit")
        return {"rank": self.rank} | {name: getattr(use, name) for name in names}


def device_of(machine: Machine, local_rank: int) -> str:
    """Return torch's name of the device of a machine's process number `local_rank`.

    Raises:
        ConfigError: It has accelerators, and not as many as processes.
    """
    if not machine.accelerators:
        return CPU
    if local_rank >= len(machine.accelerators):
        count = len(machine.accelerators)
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: there {'is' if count == 1 else 'are'} {count}",
            hint=f"run at most --nproc-per-node {count} here, and the others on further machines (--nnodes)",
        )
    return machine.accelerators[local_rank].name


def plan_ranks(
    config: ModelConfig, index: CheckpointIndex, machine: Machine, *, batch: int = 1
) -> tuple[RankPlan, ...]:
    """Plan every process's share, whatever this process is: nothing need be running.

    Args:
        config: What the user wants; the processes divide the model as its `distributed` says.
        index: The checkpoint.
        machine: This machine. Its accelerators go to the processes in turn; main memory is divided between all.
        batch: Sequences that run together.

    Raises:
        ConfigError: The model, or what is configured, cannot be divided so.
        CheckpointError: transformers cannot build the model.
        DoesNotFitError: A share does not fit its device; the error names its rank.
    """
    check_options(config)
    layout = Layout.of(config)
    here = layout.world_size if not machine.accelerators else min(layout.world_size, len(machine.accelerators))
    return _plan_all(config, index, _Host(machine, here), layout, batch)


def own_plan(config: ModelConfig, index: CheckpointIndex, launch: Launch | None) -> Plan:
    """Plan this process's share among those that torchrun started, with room for a context that fits all shares.

    The other machines are taken to be like this one; each rank looks at its own when it loads.

    Raises:
        ConfigError, CheckpointError, DoesNotFitError: As `plan_ranks`, and where torchrun started other processes than
            the configuration wants.
    """
    layout = settle(config, launch)
    assert launch is not None  # settle says so
    machine = probe_machine()
    device_of(machine, launch.local_rank)
    return _plan_all(config, index, _Host(machine, launch.local_world_size), layout)[launch.rank].plan


def plan_here(config: ModelConfig, index: CheckpointIndex, launch: Launch) -> Plan:
    """Plan this process's share at the configured context, on its own machine.

    Raises:
        ConfigError, CheckpointError, DoesNotFitError: As `own_plan`.
    """
    layout = settle(config, launch)
    whole = measure_footprint(config, index, config.context_length or default_context(index), 1, None)
    division = divided(config, index, layout, whole)
    share = division.share(whole, launch.rank, known=is_known(index))
    return _plan_share(config, index.name, share, launch.rank, _Host(probe_machine(), launch.local_world_size))


@dataclass(frozen=True, slots=True)
class _Host:
    """A machine and how many processes share it."""

    machine: Machine
    processes: int


def _plan_all(
    config: ModelConfig, index: CheckpointIndex, host: _Host, layout: Layout, batch: int = 1
) -> tuple[RankPlan, ...]:
    """Plan every rank with the longest context, of those to be tried, that fits all of them."""
    unpacked = config.model_copy(update={"allow_quantization": False})
    contexts = [attempt.context for attempt in attempts(unpacked, index) if attempt.goal == "any"]
    failure: DoesNotFitError | None = None
    division: Division | None = None
    for context in contexts:
        whole = measure_footprint(config, index, context, batch, None)
        division = division or divided(config, index, layout, whole)
        shares = [division.share(whole, rank, known=is_known(index)) for rank in range(layout.world_size)]
        try:
            found = [_plan_share(config, index.name, share, rank, host) for rank, share in enumerate(shares)]
        except DoesNotFitError as error:
            failure = failure or error
            continue
        notes = () if context == contexts[0] else (_SHORTENED.format(context, contexts[0]),)
        return tuple(RankPlan(at, replace(plan, notes=(*plan.notes, *notes))) for at, plan in enumerate(found))
    assert failure is not None  # there is a context to try
    raise failure


def divided(config: ModelConfig, index: CheckpointIndex, layout: Layout, whole: Footprint) -> Division:
    """Return how the model of `index` is cut, in the dtype of its footprint `whole`."""
    from lyra_emergence.distributed.shares import divide

    return divide(index, layout, whole.dtype, trust_remote_code=config.trust_remote_code)


def _plan_share(config: ModelConfig, name: str, share: Footprint, rank: int, host: _Host) -> Plan:
    """Plan one rank's share, all of it on the rank's own device.

    Raises:
        DoesNotFitError: It does not fit there.
    """
    device = device_of(host.machine, rank % host.processes)
    wish = config.model_copy(update={"device_map": device, "enable_progressive_fallback": False})
    machine = _for_one(host.machine, device, host.processes)
    request = read_request(wish, machine, share)
    rung = next(iter(build_ladder(wish, share, request)))
    if not rung.fits:
        uses = measure_use(forced_placements(share, request), share, (*request.accelerators, request.cpu))
        error = refuse(uses, _REMEDY)
        raise DoesNotFitError(
            f"rank {rank}: {error}", needed=error.needed, available=error.available, device=device, hint=error.hint
        )
    notes = (*machine.notes, *request.notes, *share.notes)
    return Plan(name, share, request, (replace(rung, reason=_REASON),), 0, notes)


def _for_one(machine: Machine, device: str, processes: int) -> Machine:
    """Return what one of `processes` processes has of a machine: its accelerator, and an equal part of main memory."""
    cpu, own = machine.cpu, tuple(one for one in machine.accelerators if one.name == device)
    part = replace(cpu, free_bytes=cpu.free_bytes // processes, total_bytes=cpu.total_bytes // processes)
    return replace(machine, cpu=part, accelerators=own)
