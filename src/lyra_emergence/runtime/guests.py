"""Blocks of main memory that run on an accelerator for the length of a pass.

The plan says which blocks those are (`Placement.through`), and from how many tokens on it pays (`guests.py`). Their
weights are copied, in the order in which the blocks run, to where two blocks of the same shape have theirs: the hosts.
A thread of the pass's own does that, through pinned memory and on a stream of its own, while the blocks before them
compute. At the end of the pass the hosts have their own weights again; nothing was allocated, and what may fail in
between leaves them whole as well. Keys and values of a guest come and go with it.
"""

from __future__ import annotations

import _thread
import contextlib
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lyra_emergence.errors import is_out_of_memory
from lyra_emergence.guests import HOSTS
from lyra_emergence.runtime.compute_threads import settle_for_fewer_threads
from lyra_emergence.runtime.kv_cache import move_layer
from lyra_emergence.runtime.passing import Passing
from lyra_emergence.runtime.staging import Staging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from lyra_emergence.placement import Placement
    from lyra_emergence.runtime.blocks import PlacedBlock

__all__ = ["Guests", "find_guests"]

_CPU = "cpu"
_LONGEST_BEGINNING = 0.05
"""Seconds that a pass waits for its thread to begin; one that finds no memory for its first step never does."""


@dataclass(slots=True)
class _Place:
    """The memory of a host.

    Attributes:
        host: The number of the block that it belongs to, among those that take part.
        tensors: Its tensors.
        holds: The number of the block whose weights it holds, or is about to.
        loaded: Whether it holds all of them.
        in_use: Whether that block is running.
        used: The event of its last use, before which nothing may be written to it.
        ready: The event at which what it holds is there.
    """

    host: int
    tensors: list[torch.Tensor]
    holds: int
    loaded: bool = True
    in_use: bool = False
    used: Any = None
    ready: Any = None


@dataclass(frozen=True, slots=True)
class _Member:
    """A block that takes part in a pass, guest or host.

    Attributes:
        block: The block.
        layer: The number of the layer whose keys and values come and go with it; None for a host, and for experts.
        shape: What it has in common with its hosts.
    """

    block: PlacedBlock
    layer: int | None
    shape: tuple[object, ...]


def find_guests(
    blocks: Sequence[PlacedBlock], placements: Mapping[str, Placement], layers: Mapping[str, int]
) -> tuple[Guests, ...]:
    """Return the guests of each accelerator, with their hosts, as the blocks are now.

    Args:
        blocks: All blocks, in the order in which they run.
        placements: What was planned, by their names.
        layers: The numbers of layers, by their names.
    """
    shared = Counter(id(home) for block in blocks for home in block.homes)
    able = [block for block in blocks if block.name in placements and all(shared[id(h)] == 1 for h in block.homes)]
    shapes = {block.name: shape for block in able if block.homes and (shape := block.shape()) is not None}
    found = []
    for device in dict.fromkeys(p.through for p in placements.values() if p.through):
        hosts = _hosts([block for block in able if block.device == device], shapes)
        members = [
            _Member(block, layers.get(block.name) if block.device == _CPU else None, shapes[block.name])
            for block in able
            if (block.device == _CPU and placements[block.name].through == device and shapes.get(block.name) in hosts)
            or any(block in some for some in hosts.values())
        ]
        if any(member.block.device == _CPU for member in members):
            wanted = {member.shape for member in members if member.block.device == _CPU}
            found.append(Guests(device, [member for member in members if member.shape in wanted]))
    return tuple(found)


def _hosts(
    here: Sequence[PlacedBlock], shapes: Mapping[str, tuple[object, ...]]
) -> dict[tuple[object, ...], list[PlacedBlock]]:
    """Return the last blocks of each shape on an accelerator."""
    hosts: dict[tuple[object, ...], list[PlacedBlock]] = {}
    for block in here:
        if block.name in shapes:
            hosts[shapes[block.name]] = [*hosts.get(shapes[block.name], []), block][-HOSTS:]
    return hosts


