"""Short runs, timed a little in each of several rounds, and the band that their seconds lie in."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING

from lyra_emergence.speed.machine_rates import Band

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

__all__ = ["BUDGET", "Series", "band_of", "clocked"]

BUDGET = 0.005
"""Seconds for each figure in a round; it takes more only where one run does."""
_ENOUGH = 3
"""Runs whose differences say something."""


class Series:
    """Runs of one kind, timed; where there are several runs, in turns, so that what slows one slows the others."""

    def __init__(self, device: torch.device, *runs: Callable[[], object], budget: float = BUDGET) -> None:
        self._device = device
        self._runs = runs
        self._budget = budget
        self._samples = [self._sample()]

    def take(self) -> None:
        """Time the runs, as often as the budget allows but once in any case."""
        end = time.perf_counter() + self._budget
        self._samples.append(self._sample())
        while time.perf_counter() < end:
            self._samples.append(self._sample())

    @property
    def samples(self) -> list[list[float]]:
        """Seconds of each run, by time; without the first, in which torch chose kernels, where there are others."""
        return self._samples[1:] or self._samples

    def band(self) -> Band:
        """Return the seconds of the first run."""
        return band_of([sample[0] for sample in self.samples])

    def fastest(self) -> Band:
        """Return the seconds of the run that was the fastest by its median."""
        return min((band_of(list(times)) for times in zip(*self.samples, strict=True)), key=lambda band: band.likely)

    def _sample(self) -> list[float]:
        return [clocked(run, self._device) for run in self._runs]


def clocked(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `run` takes on a device."""
    import torch

    start = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def band_of(found: Sequence[float]) -> Band:
    """Return the median, and what is left without the lowest and the highest sixth; of a few runs, twice as wide."""
    ordered = sorted(found)
    sixth = len(ordered) // 6
    band = Band(ordered[sixth], median(ordered), ordered[-1 - sixth])
    return band if len(ordered) >= _ENOUGH else band.widened(2, 2)
