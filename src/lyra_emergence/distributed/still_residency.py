"""The residency of a model of which this process has a share: everything stays where it was loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lyra_emergence.runtime.blocks import Copies, LoadedForm, PlacedBlock
from lyra_emergence.runtime.handover import Handover
from lyra_emergence.runtime.residency import Residency

if TYPE_CHECKING:
    from lyra_emergence.plan import Plan

__all__ = ["StillResidency"]


class StillResidency(Residency):
    """Knows what is where, as any residency does, and moves none of it: the other ranks would not follow.

    Args:
        model: The transformers model.
        plan: This rank's share.
        form: How weights look once loaded.
    """

    def __init__(self, model: Any, plan: Plan, form: LoadedForm) -> None:
        copies = Copies(form)
        self.still = tuple(PlacedBlock(p.block, None, (), copies, form) for p in plan.placements)
        for block, placement in zip(self.still, plan.placements, strict=True):
            block.device = placement.device
        super().__init__(model, plan, self.still, Handover(model))

    def step_down(self, _device: str, _short: int, _least: int = 1, *, but_one: bool = False) -> tuple[str, ...]:
        """Move nothing."""
        del but_one
        return ()

    def pass_copies(self) -> bool:
        """Change nothing."""
        return False

    def offload_caches(self, _device: str) -> bool:
        """Move nothing."""
        return False

    def layers_on(self, _device: str) -> frozenset[int]:
        """Return none: keys and values grow as transformers lets them, alike on all ranks."""
        return frozenset()