class Guests:
    """The guests and hosts of one accelerator.

    Args:
        device: torch's name of it.
        members: Guests and hosts, in the order in which they run.

    Attributes:
        caches_are_home: Whether the last pass left the guests' keys and values in main memory, where they belong.
    """

    def __init__(self, device: str, members: Sequence[_Member]) -> None:
        self.caches_are_home = True
        self._device = device
        self._members = tuple(members)
        self._staging: Staging | None = None

    @contextlib.contextmanager
    def running(self, caches: Mapping[str, Any]) -> Iterator[None]:
        """Let the guests run on the accelerator while this lasts.

        Args:
            caches: The caches that the pass is given, whose layers `can_move`.

        Raises:
            RuntimeError: There is no pinned memory for the copies.
        """
        if self._staging is None:
            most = max(tensor.nbytes for member in self._members for tensor in member.block.tensors())
            self._staging = Staging(torch.device(self._device), most)
        work = _Pass(self._members, self._staging)
        stays = [_Stay(work, at, member, self._device, caches) for at, member in enumerate(self._members)]
        try:
            for stay in stays:
                stay.begin()
            work.start()
            yield
        finally:
            for stay in stays:
                stay.end()
            work.end()
            self.caches_are_home = _bring_home(caches, [member.layer for member in self._members])


def _bring_home(caches: Mapping[str, Any], layers: Sequence[int | None]) -> bool:
    """Move what a pass that was broken off left on the accelerator; return whether that could be done."""
    try:
        return all(move_layer(caches, layer, _CPU) for layer in layers if layer is not None)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False


class _Stay:
    """One block's part in a pass: its hooks, and what it holds while it runs."""

    def __init__(self, work: _Pass, at: int, member: _Member, device: str, caches: Mapping[str, Any]) -> None:
        self._work = work
        self._at = at
        self._member = member
        self._device = device
        self._caches = caches
        self._hooks: Passing | None = None
        self._leave: Callable[[], None] | None = None

    def begin(self) -> None:
        """Lay the hooks, before those that hand tensors over: these ask where the block runs."""
        assert self._member.block.module is not None  # what has a shape has one
        self._hooks = Passing(self._member.block.module, self._arrive, self._depart, first=True)

    def end(self) -> None:
        """Take the hooks away; a Ctrl-C keeps a block from leaving by itself."""
        if self._hooks is not None:
            self._hooks.end()
        if self._leave is not None:
            self._leave()
            self._leave = None

    def _arrive(self) -> None:
        tensors = self._work.take(self._at)
        if tensors is None:
            return
        self._leave = self._member.block.be_guest(self._device, tensors)
        if self._member.layer is not None:
            move_layer(self._caches, self._member.layer, self._device)

    def _depart(self) -> None:
        if self._leave is None:
            return
        self._leave()
        self._leave = None
        self._work.leave(self._at)
        if self._member.layer is not None:
            move_layer(self._caches, self._member.layer, _CPU)


@dataclass(slots=True)
class _Progress:
    """How far a pass is: blocks before `over` have run, those before `next` are loaded or need not be."""

    over: int = 0
    next: int = 0
    stopped: bool = False
    failure: BaseException | None = None
    threads: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)


