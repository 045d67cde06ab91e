"""The blocks of a loaded model: each holds copies of its tensors on one device, or points at the checkpoint's map.

A promotion makes every copy first and swaps them in afterwards, so that running out of memory in the middle leaves
the block as it was. A demotion drops the copies and points back at the map: it allocates nothing and cannot fail,
except where the block's CPU form is not the stored one (converted or quantized weights).
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from lyra_emergence.errors import CheckpointError
from lyra_emergence.main_memory import require
from lyra_emergence.runtime.compute_threads import settle_for_fewer_threads
from lyra_emergence.runtime.passing import Passing
from lyra_emergence.runtime.quantized import quantized_module, replaces
from lyra_emergence.runtime.side_by_side import side_by_side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from lyra_emergence.packing import Quantization
    from lyra_emergence.runtime.cpu.packed_store import PackedStore

__all__ = ["REST", "LoadedForm", "PlacedBlock", "split_into_blocks"]

REST = ""
"""The name of the block that holds what no block of the checkpoint claims, such as rotary tables."""
COPY_THREADS = 4
"""Tensors of a block that are copied at once."""


@dataclass(frozen=True, slots=True)
class LoadedForm:
    """How weights look once loaded.

    Attributes:
        dtype: What floating-point parameters are converted to.
        stored: What they are in the checkpoint's map.
        quantization: How projections of layers are packed, or None.
        cpu_kernels: Whether those on the CPU are packed for Lyra's own kernels, where there are any.
    """

    dtype: torch.dtype
    stored: torch.dtype
    quantization: Quantization | None
    cpu_kernels: bool = False


class _Copies:
    """Copies by (home tensor, device), so that tied weights on one device share one copy."""

    def __init__(self, form: LoadedForm) -> None:
        self._form = form
        self._alive: weakref.WeakValueDictionary[tuple[int, str], torch.Tensor] = weakref.WeakValueDictionary()

    def get(self, homes: Sequence[torch.Tensor], device: str) -> list[torch.Tensor]:
        """Return each of `homes` on `device` in the loaded form, copied where no copy is alive and one is needed."""
        wanted = {id(home): home for home in homes if device != "cpu" or self._is_converted(home)}
        alive = {key: copy for key in wanted if (copy := self._alive.get((key, device))) is not None}
        missing = [home for key, home in wanted.items() if key not in alive]
        # Pages of the map fault in while others are copied: one thread waits for them, several do not.
        made = side_by_side(partial(self._copy, device=device), missing, COPY_THREADS)
        for home, copy in zip(missing, made, strict=True):
            alive[id(home)] = self._alive[id(home), device] = copy
        return [alive.get(id(home), home) for home in homes]

    def _is_converted(self, home: torch.Tensor) -> bool:
        return isinstance(home, nn.Parameter) and home.is_floating_point() and home.dtype != self._form.dtype

    def _copy(self, home: torch.Tensor, device: str) -> torch.Tensor:
        settle_for_fewer_threads()
        data = home.detach()
        if device == "cpu":
            require(data.numel() * self._form.dtype.itemsize, "a copy of a weight in another form")
        data = (data.to(self._form.dtype) if self._is_converted(home) else data).to(device)
        return nn.Parameter(data, requires_grad=False) if isinstance(home, nn.Parameter) else data


@dataclass(frozen=True, slots=True)
class _Slot:
    """A place in a module that holds a tensor, and the tensor that the checkpoint's map has for it."""

    module: nn.Module
    leaf: str
    home: torch.Tensor

    def hold(self, tensor: torch.Tensor) -> None:
        setattr(self.module, self.leaf, tensor)


@dataclass(frozen=True, slots=True)
class _Projection:
    """A place in a block that holds a projection which quantization replaces as a whole."""

    parent: nn.Module
    leaf: str
    path: str
    home: nn.Module


@dataclass(frozen=True, slots=True)
class _Streaming:
    """That a block's weights are read as it runs: its hooks, and what is called when that is over."""

    passing: Passing
    end: Callable[[], None]


