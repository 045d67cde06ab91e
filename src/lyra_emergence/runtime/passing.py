"""Copies that a block holds only while it runs.

Weights that are converted on the CPU need memory of their own beside the checkpoint's map. Where that runs out, a block
can do without: it points back at the map, is converted as its module is called, and lets go as the module returns.
That costs a conversion a pass, and the memory of one block at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["Passing"]


class Passing:
    """The hooks of one block.

    Args:
        module: The block's module.
        take: Makes the block hold its copies.
        drop: Makes it point back at the map; called too where the module raises.
        first: Whether `take` is called before what other hooks of the module do by then.
    """

    def __init__(
        self, module: nn.Module, take: Callable[[], Any], drop: Callable[[], Any], *, first: bool = False
    ) -> None:
        def before(*_: Any) -> None:
            take()

        def after(*_: Any) -> None:
            drop()

        self._handles = (
            module.register_forward_pre_hook(before, prepend=first),
            module.register_forward_hook(after, always_call=True),
        )

    def end(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
