"""How blocks run on the CPU: compiled kernels for steps of few tokens where they are the faster ones, torch's else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from lyra_emergence.load_report import LoadEvent
from lyra_emergence.runtime.cpu.choice import Choice
from lyra_emergence.runtime.cpu.decoder import agrees, fuse, is_known, passes
from lyra_emergence.runtime.cpu.library import find_library, is_compiled
from lyra_emergence.runtime.cpu.linear import is_quick, matrix_of, quicken
from lyra_emergence.runtime.cpu.packed import PackedProjection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lyra_emergence.runtime.blocks import PlacedBlock
    from lyra_emergence.runtime.cpu.library import Library

__all__ = ["is_sped_up", "speed_up"]

_LEAST_MEASURED = 2**20
"""Bytes of a weight that are worth a measurement: smaller ones stay in the CPU's caches."""

_BEYOND_CACHES = 512 * 2**20
_MOST_LAYERS = 8


def speed_up(model: Any, blocks: Sequence[PlacedBlock], tell: Callable[[LoadEvent], None]) -> None:
    """Let what runs on the CPU use the compiled kernels, where they can be had and where they are faster.

    Weights stay where they are. Blocks that are on an accelerator are left alone.
    """
    here = [block.module for block in blocks if block.device == "cpu" and block.module is not None]
    linears = {module: None for block in here for module in block.modules() if type(module) is nn.Linear}
    taken = [linear for linear in linears if matrix_of(linear.weight, linear.bias) is not None]
    if taken and not is_compiled():
        tell(LoadEvent("compile", "compiling kernels for this CPU; that happens once"))
    if not taken or (library := find_library()) is None:
        return
    choice = Choice(library)
    choice.measure(linear.weight for linear in taken if linear.weight.nbytes >= _LEAST_MEASURED)
    for linear in taken:
        quicken(linear, library, choice.prefers_kernels)
    layers = [block for block in here if is_known(block)]
    if layers and agrees(model, layers[0], library) and _is_fused_faster(model, layers, library, choice):
        for layer in layers:
            fuse(layer, library)


def is_sped_up(model: Any) -> bool:
    """Return whether a part of `model` uses the compiled kernels on the CPU."""
    return any(isinstance(module, PackedProjection) or is_quick(module) for module in model.modules())


def _is_fused_faster(model: Any, layers: Sequence[nn.Module], library: Library, choice: Choice) -> bool:
    """Return whether a token takes less time through layers in one call each; layers that are packed are taken so."""
    weights = [part.weight for part in layers[0].modules() if type(part) is nn.Linear]
    size = sum(weight.nbytes for weight in weights)
    if size < _LEAST_MEASURED:
        return True
    # As many as do not stay in the CPU's caches.
    met = layers[: max(1, min(_MOST_LAYERS, _BEYOND_CACHES // size))]
    shapes = ", ".join("x".join(map(str, weight.shape)) for weight in weights)
    name = f"{type(layers[0]).__name__} {str(weights[0].dtype).removeprefix('torch.')}: {shapes}"
    return choice.prefers(name, *passes(model, met, library))
