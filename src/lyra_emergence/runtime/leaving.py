"""The order in which blocks leave a device that is short of memory: that of what they cost.

Lookups first, of which a token reads a row; experts, of which it reads a few; layers from the last one; then norm, head
and the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lyra_emergence.runtime.blocks import REST

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from lyra_emergence.placement import Placement
    from lyra_emergence.runtime.blocks import PlacedBlock

__all__ = ["leaving_order"]


def leaving_order(
    blocks: Mapping[str, PlacedBlock], placements: Mapping[str, Placement], device: str, shared: Collection[str]
) -> Iterator[str]:
    """Yield the names of the blocks on `device`, the first to leave first.

    Args:
        blocks: Every block with its present device, in execution order.
        placements: Where the plan has them.
        device: The device that is short of memory.
        shared: Blocks whose weights others use too: an embedding of them is no mere lookup.
    """
    here = [name for name, block in blocks.items() if block.device == device and name != REST]
    kinds = {name: placements[name].kind for name in here}
    lookups = [name for name in here if kinds[name] == "embedding" and name not in shared]
    yield from lookups
    for kind in ("experts", "layer"):
        yield from (name for name in reversed(here) if kinds[name] == kind)
    yield from (name for name in here if kinds[name] not in ("experts", "layer") and name not in lookups)
    if blocks[REST].device == device:
        yield REST