class PlacedBlock:
    """One block of a loaded model.

    Attributes:
        name: The name that the plan uses.
        module: The module itself; None for the rest block.
        around: The name of the block whose module this one's lies in, such as the layer of experts; else None.
        device: Where its tensors are: torch's device name.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module | None,
        slots: Sequence[_Slot],
        copies: _Copies,
        form: LoadedForm,
        *,
        around: str | None = None,
        store: PackedStore | None = None,
    ) -> None:
        self.name = name
        self.module = module
        self.around = around
        self.device = "cpu"
        self._copies = copies
        self._form = form
        self._store = store
        own = {id(slot.home) for slot in slots}
        found = _projections(module) if module is not None and form.quantization else ()
        self._projections = tuple(p for p in found if all(id(home) in own for home in p.home.parameters()))
        packed = {id(parameter) for p in self._projections for parameter in p.home.parameters()}
        self._slots = tuple(slot for slot in slots if id(slot.home) not in packed)
        self._at_home = True
        self._passing: Passing | None = None
        self._streaming: _Streaming | None = None

    @property
    def homes(self) -> tuple[torch.Tensor, ...]:
        """The tensors that the checkpoint's map has for it."""
        return tuple(slot.home for slot in self._slots)

    @property
    def mapped(self) -> bool:
        """Whether every weight is the checkpoint's own map, which costs no memory of its own."""
        return self._at_home and self._cpu_form_is_home()

    def _cpu_form_is_home(self) -> bool:
        if self._projections:
            return False
        return all(
            not (isinstance(slot.home, nn.Parameter) and slot.home.is_floating_point())
            or slot.home.dtype == self._form.dtype
            for slot in self._slots
        )

    def move_to(self, device: str) -> int:
        """Hold the block's tensors on `device` in the loaded form, and return the bytes that were copied.

        Raises:
            RuntimeError: Memory ran out; the block is as it was.
        """
        if device == "cpu" and self._cpu_form_is_home():
            self._go_home()
            return 0
        if device == self.device and not self._at_home:
            return 0
        copied = self._take(device)
        self._end_passing()
        self.end_streaming()
        return copied

    def stream(
        self,
        take: Callable[[], Mapping[int, torch.Tensor] | None],
        leave: Callable[[], bool],
        end: Callable[[], None],
    ) -> None:
        """Run from buffers that hold its weights only while its module runs; `move_to` an accelerator ends that.

        Args:
            take: Returns what stands for its home tensors, by their ids, until `leave`; None to run from the map.
            leave: Gives that back; returns whether nobody else uses it.
            end: Called once that is over.
        """
        assert self.module is not None  # what has none is not streamed
        self._streaming = _Streaming(Passing(self.module, partial(self._hold, take), partial(self._let_go, leave)), end)

    def _hold(self, take: Callable[[], Mapping[int, torch.Tensor] | None]) -> None:
        tensors = take()
        for slot in self._slots if tensors else ():
            slot.hold(tensors.get(id(slot.home), slot.home))  # type: ignore[union-attr]

    def _let_go(self, leave: Callable[[], bool]) -> None:
        # Another thread may be in the middle of the same block.
        if leave() and self._at_home:
            self._go_home()

    def end_streaming(self) -> None:
        """Run from the map, or from copies, from now on."""
        if self._streaming is not None:
            self._streaming.passing.end()
            self._streaming.end()
            self._streaming = None

    @property
    def passing(self) -> bool:
        """Whether it holds copies only while it runs."""
        return self._passing is not None

    def pass_copies(self) -> bool:
        """Run on the CPU from now on, and hold the copies that this takes only while the module runs.

        `move_to` ends that, once the copies are made.

        Returns:
            Whether that can be done and was not so before: not without a module of its own, nor with packed weights,
            nor where the map is what runs.
        """
        if self.module is None or self._passing is not None or self._projections or self._cpu_form_is_home():
            return False
        self._go_home()
        self._passing = Passing(self.module, lambda: self._take("cpu"), self._go_home)
        return True

    def _take(self, device: str) -> int:
        copies = self._copies.get([slot.home for slot in self._slots], device)
        tensors = list(zip(self._slots, copies, strict=True))
        store = self._store if device == "cpu" and self._projections else None
        kept = store.read(self.name) if store is not None else {}
        modules = [(p, quantized_module(p.home, self._form, device, kept.get(p.path))) for p in self._projections]
        for slot, tensor in tensors:
            slot.hold(tensor)
        for projection, module in modules:
            setattr(projection.parent, projection.leaf, module)
        self.device = device
        self._at_home = False
        if store is not None:
            store.keep(self.name, {projection.path: module for projection, module in modules})
        copied = sum(tensor.nbytes for slot, tensor in tensors if tensor is not slot.home)
        made = (module for _, module in modules if not getattr(module, "mapped", False))
        return copied + sum(p.nbytes for module in made for p in module.parameters())

    def release(self) -> None:
        """Point back at the checkpoint's map in its stored form, dropping every copy."""
        self._end_passing()
        self.end_streaming()
        self._go_home()

    def _end_passing(self) -> None:
        if self._passing is not None:
            self._passing.end()
            self._passing = None

    def _go_home(self) -> None:
        for slot in self._slots:
            slot.hold(slot.home)
        for projection in self._projections:
            setattr(projection.parent, projection.leaf, projection.home)
        self.device = "cpu"
        self._at_home = True


