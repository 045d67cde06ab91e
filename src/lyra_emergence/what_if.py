"""Plans for other contexts and quantizations than the configured ones, to compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lyra_emergence.errors import DoesNotFitError
from lyra_emergence.footprint import FALLBACK_CONTEXT, default_context
from lyra_emergence.plan import Plan, make_plan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lyra_emergence.checkpoint import CheckpointIndex
    from lyra_emergence.config import ModelConfig
    from lyra_emergence.machine import Machine
    from lyra_emergence.packing import Quantization

__all__ = ["QUANTIZATIONS", "Scenario", "contexts_of", "what_if"]

JSON_FORMAT = "lyra.what-if/1"
QUANTIZATIONS: tuple[Quantization | None, ...] = (None, "8bit", "4bit")
_SHORTEST = 2048
_LONGEST = 131_072


@dataclass(frozen=True, slots=True)
class Scenario:
    """One context and quantization, and where the model would go.

    Attributes:
        context_length: Tokens of prompt and answer together.
        quantization: "8bit", "4bit" or None for the weights as configured.
        plan: The plan; None where nothing fits.
        shortfall: Why nothing fits; empty where something does.
    """

    context_length: int
    quantization: Quantization | None
    plan: Plan | None
    shortfall: str = ""

    @property
    def layers(self) -> tuple[int, int]:
        """Layers on accelerators, and layers in all; (0, 0) where nothing fits."""
        if self.plan is None:
            return 0, 0
        devices = [placement.device for placement in self.plan.placements if placement.kind == "layer"]
        return sum(device not in ("cpu", "disk") for device in devices), len(devices)

    @property
    def nbytes(self) -> int:
        """Bytes of everything on all devices, the disk included; 0 where nothing fits."""
        return sum(use.used for use in self.plan.devices) if self.plan else 0

    def to_json(self) -> dict[str, Any]:
        """Return the scenario as plain data."""
        fast, layers = self.layers
        return {
            "context_length": self.context_length,
            "quantization": self.quantization,
            "fits": self.plan is not None,
            "rung": self.plan.rung.name if self.plan else None,
            "layers_on_accelerators": fast,
            "layers": layers,
            "bytes": {use.device: use.used for use in self.plan.devices} if self.plan else {},
            "shortfall": self.shortfall,
        }


def contexts_of(index: CheckpointIndex, wanted: int | None = None) -> tuple[int, ...]:
    """Return the contexts worth comparing: powers of two up to the model's own, its default, and the one `wanted`."""
    longest = min(index.context_length or FALLBACK_CONTEXT, _LONGEST)
    doubled = [_SHORTEST << step for step in range(8) if _SHORTEST << step <= longest]
    return tuple(sorted({*doubled, longest, wanted or default_context(index)}))


def what_if(
    config: ModelConfig, index: CheckpointIndex, machine: Machine, contexts: Iterable[int], *, batch: int = 1
) -> tuple[Scenario, ...]:
    """Return a scenario for each context and each of `QUANTIZATIONS`.

    Raises:
        ConfigError: A context is beyond the model's, or the configuration contradicts the model.
    """
    found: list[Scenario] = []
    for context in contexts:
        for quantization in QUANTIZATIONS:
            changes = {
                "context_length": context,
                "load_in_8bit": quantization == "8bit",
                "load_in_4bit": quantization == "4bit",
                "allow_quantization": False,
            }
            try:
                plan = make_plan(config.model_copy(update=changes), index, machine, batch=batch)
            except DoesNotFitError as error:
                found.append(Scenario(context, quantization, None, str(error)))
            else:
                found.append(Scenario(context, quantization, plan))
    return tuple(found)
