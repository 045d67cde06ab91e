"""What the user allows: the budgets and the device map of a configuration, read against the machine at hand."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lyra_emergence.errors import ConfigError
from lyra_emergence.speed.cache import cached_rates
from lyra_emergence.units import format_bytes, parse_bytes, parse_fraction

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lyra_emergence.config import ModelConfig
    from lyra_emergence.footprint import Footprint
    from lyra_emergence.machine import Device, Machine

__all__ = ["Budget", "Request", "read_request"]

_IN_ORDER = "sequential"
_AUTOMATIC = ("auto", "balanced", "balanced_low_0", _IN_ORDER)
_OTHER_PACE = 1.25
"""How much faster one accelerator reads than another for the two not to be of one kind."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The bytes of one device that a plan may fill.

    Attributes:
        device: torch's name of the device.
        limit: Bytes that weights, KV cache and activations may take together.
        free: Bytes that the device has free.
        total: Bytes that the device has.
        reserved: Bytes of the limit that the framework itself takes.
        reason: Where the limit comes from.
    """

    device: str
    limit: int
    free: int
    total: int
    reserved: int
    reason: str


@dataclass(frozen=True, slots=True)
class Request:
    """A configuration's wishes, resolved on this machine.

    Attributes:
        accelerators: The accelerators that the plan may use, in the order in which layers fill them.
        cpu: The budget of main memory.
        pinned: Device by block name, where a custom map says so.
        whole_on: The accelerator that must hold the whole model ("cuda"), or None.
        notes: Warnings for the user.
        guests: Whether an accelerator may run blocks of main memory for a long prompt.
    """

    accelerators: tuple[Budget, ...]
    cpu: Budget
    pinned: Mapping[str, str]
    whole_on: str | None
    notes: tuple[str, ...]
    guests: bool = True


def read_request(config: ModelConfig, machine: Machine, footprint: Footprint) -> Request:
    """Resolve `device_map` and `max_memory` of `config` on `machine`.

    Raises:
        ConfigError: The custom map names modules that the model does not have, or parts of a block.
    """
    lacking = _Lacking()
    cut: list[str] = []
    limits = _limits(config.max_memory or {}, machine, lacking)
    accelerators = tuple(_budget(d, limits.get(d.name), cut) for d in machine.accelerators)
    cpu = _budget(machine.cpu, limits.get("cpu"), cut)
    pinned: dict[str, str] = {}
    whole_on = None
    wish = config.device_map
    if isinstance(wish, dict):
        pinned = _pinned(wish, machine, footprint, lacking)
    elif wish == "cpu":
        accelerators = ()
    elif wish is not None and wish not in _AUTOMATIC:
        device = machine.find(wish)
        if device is None:
            lacking.add("'device_map'", wish)
            accelerators = ()
        else:
            accelerators = tuple(b for b in accelerators if b.device == device.name)
            whole_on = device.name
    if wish != _IN_ORDER:
        accelerators = fastest_first(accelerators, machine, footprint.dtype)
    notes = (*lacking.notes(), *cut)
    return Request(accelerators, cpu, pinned, whole_on, notes, guests=config.prompt_streaming)


def fastest_first(accelerators: tuple[Budget, ...], machine: Machine, dtype: str) -> tuple[Budget, ...]:
    """Return accelerators in the order in which layers fill them: the fastest first, where they are of several paces.

    A token reads the weights of all of them, one after the other. So what does not fill every accelerator is best left
    to those that read fastest. Where the machine was not measured, and between equals, they stay in their own order.
    """
    known = cached_rates(machine) if len(accelerators) > 1 else None
    found = [known.of(budget.device) if known is not None else None for budget in accelerators]
    paces = [rates.dtypes[dtype].read.likely for rates in found if rates is not None and dtype in rates.dtypes]
    if len(paces) < len(accelerators) or not paces or max(paces) < _OTHER_PACE * min(paces):
        return accelerators
    order = sorted(range(len(paces)), key=lambda at: -paces[at])
    return tuple(accelerators[at] for at in order)


class _Lacking:
    """Collects the devices that a configuration names and this machine lacks, for one warning."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def add(self, where: str, device: str) -> None:
        self._found.setdefault(device, []).append(where)

    def notes(self) -> tuple[str, ...]:
        if not self._found:
            return ()
        named = ", ".join(_named(device, places) for device, places in self._found.items())
        return (f"this machine lacks devices that the configuration names, ignored: {named}",)


