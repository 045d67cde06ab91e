"""The machines of a fleet as a person writes them: "4x24GB" and "2x8x80GB", and what is said or assumed of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lyra_emergence.errors import ConfigError
from lyra_emergence.machine import CUDA_CONTEXT_BYTES, CUDA_WORKSPACE_BYTES
from lyra_emergence.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MOST_GPUS", "RESERVED_BYTES", "UTILIZATION", "Hardware", "MachineKind", "read_machines"]

MOST_GPUS = 1000
"""GPUs that are planned for together."""
UTILIZATION = 0.92
"""The share of a GPU that vLLM takes by default: `gpu_memory_utilization` in its vllm/config/cache.py, 002f10e."""
RESERVED_BYTES = CUDA_CONTEXT_BYTES + CUDA_WORKSPACE_BYTES
"""What CUDA and its libraries take of that share, as in a plan for one machine."""
_FORM = re.compile(
    r"(?P<count>[0-9]{1,6})\s*x\s*(?:(?P<gpus>[0-9]{1,6})\s*x\s*)?(?P<size>[0-9.]+\s*[A-Za-z]+)", re.IGNORECASE
)
_WHERE = "in '--machines'"


@dataclass(frozen=True, slots=True)
class MachineKind:
    """Machines that are alike.

    Attributes:
        count: How many there are.
        gpus: GPUs of each.
        nbytes: Memory of each GPU, in bytes.
    """

    count: int
    gpus: int
    nbytes: int

    @property
    def limit(self) -> int:
        """Bytes of a GPU that weights, KV cache, activations and CUDA may fill together."""
        return int(self.nbytes * UTILIZATION)

    @property
    def gpus_in_all(self) -> int:
        """GPUs of all these machines."""
        return self.count * self.gpus

    def __str__(self) -> str:
        """Return it in words: "2 machines with 8 GPUs of 80.0 GB"."""
        machines = "1 machine" if self.count == 1 else f"{self.count} machines"
        gpus = "one GPU" if self.gpus == 1 else f"{self.gpus} GPUs"
        return f"{machines} with {gpus} of {format_bytes(self.nbytes)}{' each' if self.count > 1 else ''}"


@dataclass(frozen=True, slots=True)
class Hardware:
    """How fast the parts of a fleet are.

    The defaults are assumptions that a plan states: 1 TB/s and 100 TFLOP/s are about what a GPU of 24 GB for
    workstations has; 31.5 GB/s is PCIe 4.0 with 16 lanes (16 GT/s each, 128 of 130 bits data); 1.25 GB/s is a network
    of 10 Gbit/s.

    Attributes:
        bandwidth: Bytes/s that a GPU reads of its own memory.
        flops: FLOP/s of a GPU in the model's dtype.
        gpu_link: Bytes/s between two GPUs of a machine, each way.
        link: Bytes/s between two machines, each way.
        assumed: Names of those that nobody stated.
    """

    bandwidth: float = 1e12
    flops: float = 1e14
    gpu_link: float = 31.5e9
    link: float = 1.25e9
    assumed: tuple[str, ...] = ("bandwidth", "flops", "gpu_link", "link")


def read_machines(written: Sequence[str]) -> tuple[MachineKind, ...]:
    """Return the machines that `written` names, those with the largest GPUs first.

    "4x24GB" is 4 machines with a GPU of 24 GB each; "2x8x80GB" is 2 machines with 8 GPUs of 80 GB each.

    Raises:
        ConfigError: One is of neither form, has no GPU, or they have more than `MOST_GPUS` GPUs together.
    """
    kinds = [_read(text) for text in written]
    gpus = sum(kind.gpus_in_all for kind in kinds)
    if gpus > MOST_GPUS:
        raise ConfigError(
            f"{_WHERE}: {gpus:,} GPUs are more than the {MOST_GPUS:,} that are planned for together",
            hint="plan for a part of them: replicas do not depend on one another",
        )
    return tuple(sorted(kinds, key=lambda kind: (-kind.nbytes, -kind.gpus)))


def _read(text: str) -> MachineKind:
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"{_WHERE}: {text!r} names no machines",
            hint="4x24GB is 4 machines with a GPU of 24 GB each, 2x8x80GB is 2 machines with 8 GPUs of 80 GB each",
        )
    try:
        nbytes = parse_bytes(match["size"])
    except ValueError as error:
        raise ConfigError(f"{_WHERE}: {error}") from None
    kind = MachineKind(int(match["count"]), int(match["gpus"] or 1), nbytes)
    if not kind.gpus_in_all or not nbytes:
        raise ConfigError(f"{_WHERE}: {text.strip()} holds nothing; write machines such as 4x24GB")
    return kind
