"""How fast a plan will run: rates that a short probe measured on this machine, and what they make of a plan.

`predict` and `cached_rates` need no torch; `rates` and `measure_rates` import it where they have to measure.
"""

from __future__ import annotations

from lyra_emergence.speed.cache import cached_rates, fingerprint, rates
from lyra_emergence.speed.machine_rates import Band, DeviceRates, DtypeRates, MachineRates
from lyra_emergence.speed.prediction import Speed, predict
from lyra_emergence.speed.probe import measure_rates

__all__ = [
    "Band",
    "DeviceRates",
    "DtypeRates",
    "MachineRates",
    "Speed",
    "cached_rates",
    "fingerprint",
    "measure_rates",
    "predict",
    "rates",
]
