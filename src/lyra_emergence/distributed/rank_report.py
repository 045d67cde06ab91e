"""What each rank holds, beside what was planned for it."""

from __future__ import annotations

import socket
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from lyra_emergence.plan import Plan

__all__ = ["RankReport"]


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank, in bytes.

    Attributes:
        rank: Its number.
        host: Its machine's name.
        device: torch's name of its device.
        weights: What its parameters take.
        planned_weights: What they were to take.
        kv_cache: What keys and values take now.
        planned_kv_cache: What they take where the context is full.
        private: Private main memory of the process.
        allocated: What tensors take on its accelerator; 0 on the CPU.
    """

    rank: int
    host: str
    device: str
    weights: int
    planned_weights: int
    kv_cache: int
    planned_kv_cache: int
    private: int
    allocated: int = 0

    @classmethod
    def of(cls, rank: int, model: Any, plan: Plan, device: str, kv_cache: int) -> Self:
        """Measure this process.

        Args:
            rank: Which it is.
            model: Its share of the model.
            plan: What was planned for it.
            device: Where that is.
            kv_cache: Bytes of keys and values that it holds.
        """
        from lyra_emergence.framework import private_bytes
        from lyra_emergence.runtime.memory import allocated_bytes

        return cls(
            rank=rank,
            host=socket.gethostname(),
            device=device,
            weights=weight_bytes(model),
            planned_weights=plan.footprint.weights,
            kv_cache=kv_cache,
            planned_kv_cache=plan.footprint.kv_cache,
            private=private_bytes(),
            allocated=0 if device == "cpu" else allocated_bytes(device),
        )

    def __str__(self) -> str:
        planned = (
            "as planned" if self.weights == self.planned_weights else f"{format_bytes(self.planned_weights)} planned"
        )
        room = f"KV cache {format_bytes(self.kv_cache)} of {format_bytes(self.planned_kv_cache)}"
        process = f"the process has {format_bytes(self.private)} of main memory"
        if self.allocated:
            process += f" and {format_bytes(self.allocated)} of {self.device}"
        where = f"rank {self.rank} on {self.host}, {self.device}"
        return f"{where}: {format_bytes(self.weights)} of weights, {planned}; {room}; {process}"

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return asdict(self)


def weight_bytes(model: Any) -> int:
    """Return the bytes of this process's part of a model's parameters, each tied one once."""
    parts = (getattr(parameter, "to_local", lambda found=parameter: found)() for parameter in model.parameters())
    return sum(part.nbytes for part in parts)
