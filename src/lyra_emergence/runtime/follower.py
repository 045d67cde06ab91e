"""What keeps caches of a model, and lets them go where its blocks go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["Follower"]


class Follower(Protocol):
    """A generator whose caches go where the blocks go."""

    def move_cache(self, layer: int, device: str) -> None:
        """Move the part of its caches that belongs to a layer, or drop the caches where that cannot be done."""

    def cached_bytes(self, device: str) -> int:
        """Return the bytes of its caches on a device."""

    def share_to_come(self, device: str) -> float:
        """Return the tokens that its caches on a device may still take in, as a share of the context."""

    def share_offloaded(self, device: str) -> float:
        """As `share_to_come`, of caches that main memory keeps for that device."""

    def offload_cache(self, device: str, layers: Collection[int]) -> bool:
        """Keep its caches of `layers`, which compute on `device`, in main memory; return whether that changed any."""

    def onload_cache(self, device: str, layers: Collection[int]) -> None:
        """Take them back to the device."""
