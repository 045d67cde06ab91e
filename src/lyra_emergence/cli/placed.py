"""Where a model's weights are, in a few characters for the status line: "48% GPU / 52% CPU"."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lyra_emergence.placement import DISK

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lyra_emergence.plan import Plan

__all__ = ["placement_text", "weight_shares"]

_HOSTS: Final = {"cpu": "CPU", DISK: "disk"}
_WHOLE: Final = 100


def weight_shares(plan: Plan, devices: Mapping[str, str] | None = None) -> dict[str, int]:
    """Return the bytes of weights on "GPU" (all accelerators together), "CPU" and "disk", those with none left out.

    Args:
        plan: Where the blocks were meant to go.
        devices: Where blocks are now, by name; those of the disk are "cpu" there, since they are computed there.
    """
    shares: dict[str, int] = {}
    for placement in plan.placements:
        now = (devices or {}).get(placement.block, placement.device)
        device = DISK if (now, placement.device) == ("cpu", DISK) else now
        kind = _HOSTS.get(device, "GPU")
        shares[kind] = shares.get(kind, 0) + placement.weights
    return {kind: shares[kind] for kind in ("GPU", "CPU", "disk") if shares.get(kind)}


def placement_text(shares: Mapping[str, int]) -> str:
    """Return "48% GPU / 52% CPU": whole percents that make 100, at least 1 where there is anything."""
    total = sum(shares.values())
    if not total:
        return ""
    percents = {kind: max(1, _WHOLE * nbytes // total) for kind, nbytes in shares.items()}
    largest = max(shares, key=lambda kind: shares[kind])
    percents[largest] += _WHOLE - sum(percents.values())
    return " / ".join(f"{percent}% {kind}" for kind, percent in percents.items())