def _projections(module: nn.Module) -> Iterator[_Projection]:
    for place, parent in module.named_modules():
        for leaf, child in parent.named_children():
            if replaces(child):
                yield _Projection(parent, leaf, f"{place}.{leaf}" if place else leaf, child)


def split_into_blocks(
    model: nn.Module, names: Iterable[tuple[str, str]], form: LoadedForm, packed: PackedStore | None = None
) -> tuple[PlacedBlock, ...]:
    """Divide a model into the blocks of its plan.

    Args:
        model: The model, its tensors mapped from the checkpoint.
        names: (name, kind) of every block of the plan.
        form: How weights look once loaded.
        packed: Where packed weights are kept from load to load, if they are.

    Returns:
        The plan's blocks in order, without those "other" ones that the model does not build (a vision tower, layers
        for multi-token prediction), then the rest block. Experts without a module of their own stay with their layer.

    Raises:
        CheckpointError: A block of the checkpoint has no module in the model.
    """
    kinds = dict(names)
    modules: dict[str, tuple[str, nn.Module]] = {}
    for name, kind in kinds.items():
        place = _find_experts(name, modules) if kind == "experts" else _find_module(model, name, kind)
        if place is not None:
            modules[name] = place
    owners = {path: name for name, (path, _) in modules.items()}
    slots: dict[str, list[_Slot]] = {name: [] for name in (*modules, REST)}
    for path, slot in _slots(model):
        slots[_owner(path, owners)].append(slot)
    copies = _Copies(form)
    plain = LoadedForm(form.dtype, form.stored, None)
    blocks = [
        PlacedBlock(
            name,
            module,
            slots[name],
            copies,
            form if kinds[name] == "layer" else plain,
            around=_owner(path, owners) or None,
            store=packed,
        )
        for name, (path, module) in modules.items()
    ]
    return (*blocks, PlacedBlock(REST, None, slots[REST], copies, plain))


def _find_module(model: nn.Module, name: str, kind: str) -> tuple[str, nn.Module] | None:
    """Find a checkpoint's module in the model: by its path, whose base prefix either may lack, else by its role."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    for path in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        with contextlib.suppress(AttributeError):
            return path, model.get_submodule(path)
    # transformers renames some modules on load: GPT-NeoX's "embed_out" is its "lm_head".
    getter = {"head": "get_output_embeddings", "embedding": "get_input_embeddings"}.get(kind)
    module = getattr(model, getter)() if getter else None
    if module is not None:
        return next(path for path, candidate in model.named_modules() if candidate is module), module
    if kind == "other":
        return None
    raise CheckpointError(
        f"the checkpoint's block '{name}' has no module in {type(model).__name__}",
        hint="check that config.json's architecture is the one that the weights were saved from",
    )


def _find_experts(name: str, modules: dict[str, tuple[str, nn.Module]]) -> tuple[str, nn.Module] | None:
    """Find a layer's experts within its module: transformers may call what is between them otherwise."""
    layer = next((known for known in reversed(modules) if name.startswith(f"{known}.")), None)
    if layer is None:
        return None
    path, around = modules[layer]
    inside = name.removeprefix(f"{layer}.")
    places = {place: module for place, module in around.named_modules() if place.rpartition(".")[2] == "experts"}
    chosen = inside if inside in places else next(iter(places)) if len(places) == 1 else None
    return None if chosen is None else (f"{path}.{chosen}", places[chosen])


def _slots(model: nn.Module) -> Iterator[tuple[str, _Slot]]:
    for path, module in model.named_modules(remove_duplicate=True):
        direct = (*module.named_parameters(recurse=False, remove_duplicate=False), *module.named_buffers(recurse=False))
        for leaf, tensor in direct:
            yield (f"{path}.{leaf}" if path else leaf), _Slot(module, leaf, tensor)


def _owner(path: str, owners: dict[str, str]) -> str:
    """Return the block whose module is the nearest one around the tensor at `path`."""
    while path:
        path = path.rpartition(".")[0]
        if path in owners:
            return owners[path]
    return REST