def _named(device: str, places: list[str]) -> str:
    more = f" and {len(places) - 1} more" if places[1:] else ""
    return f"{places[0]}{more}" if f".{device}'" in places[0] else f"{places[0]}{more} ({device})"


def _limits(max_memory: Mapping[str, str | int], machine: Machine, lacking: _Lacking) -> dict[str, int]:
    limits: dict[str, int] = {}
    for key, value in max_memory.items():
        if key == "disk":
            continue
        device = machine.find(str(key))
        if device is None:
            lacking.add(f"'max_memory.{key}'", str(key))
            continue
        fraction = parse_fraction(value) if isinstance(value, str) else None
        limits[device.name] = parse_bytes(value) if fraction is None else int(device.total_bytes * fraction)
    return limits


def _budget(device: Device, limit: int | None, cut: list[str]) -> Budget:
    usable, reserved, held = device.free_bytes, device.reserved_bytes, ""
    if device.kind == "cpu" and reserved:
        # A limit of main memory is one for the model; what Python and torch take comes off what is free.
        usable, reserved, held = max(0, usable - reserved), 0, f" beside {format_bytes(reserved)} for Python and torch"
    if limit is None:
        reason = f"{format_bytes(usable)} free{held}"
    elif limit > usable:
        cut.append(
            f"max_memory of {device.name} is {format_bytes(limit)}, but {format_bytes(usable)} is free{held}: "
            f"planned with {format_bytes(usable)}"
        )
        reason = f"{format_bytes(usable)} free{held}, below the configured {format_bytes(limit)}"
    else:
        reason = f"max_memory {format_bytes(limit)}"
        usable = limit
    return Budget(device.name, usable, device.free_bytes, device.total_bytes, reserved, reason)


def _pinned(wish: Mapping[str, str | int], machine: Machine, footprint: Footprint, lacking: _Lacking) -> dict[str, str]:
    names = [block.name for block in footprint.blocks]
    problems = [problem for key in wish if (problem := _map_problem(key, names)) is not None]
    if problems:
        raise ConfigError("the device map does not match the model:", problems=tuple(problems))
    pinned: dict[str, str] = {}
    for block in footprint.blocks:
        key = _longest_match(block.name, wish)
        if key is None:
            continue
        where = f"'device_map' for {key}" if key else "'device_map'"
        pinned[block.name] = _device_name(where, wish[key], machine, lacking)
    mapped = {block.name: block.mapped for block in footprint.blocks}
    on_disk = [block for block in footprint.blocks if pinned.get(block.name) == "disk"]
    stuck = [block.name for block in on_disk if not (block.mapped and mapped[block.tied_to or block.name])]
    if stuck:
        raise ConfigError(
            "only weights in their stored form can stay on disk:",
            problems=tuple(f"in 'device_map': {name} is converted or quantized; write 'cpu'" for name in stuck),
        )
    return pinned


def _device_name(where: str, value: str | int, machine: Machine, lacking: _Lacking) -> str:
    if value == "disk":
        return "disk"
    device = machine.find(str(value))
    if device is None:
        lacking.add(where, str(value))
        return "cpu"
    return device.name


def _longest_match(block: str, keys: Iterable[str]) -> str | None:
    matches = [key for key in keys if key in ("", block) or block.startswith(f"{key}.")]
    return max(matches, key=len, default=None)


def _map_problem(key: str, names: list[str]) -> str | None:
    if any(key in ("", name) or name.startswith(f"{key}.") for name in names):
        return None
    inside = next((name for name in names if key.startswith(f"{name}.")), None)
    if inside is not None:
        return f"in 'device_map.{key}': it is part of block '{inside}', which is placed whole; write '{inside}'"
    near = difflib.get_close_matches(key, [*names, *_prefixes(names)], n=1)
    remedy = f"did you mean '{near[0]}'?" if near else f"its blocks are {names[0]} ... {names[-1]}"
    return f"in 'device_map.{key}': the model has no such module; {remedy}"


def _prefixes(names: list[str]) -> list[str]:
    return sorted({name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)})
