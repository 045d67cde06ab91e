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

from lyra_emergence.main_memory import require
from lyra_emergence.runtime.compute_threads import settle_for_fewer_threads
from lyra_emergence.runtime.passing import Passing
from lyra_emergence.runtime.quantized import quantized_module, replaces
from lyra_emergence.runtime.side_by_side import side_by_side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from lyra_emergence.packing import Quantization
    from lyra_emergence.runtime.cpu.packed_store import PackedStore

__all__ = ["REST", "Copies", "LoadedForm", "PlacedBlock", "Slot"]

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


class Copies:
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

    def like(self, home: torch.Tensor) -> torch.Tensor:
        """Return `home` in the loaded form, in main memory: itself where it has that form."""
        return home.detach().to(self._form.dtype) if self._is_converted(home) else home

    def _copy(self, home: torch.Tensor, device: str) -> torch.Tensor:
        settle_for_fewer_threads()
        if device == "cpu":
            require(home.numel() * self._form.dtype.itemsize, "a copy of a weight in another form")
        data = self.like(home).detach().to(device)
        return nn.Parameter(data, requires_grad=False) if isinstance(home, nn.Parameter) else data


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a module that holds a tensor, and the tensor that the checkpoint's map has for it."""

    module: nn.Module
    leaf: str
    home: torch.Tensor

    def hold(self, tensor: torch.Tensor) -> None:
        """Put a tensor in this place."""
        setattr(self.module, self.leaf, tensor)

    def held(self) -> torch.Tensor:
        """Return the tensor that is in this place now."""
        tensor: torch.Tensor = getattr(self.module, self.leaf)
        return tensor


@dataclass(frozen=True, slots=True)
class _Projection:
    """A place in a block that holds a projection which quantization replaces as a whole."""

    parent: nn.Module
    leaf: str
    path: str
    home: nn.Module


@dataclass(frozen=True, slots=True)
class _Streaming:
    """That a block's weights are read as it runs: its hooks, where they are had, and what is called when it is over."""

    passing: Passing
    take: Callable[[], Mapping[int, torch.Tensor] | None]
    leave: Callable[[], bool]
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
        slots: Sequence[Slot],
        copies: Copies,
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
        self._guest_on: str | None = None

    @property
    def runs_on(self) -> str:
        """The device that computes it now: of a guest, not the one where its weights stay."""
        return self._guest_on or self.device

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
        passing = Passing(self.module, partial(self._hold, take), partial(self._let_go, leave))
        self._streaming = _Streaming(passing, take, leave, end)

    def _hold(self, take: Callable[[], Mapping[int, torch.Tensor] | None]) -> None:
        if self._guest_on is not None:
            return
        tensors = take()
        for slot in self._slots if tensors else ():
            slot.hold(tensors.get(id(slot.home), slot.home))  # type: ignore[union-attr]

    def _let_go(self, leave: Callable[[], bool]) -> None:
        # Another thread may be in the middle of the same block.
        if self._guest_on is None and leave() and self._at_home:
            self._go_home()

    def end_streaming(self) -> None:
        """Run from the map, or from copies, from now on."""
        if self._streaming is not None:
            self._streaming.passing.end()
            self._streaming.end()
            self._streaming = None

    def shape(self) -> tuple[object, ...] | None:
        """Return what two blocks have in common where one can run in the other's memory.

        None where that cannot be: packed weights have another form on each device, and what passes has none of its own.
        """
        held = [slot.held() for slot in self._slots]
        if self.module is None or self._projections or self._passing or not all(t.is_contiguous() for t in held):
            return None
        kinds = ((type(slot.module).__name__, slot.leaf) for slot in self._slots)
        return tuple((*kind, tensor.shape, tensor.dtype) for kind, tensor in zip(kinds, held, strict=True))

    def tensors(self) -> list[torch.Tensor]:
        """Return what it holds now, in an order that blocks of one `shape` share."""
        return [slot.held() for slot in self._slots]

    @contextlib.contextmanager
    def in_main_memory(self) -> Iterator[Iterable[torch.Tensor]]:
        """Yield its weights in main memory, in the order of `tensors`: those that are streamed, while this lasts.

        Raises:
            CheckpointError: They cannot be read.
        """
        taken = self._streaming.take() if self._streaming is not None else None
        try:
            if taken is not None:
                yield [taken.get(id(slot.home), slot.home) for slot in self._slots]
            else:
                yield self.tensors() if self.device == "cpu" else (self._copies.like(slot.home) for slot in self._slots)
        finally:
            if taken is not None and self._streaming is not None:
                self._streaming.leave()

    def be_guest(self, device: str, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        """Run on `device` from `tensors`, which hold its weights there; return what ends that."""
        own = self.tensors()

        def end() -> None:
            self._guest_on = None
            self._put(own)

        self._guest_on = device
        self._put(tensors)
        return end

    def _put(self, tensors: Sequence[torch.Tensor]) -> None:
        for slot, tensor in zip(self._slots, tensors, strict=True):
            slot.hold(tensor)

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
