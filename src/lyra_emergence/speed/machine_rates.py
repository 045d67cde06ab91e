"""What a probe measured on a machine: bands of rates by device and dtype, and their form in JSON. No torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Band", "DeviceRates", "DtypeRates", "MachineRates"]


@dataclass(frozen=True, slots=True)
class Band:
    """A figure that is not known exactly: the least, the likely and the most, in one unit, none below 0.

    Raises:
        ValueError: They are negative, out of order or not finite.
    """

    low: float
    likely: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.likely <= self.high < math.inf:
            raise ValueError(f"{self.low}, {self.likely}, {self.high} is no band")

    def __add__(self, other: Band) -> Band:
        return Band(self.low + other.low, self.likely + other.likely, self.high + other.high)

    def times(self, factor: float) -> Band:
        """Return the band of `factor` such figures."""
        return Band(self.low * factor, self.likely * factor, self.high * factor)

    def widened(self, below: float, above: float) -> Band:
        """Return the band whose least is `below` times less and whose most is `above` times more."""
        return Band(self.low / below, self.likely, self.high * above)

    def under(self, amount: float) -> Band:
        """Return `amount` divided by this: the seconds that an amount takes at a rate, or a rate from seconds."""
        return Band(amount / self.high, amount / self.likely, amount / self.low)

    def beside(self, other: Band) -> Band:
        """Return the seconds of two works that may overlap: wholly at the least, and most likely; not at the most."""
        return Band(max(self.low, other.low), max(self.likely, other.likely), self.high + other.high)


@dataclass(frozen=True, slots=True)
class DtypeRates:
    """What a device does in one dtype.

    Attributes:
        read: Bytes/s of weights in a product of one row and a matrix, as decoding does it.
        matmul: FLOP/s of a product of many rows, as prefill does it.
        cache_alone: Bytes/s of keys and values, appended to and attended with one query head for each head of keys.
        cache_shared: The same with `SHARED_HEADS` query heads for each head of keys.
        layer: Seconds that a layer costs a token beside reading its weights: Python and small operators.
        token: Seconds that a token costs beside its layers.
        kernel: Seconds that a product of a new number of rows takes more than one of a number that was there before:
            oneDNN compiles a kernel for it. Next to nothing in float32 and on accelerators.
        fused_layer: As `layer`, where the whole layer runs in one call of Lyra's kernels; None where there are none.
        fused_cache: Bytes/s of keys and values that they attend to.
    """

    read: Band
    matmul: Band
    cache_alone: Band
    cache_shared: Band
    layer: Band
    token: Band
    kernel: Band
    fused_layer: Band | None = None
    fused_cache: Band | None = None


_OPTIONAL = ("fused_layer", "fused_cache")
SHARED_HEADS = 4
"""Query heads for each head of keys where `cache_shared` is measured."""


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """What one device does.

    Attributes:
        dtypes: By torch's name of the dtype; a dtype that the device cannot do is left out.
        copy: Bytes/s from pageable main memory to the device; None for the CPU.
        staged: Bytes/s from main memory to the device through pinned pieces (`runtime/staging.py`); None for the CPU,
            and where it was not measured.
        crossing: Seconds that a small tensor takes to the device or back; None for the CPU.
    """

    dtypes: Mapping[str, DtypeRates]
    copy: Band | None = None
    crossing: Band | None = None
    staged: Band | None = None


@dataclass(frozen=True, slots=True)
class MachineRates:
    """What a probe measured on this machine.

    Attributes:
        fingerprint: The machine and versions that it holds for.
        cpu: Main memory and the CPU, with as many threads as torch uses.
        accelerators: By torch's name of the device. One that had no memory left for a probe has no dtypes.
        file_read: Bytes/s of reading a file from beginning to end; None where none could be read. Pages that the
            kernel had in its cache count as it delivered them: see `measure_rates`.
    """

    fingerprint: str
    cpu: DeviceRates
    accelerators: Mapping[str, DeviceRates]
    file_read: Band | None

    def of(self, device: str) -> DeviceRates | None:
        """Return the rates of the device that a placement names; "disk" computes on the CPU."""
        return self.cpu if device in ("cpu", "disk") else self.accelerators.get(device)

    def to_json(self) -> dict[str, Any]:
        """Return the rates as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> MachineRates:
        """Return the rates that `to_json` wrote.

        Raises:
            ValueError: The data has another form, or a rate is not above 0.
        """
        try:
            accelerators = {str(name): _device(held) for name, held in data["accelerators"].items()}
            return cls(str(data["fingerprint"]), _device(data["cpu"]), accelerators, _band_or_none(data["file_read"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no rates of a machine: {error!r}") from error


def _device(held: Any) -> DeviceRates:
    dtypes = {
        str(name): DtypeRates(**{key: _rate(key, band) for key, band in rates.items()})  # type: ignore[arg-type]
        for name, rates in held["dtypes"].items()
    }
    copy, crossing, staged = (_band_or_none(held.get(name)) for name in ("copy", "crossing", "staged"))
    return DeviceRates(dtypes, copy, crossing, staged)


def _rate(name: str, held: Any) -> Band | None:
    return None if held is None and name in _OPTIONAL else _band(held)


def _band_or_none(held: Any) -> Band | None:
    return None if held is None else _band(held)


def _band(held: Any) -> Band:
    band = Band(float(held["low"]), float(held["likely"]), float(held["high"]))
    if band.low == 0:
        raise ValueError("a rate of 0 divides nothing")
    return band
