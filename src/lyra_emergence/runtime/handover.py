"""Handing tensors from the device of one block to the device of the next.

Each block's inputs are moved to where the block computes; its output stays there until the next block asks for it, so
that the hidden state crosses a bus only where the plan does. What experts apart from their layer make goes back to it.
Keys and values are made, and stay, where their block computes. Masks and rotary tables, which every layer gets, are
moved once per forward and device. Where a block computes is asked when it runs: it may be a guest (`guests.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from lyra_emergence.runtime.blocks import PlacedBlock

__all__ = ["Handover"]


class Handover:
    """The hooks of one model; `connect` lays them anew after blocks have moved."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []
        # Holds the source beside its copy: an id is only unique while its object lives.
        self._moved: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def connect(self, blocks: Sequence[PlacedBlock], entry: str) -> None:
        """Lay the hooks that the blocks' devices need: none where all are on one device.

        Args:
            blocks: Every block with its present device.
            entry: The device of the input embeddings, where the model's inputs go.
        """
        self.disconnect()
        if len({block.device for block in blocks}) == 1:
            return
        named = {block.name: block for block in blocks}
        for block in blocks:
            if block.module is not None and block.module is not self._model:
                around = named.get(block.around or "")
                for module in _called(block.module):
                    self._attach(module, block, around)
        self._handles.append(self._model.register_forward_pre_hook(self._enter(entry), with_kwargs=True))
        self._handles.append(self._model.register_forward_hook(self._leave, with_kwargs=True, always_call=True))

    def disconnect(self) -> None:
        """Take every hook away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._moved.clear()

    def forget(self) -> None:
        """Drop the copies that were handed over in the last forward, as its end does."""
        self._moved.clear()

    def _attach(self, module: nn.Module, block: PlacedBlock, around: PlacedBlock | None) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            device = torch.device(block.runs_on)
            return _move(args, device), {key: self._move_shared(value, device) for key, value in kwargs.items()}

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if around is not None:
            self._return(module, around)

    def _return(self, module: nn.Module, around: PlacedBlock) -> None:
        """Let what a module within a block makes go on where the rest of that block computes."""

        def after(_: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            return _move(output, torch.device(around.runs_on))

        self._handles.append(module.register_forward_hook(after))

    def _move_shared(self, value: Any, device: torch.device) -> Any:
        if type(value) in (tuple, list):
            return type(value)(self._move_shared(item, device) for item in value)
        if not isinstance(value, torch.Tensor) or _is_on(value, device):
            return value
        key = (id(value), str(device))
        if key not in self._moved:
            self._moved[key] = (value, value.to(device))
        return self._moved[key][1]

    def _enter(self, name: str) -> Any:
        entry = torch.device(name)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            self._moved.clear()
            return _move(args, entry), {key: _move(value, entry) for key, value in kwargs.items()}

        return before

    def _leave(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self._moved.clear()
        source = kwargs.get("input_ids", args[0] if args else None)
        logits = getattr(output, "logits", None)
        # A caller that samples expects the logits beside the tokens it gave.
        if isinstance(source, torch.Tensor) and isinstance(logits, torch.Tensor):
            output.logits = logits.to(source.device)
        return output


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what a forward pass calls: a list of modules is not called, its parts are."""
    if isinstance(module, torch.nn.ModuleList):
        yield from module
    else:
        yield module


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value if _is_on(value, device) else value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_move(item, device) for item in value)
    return value


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    # A device without an ordinal ("cpu", "mps") is the only one of its kind.
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)
