"""What a generator has computed so far: its caches, and how many tokens they hold.

Residency moves them with the blocks (`Follower`): keys and values live where their block computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lyra_emergence.errors import is_out_of_memory
from lyra_emergence.runtime.kv_cache import (
    cut_back,
    give_room,
    has_room,
    held_bytes,
    move_layer,
    offload,
    offloading_caches,
    onload,
)
from lyra_emergence.runtime.static_caches import StaticCaches, capacity_for

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["HeldCaches"]

CPU = "cpu"


class HeldCaches:
    """The caches of one generator.

    Args:
        config: transformers' configuration of the model.
        context: Tokens that the plan counted with.
        most_tokens: Tokens that are to come at most.
        batch: Sequences that run together.
        known: Whether they are of classes whose layers can be moved one by one.

    Attributes:
        held: Tokens that they hold.
    """

    def __init__(self, config: Any, context: int, most_tokens: int, batch: int, *, known: bool) -> None:
        self._caches: dict[str, Any] = {}
        self.held = 0
        self._static: StaticCaches | None = None
        self._config = config
        self._context = context
        self._most_tokens = most_tokens
        self._batch = batch
        self._known = known
        self._offloaded: dict[str, frozenset[int]] = {}

    @property
    def caches(self) -> dict[str, Any]:
        """As the model takes them; {} before it made any, and where it has none."""
        if self._static is not None:
            self._static.settle()
            self._static = None
        return self._caches

    @caches.setter
    def caches(self, caches: dict[str, Any]) -> None:
        self._static = None
        self._caches = caches

    @property
    def movable(self) -> bool:
        """Whether each layer's part can be moved by itself."""
        return self._known

    @property
    def offloaded(self) -> bool:
        """Whether those of an accelerator's layers lie in main memory."""
        return bool(self._offloaded)

    def drop(self) -> None:
        """Let all of them go: what they held is computed anew."""
        self.caches, self.held = {}, 0

    def cut_back(self) -> bool:
        """Cut what a pass that failed halfway left back to the tokens held before it; return whether that worked."""
        return cut_back(self.caches, self.held)

    def to_begin_with(self, *, made_ahead: bool = False) -> dict[str, Any]:
        """Return the caches for the next pass; {} where the model makes its own.

        Args:
            made_ahead: Whether they have to be there before the model runs.
        """
        if self.caches or not (self._offloaded or (made_ahead and self._known)):
            return self.caches
        return offloading_caches(self._config, frozenset().union(*self._offloaded.values()))

    def give_room(self, layers: Collection[int]) -> None:
        """Let those of `layers` grow in place, where memory has the room at once; else they grow by copies."""
        try:
            give_room(self.caches, layers, self._most_tokens)
        except Exception as error:
            if not is_out_of_memory(error):
                raise

    @property
    def is_static(self) -> bool:
        """Whether they are in the form that `static` returns."""
        return self._static is not None

    @property
    def room_wanted(self) -> int:
        """Tokens that the static form has room for beyond those that are to come at most."""
        return capacity_for(self._most_tokens, self._context) - self._most_tokens

    def static(self) -> StaticCaches | None:
        """Return the caches in a form whose shapes do not change; None where they have none.

        What adds to it also counts here, with `held`. Whoever takes `caches` ends it.

        Raises:
            RuntimeError: Memory ran out; the caches are as they were, but for where they lie.
        """
        if self._static is None and self.held and self._known and not self._offloaded:
            capacity = capacity_for(self._most_tokens, self._context)
            self._static = StaticCaches.over(self._caches, self._config, self.held, capacity)
        return self._static

    def move_cache(self, layer: int, device: str) -> None:
        """Move a layer's part of the caches, or drop them where that cannot be done; the lock is held."""
        moved = False
        try:
            moved = move_layer(self.caches, layer, device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if not moved:
            self.drop()

    def cached_bytes(self, device: str) -> int:
        """Return the bytes of the caches on a device."""
        return held_bytes(self._caches, device)

    def share_to_come(self, device: str) -> float:
        """Return the tokens that the caches on a device may still take in, as a share of the context."""
        if device in self._offloaded or (device != CPU and has_room(self._caches, device)):
            return 0.0
        return self._to_come()

    def share_offloaded(self, device: str) -> float:
        """As `share_to_come`, of caches that main memory keeps for that device."""
        return self._to_come() if device in self._offloaded else 0.0

    def _to_come(self) -> float:
        return max(0, self._most_tokens - self.held) * self._batch / self._context

    def offload_cache(self, device: str, layers: Collection[int]) -> bool:
        """Keep the caches of `layers`, which compute on `device`, in main memory; the lock is held.

        Returns:
            Whether that was not so before, and can be done for these caches.

        Raises:
            RuntimeError: Main memory ran out.
        """
        if device in self._offloaded or not layers or not self._known:
            return False
        if self.caches and not offload(self.caches, layers):
            return False
        self._offloaded[device] = frozenset(layers)
        return True

    def onload_cache(self, device: str, layers: Collection[int]) -> None:
        """Take them back to the device; where that has no room after all, they are made anew. The lock is held."""
        if self._offloaded.pop(device, None) is None:
            return
        try:
            onload(self.caches, layers)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.drop()
