"""Where the blocks of a loaded model are now, and moving them while it is in use.

Memory that ran out takes blocks from an accelerator to the CPU, and free memory brings them back to where they were
loaded. A block takes its part of every running generator's caches along: keys and values live where their block
computes. All of it happens between steps, under the model's lock.

Which leave first: `leaving.py`.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lyra_emergence.errors import is_out_of_memory, without_frames
from lyra_emergence.guests import DEFAULT_LEAST_TOKENS
from lyra_emergence.plan import hf_device
from lyra_emergence.runtime.guests import Guests, find_guests
from lyra_emergence.runtime.leaving import leaving_order
from lyra_emergence.runtime.memory import free_bytes, give_back
from lyra_emergence.runtime.prompt_cache import PromptCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lyra_emergence.placement import Placement
    from lyra_emergence.plan import Plan
    from lyra_emergence.runtime.blocks import PlacedBlock
    from lyra_emergence.runtime.follower import Follower
    from lyra_emergence.runtime.handover import Handover
    from lyra_emergence.runtime.streaming import Stream

__all__ = ["CPU", "Residency"]

CPU = "cpu"
_LONGEST_WAIT = 4096
"""Steps between two tries to bring blocks back, at most."""
_FIRST_WAIT = 32


@dataclass(frozen=True, slots=True)
class _Moved:
    """A block that left the device it was loaded on."""

    name: str
    home: str


class Residency:
    """The blocks of one model and their present devices.

    Args:
        model: The transformers model.
        plan: What it was loaded by.
        blocks: Its blocks, as loading left them.
        handover: The hooks between devices.
        least_tokens: Tokens of a pass from which accelerators run the guests that the plan has for them.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        blocks: Sequence[PlacedBlock],
        handover: Handover,
        least_tokens: int = DEFAULT_LEAST_TOKENS,
    ) -> None:
        self._model = model
        self._plan = plan
        self._blocks = {block.name: block for block in blocks}
        self._handover = handover
        self._placements = {p.block: p for p in plan.placements if p.block in self._blocks}
        layers = ((block.name, block.index) for block in plan.footprint.blocks if block.name in self._blocks)
        self._layers = {name: at for name, at in layers if at is not None and self._placements[name].kind == "layer"}
        self._shared = frozenset(block.tied_to for block in plan.footprint.blocks if block.tied_to)
        self._followers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._away: list[_Moved] = []
        self._offloaded: set[str] = set()
        self._wait, self._steps, self._climbed = _FIRST_WAIT, 0, False
        self._guests: tuple[Guests, ...] | None = None  # as the blocks are; None where that was not asked yet
        self.least_tokens = least_tokens
        self.stream: Stream | None = None  # feeds the blocks that are streamed; closed with them
        self._connect()

    @property
    def entry(self) -> str:
        """The device that token ids go to: the input embeddings'."""
        names = (p.block for p in self._placements.values() if p.kind == "embedding")
        return next((self._blocks[name].device for name in names), CPU)

    @property
    def accelerators(self) -> tuple[str, ...]:
        """The accelerators that hold blocks now."""
        return tuple(dict.fromkeys(block.device for block in self._blocks.values() if block.device != CPU))

    @property
    def alone_on(self) -> str | None:
        """The accelerator that holds every block and every cache now; None where there is none."""
        devices = {block.device for block in self._blocks.values()}
        return None if self._offloaded or CPU in devices or len(devices) > 1 else devices.pop()

    @property
    def uses_main_memory(self) -> bool:
        """Whether blocks run on the CPU, or caches of others lie in main memory."""
        return bool(self._running_on(CPU) or self._offloaded)

    @property
    def layers(self) -> int:
        """The number of layers, wherever they are."""
        return max(1, len(self._layers))

    @property
    def away(self) -> tuple[str, ...]:
        """The blocks that left the device they were loaded on, in the order they left."""
        return tuple(moved.name for moved in self._away)

    def add(self, follower: Follower) -> None:
        """Move the caches of `follower` along from now on, for as long as it lives."""
        self._followers.add(follower)

    def give_up_kept(self, but: PromptCache | None) -> None:
        """Let every conversation but one give up what it kept of its last answer: the plan has room for one context."""
        for follower in tuple(self._followers):
            if isinstance(follower, PromptCache) and follower is not but:
                follower.drop()

    def shortfall(self, device: str) -> int:
        """Return the bytes that running what is on `device` may want beyond what is free there; 0 where it fits."""
        return max(0, self._wanted(device) - free_bytes(device))

    def has_room_for(self, device: str, tokens: int) -> bool:
        """Return whether a device has room for the caches of `tokens` tokens beside all that may be wanted there."""
        kv_cache = sum(p.kv_cache for p in self._running_on(device))
        return kv_cache * tokens // self._plan.context_length + self._wanted(device) <= free_bytes(device)

    def _wanted(self, device: str) -> int:
        """Temporaries at their most, and what the caches of all followers may still grow by."""
        here = self._running_on(device)
        kv_cache = sum(p.kv_cache for p in here)
        to_come = int(kv_cache * sum(follower.share_to_come(device) for follower in self._followers))
        # What a conversation kept is taken over by its next answer, or given up for another.
        kept = sum(follower.cached_bytes(device) for follower in self._followers if isinstance(follower, PromptCache))
        return self._activations(here, kv_cache) + max(0, to_come - kept)

    def _running_on(self, device: str) -> list[Placement]:
        return [p for name, p in self._placements.items() if self._blocks[name].device == device]

    def wanted_main_memory(self, share: float = 1.0) -> int:
        """Return the bytes of main memory that running the model may want on top of what it has.

        Args:
            share: Of what a whole chunk of a prompt takes in temporaries, what those to come do.
        """
        kv_cache = sum(p.kv_cache for p in self._running_on(CPU))
        wanted = int(kv_cache * sum(follower.share_to_come(CPU) for follower in self._followers))
        for device in self._offloaded:
            cached = sum(p.kv_cache for p in self._running_on(device))
            wanted += int(cached * sum(follower.share_offloaded(device) for follower in self._followers))
        return wanted + self.temporaries_in_main_memory(share)

    def temporaries_in_main_memory(self, share: float = 1.0) -> int:
        """Return the bytes of temporaries that blocks on the CPU make at their most, or a share of it."""
        here = self._running_on(CPU)
        return int(share * self._activations(here, sum(p.kv_cache for p in here), on_cpu=True))

    def cached_per_token(self) -> int:
        """Return the bytes of main memory that caches grow by with a token of one sequence, full attention assumed."""
        kept = sum(p.kv_cache for device in (CPU, *self._offloaded) for p in self._running_on(device))
        return kept // self._plan.context_length

    def _activations(self, here: Sequence[Placement], kv_cache: int, *, on_cpu: bool = False) -> int:
        parts = {kind: True for kind in ("embedding", "layer", "experts", "head") if any(p.kind == kind for p in here)}
        return self._plan.footprint.activations.of(**parts, kv_cache=kv_cache, on_cpu=on_cpu)

    def step_down(self, device: str, short: int, least: int = 1, *, but_one: bool = False) -> tuple[str, ...]:
        """Move blocks from `device` to the CPU until `short` bytes are freed there, and at least `least` blocks.

        Args:
            device: The device that is short of memory.
            short: Bytes to free.
            least: Blocks to move at least.
            but_one: Leave one layer there, and what leaves after it.

        Returns:
            The blocks moved; () where none is left to move.

        Raises:
            RuntimeError: Main memory has no room for a block whose CPU form is a copy.
        """
        leaving: list[str] = []
        order = list(leaving_order(self._blocks, self._placements, device, self._shared))
        if but_one:
            order = order[: max((at for at, name in enumerate(order) if name in self._layers), default=len(order))]
        for name in order:
            if short <= 0 and len(leaving) >= least:
                break
            leaving.append(name)
            short -= self._bytes_on(name, device)
        for name in leaving:
            self._move_to_cpu(self._blocks[name])
            self._away.append(_Moved(name, device))
            self._move_caches(name, CPU)
        if leaving:
            self._connect()
            give_back()
            self._fell_short()
        return tuple(leaving)

    def _move_to_cpu(self, block: PlacedBlock) -> None:
        """Move a block; where main memory has no room for its copies, let it hold them only while it runs.

        Raises:
            RuntimeError: There is no room, and it cannot run that way.
        """
        failure: BaseException | None = None
        try:
            block.move_to(CPU)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = without_frames(error)
        if failure is not None and not self._pass_copies_of(block):
            raise failure

    def pass_copies(self) -> bool:
        """Let blocks on the CPU hold copies of converted weights only while they run.

        Returns:
            Whether that dropped any.
        """
        here = [block for block in self._blocks.values() if block.device == CPU]
        passed = [self._pass_copies_of(block) for block in here]
        self._fell_short()
        return any(passed)

    def _pass_copies_of(self, block: PlacedBlock) -> bool:
        # What else is called by its module alone? Lookups may be read without a call, and the rest has no module.
        kind = self._placements[block.name].kind if block.name in self._placements else ""
        return kind in ("layer", "experts", "head") and block.pass_copies()

    def _hold_copies(self) -> None:
        """Make copies on the CPU that are held for good again, where main memory has room for all of them."""
        passing = [name for name, block in self._blocks.items() if block.passing]
        weights = sum(self._placements[name].weights for name in passing)
        if not passing or weights + self.wanted_main_memory() > free_bytes(CPU):
            return
        self._climbed = True
        try:
            for name in passing:
                self._blocks[name].move_to(CPU)
        except Exception as error:
            if not is_out_of_memory(error):
                raise

    def offload_caches(self, device: str) -> bool:
        """Keep the caches of the layers on `device` in main memory from now on, for every running generator.

        Returns:
            Whether that moved any.
        """
        layers = self.layers_on(device)
        moved = [follower.offload_cache(device, layers) for follower in self._followers]
        self._offloaded |= {device} if any(moved) else set()
        self._fell_short()
        return any(moved)

    def layers_on(self, device: str) -> frozenset[int]:
        """Return the numbers of the layers on a device."""
        return frozenset(at for name, at in self._layers.items() if self._blocks[name].device == device)

    def _fell_short(self) -> None:
        # Memory that runs out again once blocks are back is somebody else's now and then: wait longer.
        self._wait = min(_LONGEST_WAIT, 2 * self._wait) if self._climbed else self._wait
        self._steps, self._climbed = 0, False

    def _bytes_on(self, name: str, device: str) -> int:
        index = self._layers.get(name)
        cached = sum(follower.cached_bytes(device) for follower in self._followers) if index is not None else 0
        layers = max(1, sum(self._blocks[layer].device == device for layer in self._layers if layer in self._blocks))
        weights = self._placements[name].weights if name in self._placements else 0
        return weights + cached // layers

    def climb(self) -> tuple[str, ...]:
        """Bring blocks back to where they were loaded, the last to leave first, as far as there is room now.

        Returns:
            The blocks brought back.
        """
        back: list[str] = []
        while self._away and self._has_room(self._away[-1]):
            moved = self._away[-1]
            if not self._bring_back(moved):
                break
            self._away.pop()
            back.append(moved.name)
        if back:
            self._climbed = True
            self._connect()
        if not self._away:
            self._onload_caches()
        self._hold_copies()
        return tuple(back)

    def _onload_caches(self) -> None:
        """Bring caches back from main memory, where a device has room for them whole."""
        for device in tuple(self._offloaded):
            here = self._running_on(device)
            whole = sum(p.kv_cache for p in here)
            if len(self._followers) * whole + self._activations(here, whole) > free_bytes(device):
                continue
            self._offloaded.discard(device)
            self._climbed = True
            for follower in self._followers:
                follower.onload_cache(device, self.layers_on(device))

    def rest_then_climb(self) -> tuple[str, ...]:
        """Count a step, and climb where enough of them went by since the last try or the last time memory ran out."""
        if not self._away and not self._offloaded and not any(block.passing for block in self._blocks.values()):
            return ()
        self._steps += 1
        if self._steps < self._wait:
            return ()
        self._steps = 0
        return self.climb()

    def _has_room(self, moved: _Moved) -> bool:
        placement = self._placements.get(moved.name)
        weights, kv_cache = (placement.weights, placement.kv_cache) if placement else (0, 0)
        here = self._running_on(moved.home)
        held = sum(follower.cached_bytes(moved.home) for follower in self._followers)
        whole = sum(p.kv_cache for p in here) + kv_cache
        busy = self._activations([*here, placement] if placement else here, whole)
        return bool(weights + max(0, whole - held) + busy <= free_bytes(moved.home))

    def _bring_back(self, moved: _Moved) -> bool:
        stopped = False
        try:
            self._blocks[moved.name].move_to(moved.home)
            self._move_caches(moved.name, moved.home)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            stopped = True
        if stopped:
            self._move_to_cpu(self._blocks[moved.name])
            self._move_caches(moved.name, CPU)
            give_back()
        return not stopped

    def _move_caches(self, name: str, device: str) -> None:
        index = self._layers.get(name)
        if index is not None:
            for follower in self._followers:
                follower.move_cache(index, device)

    def guests(self, tokens: int) -> tuple[Guests, ...]:
        """Return the guests of a pass of `tokens` tokens, all sequences together; () where it is too short for them."""
        if tokens < self.least_tokens:
            return ()
        if self._guests is None:
            self._guests = find_guests(tuple(self._blocks.values()), self._placements, self._layers)
        return self._guests

    def _connect(self) -> None:
        self._guests = None
        blocks = tuple(self._blocks.values())
        self._handover.connect(blocks, self.entry)
        device_map = {block.name: hf_device(block.device) for block in blocks if block.name}
        if len(set(device_map.values())) > 1 or hasattr(self._model, "hf_device_map"):
            # Tells transformers and LangChain that the model is placed, and must not be moved as a whole.
            self._model.hf_device_map = device_map

    def end_step(self) -> None:
        """Drop what was handed over in a step; a Ctrl-C in its middle keeps torch from telling that it ended."""
        self._handover.forget()
        if self.stream is not None:
            self.stream.settle()

    def less_in_main_memory(self) -> str:
        """Let go of copies, else of the buffers of streamed blocks; return in words what was done, "" for nothing."""
        if self.pass_copies():
            return "weights are converted anew each time they run"
        ended = self.stream is not None and self.stream.close()
        return "weights are read from the file page by page" if ended else ""

    def close(self) -> None:
        """Drop every copy on every device, and the hooks."""
        self._handover.disconnect()
        if self.stream is not None:
            self.stream.close()
        self._model = None
        for block in self._blocks.values():
            block.release()
        give_back()
