"""Rates kept in the user's cache folder, so that a machine is probed once. Reading them needs no torch."""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyra_emergence.cache_files import cache_path, replace_whole
from lyra_emergence.speed.machine_rates import MachineRates

if TYPE_CHECKING:
    from lyra_emergence.machine import Machine

__all__ = ["cached_rates", "fingerprint", "keep", "rates", "rates_path"]

JSON_FORMAT = "lyra.rates/2"
_KEPT = 20
"""Machines that the file holds at most (a home on a network, other numbers of threads); the oldest go first."""


def rates_path() -> Path:
    """Return the file that holds the rates; there need be none."""
    return cache_path("rates.json")


def fingerprint(machine: Machine) -> str:
    """Return what rates depend on: CPU, cores, threads, torch's version, accelerators. Other words, other rates."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    parts = [
        _cpu_model(),
        f"{_cores()} cores" + (f", {threads} threads" if threads else ""),
        f"torch {metadata.version('torch')}",
        *(f"{device.name} {device.description}" for device in machine.accelerators),
    ]
    return "; ".join(parts)


def cached_rates(machine: Machine) -> MachineRates | None:
    """Return the rates measured here before, or None. Takes milliseconds: nothing is measured, no torch imported."""
    key = fingerprint(machine)
    try:
        return MachineRates.from_json(_read(rates_path())[key])
    except (KeyError, ValueError):
        return None


def rates(machine: Machine, *, file: Path | None = None, fresh: bool = False) -> MachineRates:
    """Return the rates of this machine: those measured before, or else measured now and kept.

    Args:
        machine: This machine as `probe_machine` found it. Not one with imagined hardware: what is here would be
            measured in its place.
        file: A large file where models lie, to measure reading with; a temporary one by default.
        fresh: Whether to measure anew although there are rates.
    """
    held = None if fresh else cached_rates(machine)
    if held is not None:
        return held
    from lyra_emergence.speed.probe import measure_rates

    measured = measure_rates(machine, file=file)
    keep(measured)
    return measured


def keep(measured: MachineRates) -> None:
    """Write the file whole, then put it in the old one's place; a folder that cannot be written costs only time."""
    path = rates_path()
    others = {key: held for key, held in _read(path).items() if key != measured.fingerprint}
    machines = {**dict(list(others.items())[-(_KEPT - 1) :]), measured.fingerprint: measured.to_json()}
    replace_whole(path, json.dumps({"format": JSON_FORMAT, "machines": machines}, indent=1))


def _read(path: Path) -> dict[str, Any]:
    """Return what the file holds by fingerprint; nothing where it is absent, damaged or of another form."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    machines = held.get("machines") if isinstance(held, dict) and held.get("format") == JSON_FORMAT else None
    return machines if isinstance(machines, dict) else {}


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    # A container may give fewer than there are.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