class _Pass:
    """One pass: what is copied where, in the order in which the blocks run."""

    def __init__(self, members: Sequence[_Member], staging: Staging) -> None:
        self._members = members
        self._staging = staging
        self._state = _Progress()
        self._places: dict[tuple[object, ...], list[_Place]] = {}
        for at, member in enumerate(members):
            if member.block.device != _CPU:
                self._places.setdefault(member.shape, []).append(_Place(at, member.block.tensors(), at))

    def start(self) -> None:
        """Copy from now on; as long as no thread does, who wants a block's weights copies them."""
        try:
            _thread.start_new_thread(self._run, ())
        except (RuntimeError, MemoryError):
            return
        with self._state.changed:
            self._state.changed.wait_for(lambda: self._state.threads, _LONGEST_BEGINNING)

    def take(self, at: int) -> list[torch.Tensor] | None:
        """Wait for a block's weights, and return the tensors that hold them until `leave`.

        Returns:
            None where the pass runs blocks in another order than the model has them: the rest runs where it lives.

        Raises:
            CheckpointError: They could not be read.
        """
        with self._state.changed:
            self._state.over = max(self._state.over, at)
            self._state.changed.notify_all()
            while not self._state.stopped and self._state.failure is None:
                place = self._holding(at)
                if place is not None and place.loaded:
                    place.in_use = True
                    self._staging.wait(place.ready)
                    return place.tensors
                if place is None and self._state.next > at:
                    break  # it came and went
                if not self._state.threads:
                    self._load_in_this_thread()
                else:
                    self._state.changed.wait()
            if self._state.failure is not None:
                raise self._state.failure
        self.end()
        return None

    def leave(self, at: int) -> None:
        """Say that a block has run: its place is free once the device has computed what it was given."""
        with self._state.changed:
            place = self._holding(at)
            if place is not None:
                place.in_use, place.used = False, self._staging.used()
            self._state.over = max(self._state.over, at + 1)
            self._state.changed.notify_all()

    def end(self) -> None:
        """Stop copying, and give the hosts their own weights back."""
        with self._state.changed:
            self._state.stopped = True
            self._state.changed.notify_all()
            self._state.changed.wait_for(lambda: not self._state.threads)
        for place in (place for places in self._places.values() for place in places):
            if place.in_use:  # a pass that was broken off
                place.in_use, place.used = False, self._staging.used()
            if place.holds != place.host or not place.loaded:
                self._fill(place, place.host)
            self._staging.wait(place.ready)

    def _run(self) -> None:
        with self._state.changed:
            if self._state.stopped:
                return
            self._state.threads = 1
            self._state.changed.notify_all()
        try:
            settle_for_fewer_threads()
            with torch.inference_mode():
                while (job := self._next_job()) is not None:
                    self._load(*job)
        finally:
            with self._state.changed:
                self._state.threads = 0
                self._state.changed.notify_all()

    def _next_job(self) -> tuple[_Place, int] | None:
        """Wait for a place for the next block that is not loaded; None once all are, or the pass is over."""
        state = self._state
        with state.changed:
            while not state.stopped and state.failure is None and state.next < len(self._members):
                job = self._job()
                if job is not None:
                    return job
                if state.next < len(self._members):
                    state.changed.wait()
            return None

    def _job(self) -> tuple[_Place, int] | None:
        """Choose what to copy next, and mark its place; None where there is no place yet. The lock is held."""
        state = self._state
        while state.next < len(self._members) and (state.next < state.over or self._holding(state.next)):
            state.next += 1
        if state.next == len(self._members):
            return None
        at = state.next
        place = next((place for place in self._places[self._members[at].shape] if self._is_free(place, at)), None)
        if place is None:
            return None
        job = place, at
        place.holds, place.loaded = at, False
        state.next += 1
        return job

    def _is_free(self, place: _Place, wanted: int) -> bool:
        """Return whether what a place holds has run, or comes after what is wanted and can be copied again."""
        return not place.in_use and (place.holds < self._state.over or place.holds > wanted)

    def _holding(self, at: int) -> _Place | None:
        return next((place for place in self._places[self._members[at].shape] if place.holds == at), None)

    def _load(self, place: _Place, at: int) -> None:
        failure: BaseException | None = None
        try:
            self._fill(place, at)
        except BaseException as error:  # noqa: BLE001 - it is raised where the block is wanted
            failure = error.with_traceback(None)
        with self._state.changed:
            place.loaded = failure is None
            self._state.failure = self._state.failure or failure
            self._state.changed.notify_all()

    def _load_in_this_thread(self) -> None:
        job = self._job()
        if job is not None:
            self._load(*job)

    def _fill(self, place: _Place, at: int) -> None:
        place.holds, place.loaded = at, False
        with self._members[at].block.in_main_memory() as weights:
            place.ready = self._staging.copy(zip(weights, place.tensors, strict=True), place.used)
        place.loaded = True
