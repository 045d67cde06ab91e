"""The bytes of each process's share of a model that is divided.

Weights are exact: the model is built without memory (torch's meta device), and each parameter is cut as transformers'
own plan for the architecture says. The cache and the activations are those of the whole model's footprint, with the
heads and the MLP's width that one process has; where the model type is not one of the known ones, activations are the
whole model's, which is too much.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch

from lyra_emergence.activations import estimate_activations
from lyra_emergence.distributed.layout import Layout, check_shape
from lyra_emergence.errors import CheckpointError, ConfigError
from lyra_emergence.footprint import PREFILL_CHUNK
from lyra_emergence.model_shape import ModelShape
from lyra_emergence.runtime.stepping import feeding_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lyra_emergence.checkpoint import CheckpointIndex
    from lyra_emergence.distributed.layout import Seat
    from lyra_emergence.footprint import BlockFootprint, Footprint

__all__ = ["Division", "divide"]

_NUMBER: Final = re.compile(r"\.\d+(?=\.|$)")
_LAST: Final = ("rowwise", "rowwise_rep", "rowwise_split_input", "packed_rowwise")
"""Styles of transformers that cut a matrix along its last dimension and leave biases whole."""
_ROWS: Final = (
    *("colwise", "colwise_rep", "colwise_gather_output", "packed_colwise"),
    *("embedding_rowwise", "embedding_colwise"),
)
"""Styles that cut along the outputs (of a table: its rows or its columns), biases too."""
_KEPT_APART: Final = ("colwise", "packed_colwise")
"""Those of them whose outputs stay apart, so that what comes of them is as narrow."""
_KEYS: Final = ("k_proj", "qkv_proj", "query_key_value", "kv_b_proj")
_WIDTHS: Final = ("intermediate", "expert_width", "shared_width")
_BEFORE_LAYERS: Final = "embedding"
_MATRIX: Final = 2


@dataclass(frozen=True, slots=True)
class Division:
    """A model's parameters and how they are cut.

    Attributes:
        layout: Into what.
        shape: The model's sizes.
        parameters: The shape and the bytes of an element of every parameter, each tied one once.
        styles: transformers' style by parameter or module, "*" for the numbers of layers.
        layers: How many layers there are.
    """

    layout: Layout
    shape: ModelShape
    parameters: Mapping[str, tuple[tuple[int, ...], int]]
    styles: Mapping[str, str]
    layers: int

    @property
    def shares_heads(self) -> bool:
        """Whether processes that share a layer have different heads of its attention."""
        return any(name.rpartition(".")[2] in _KEYS for name in self._kept_apart())

    @property
    def shares_mlp(self) -> bool:
        """Whether processes that share a layer have different parts of its MLP's width."""
        return any(".mlp." in name for name in self._kept_apart())

    def _kept_apart(self) -> Iterator[str]:
        return (name for name, style in self.styles.items() if style in _KEPT_APART)

    def share(self, whole: Footprint, rank: int, *, known: bool) -> Footprint:
        """Return what `rank` has of `whole`.

        Args:
            whole: The whole model's footprint.
            rank: Which process.
            known: Whether the formulas for activations cover the model type.
        """
        seat, size = self.layout.seat(rank), self.layout.tp_size
        cut = size if self.shares_heads and not self.shape.latent else 1
        blocks = tuple(
            self._block(block, whole, seat, cut) for block in whole.blocks if self._holds(block, whole, seat)
        )
        activations = whole.activations
        if known and size > 1:
            activations = estimate_activations(self._narrowed(), whole.context_length, whole.batch, whole.chunk)
            if not any(block.kind == "experts" for block in blocks):
                activations = activations.with_experts_in_layers()
        return replace(whole, blocks=blocks, activations=activations, packing=0, fused=False)

    def _narrowed(self) -> ModelShape:
        heads, size = (self.layout.tp_size if shared else 1 for shared in (self.shares_heads, self.shares_mlp))
        widths = {name: -(-getattr(self.shape, name) // size) for name in _WIDTHS}
        key_heads = self.shape.key_heads if self.shape.latent else self.shape.key_heads // heads
        return replace(self.shape, heads=self.shape.heads // heads, key_heads=key_heads, **widths)

    def _holds(self, block: BlockFootprint, whole: Footprint, seat: Seat) -> bool:
        first, last = seat.stage == 0, seat.stage == self.layout.pp_size - 1
        if block.index is not None:
            return block.index in self.layout.layers(seat.stage, self.layers)
        if block.kind == _BEFORE_LAYERS:
            # The last stage has a copy of a table that its head is tied to.
            return first or (last and any(other.tied_to == block.name for other in whole.blocks))
        return last

    def _block(self, block: BlockFootprint, whole: Footprint, seat: Seat, cut: int) -> BlockFootprint:
        names = [other.name for other in whole.blocks]
        own = (name for name in self.parameters if _block_of(name, names) == block.name)
        weights = sum(self._bytes(name, seat.part) for name in own)
        return replace(
            block, weights=weights, kv_cache=-(-block.kv_cache // cut), mapped=False, home=0, kept=0, packs=False
        )

    def _bytes(self, name: str, part: int) -> int:
        """Return the bytes that one process has of a parameter: as even as possible, rounded up, the last ones less."""
        shape, itemsize = self.parameters[name]
        sizes = list(shape)
        axis = _axis(self._style(name), len(sizes))
        if axis is not None and self.layout.tp_size > 1:
            each = -(-sizes[axis] // self.layout.tp_size)
            sizes[axis] = max(0, min(each, sizes[axis] - part * each))
        return torch.Size(sizes).numel() * itemsize

    def _style(self, name: str) -> str | None:
        generic = _NUMBER.sub(".*", name)
        return self.styles.get(generic) or self.styles.get(generic.rpartition(".")[0])


def _axis(style: str | None, dimensions: int) -> int | None:
    """Return the dimension that a style cuts, None where every process has the parameter whole."""
    if style in _LAST:
        return None if dimensions < _MATRIX else dimensions - 1
    if style == "embedding_rowwise":
        return 0
    if style == "embedding_colwise":
        return 1
    return max(0, dimensions - _MATRIX) if style in _ROWS else None


def _block_of(parameter: str, blocks: list[str]) -> str | None:
    """Return the innermost of `blocks` that a parameter lies in."""
    around = (name for name in blocks if parameter == name or parameter.startswith(f"{name}."))
    return max(around, key=len, default=None)


def divide(index: CheckpointIndex, layout: Layout, dtype: str, *, trust_remote_code: bool = False) -> Division:
    """Return how a checkpoint's model is cut.

    Args:
        index: The checkpoint.
        layout: Into what it is divided.
        dtype: torch's name of the dtype that it computes in.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Raises:
        CheckpointError: transformers cannot build the model.
        ConfigError: transformers has no plan for the architecture, or its heads or layers cannot be divided.
    """
    from lyra_emergence.runtime.trial_forward import UntriedError, build_without_memory

    try:
        model = build_without_memory(index, getattr(torch, dtype), trust_remote_code=trust_remote_code)
    except UntriedError as error:
        raise CheckpointError(f"{index.name} cannot be divided: {error}") from error
    shape = ModelShape.read(index, itemsize=getattr(torch, dtype).itemsize)
    styles = dict(_plan(model, layout))
    parameters = {name: (tuple(p.shape), p.element_size()) for name, p in model.named_parameters()}
    division = Division(layout, shape, parameters, styles, len(index.layers))
    check_shape(layout, shape, len(index.layers), shares_heads=division.shares_heads)
    return division


def _plan(model: Any, layout: Layout) -> Iterator[tuple[str, str]]:
    """Yield the architecture's plan for sharing layers, having checked that it has those that the layout needs.

    Raises:
        ConfigError: It has none.
    """
    import transformers

    name, release = type(model).__name__, f"transformers {transformers.__version__}"
    styles: dict[str, str] = dict(getattr(model, "_tp_plan", None) or {})
    if layout.tp_size > 1 and not styles:
        raise ConfigError(
            f"in 'distributed.tp_size': {release} cannot share the layers of {name} between processes",
            hint="'pp_size' gives each process some of the layers instead" if _has_stages(model) else _ONE_PROCESS,
        )
    if layout.pp_size > 1 and not _has_stages(model):
        raise ConfigError(
            f"in 'distributed.pp_size': {release} cannot give the layers of {name} to processes in turn",
            hint="'tp_size' shares each layer instead" if styles else _ONE_PROCESS,
        )
    yield from styles.items() if layout.tp_size > 1 else ()


_ONE_PROCESS: Final = "run it in one process, without 'distributed'"


def _has_stages(model: Any) -> bool:
    """Return whether transformers' stages fit the model: the names that they look for, and caches that can be cut."""
    base = getattr(model, model.base_model_prefix, None)
    named = all(hasattr(base, name) for name in ("embed_tokens", "layers", "norm")) and hasattr(model, "lm_head")
    return bool(getattr(model, "_pp_plan", None)) and named and feeding_of(model, PREFILL_CHUNK).chunk is not None
