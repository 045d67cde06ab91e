"""Checking a plan against the machine: load, run the longest prompt and a few tokens, measure what each device took.

Accelerators are measured by their allocators' own counts of tensors, which are exact. Main memory is measured as the
private pages of this process (`RssAnon` of Linux), looked at every half millisecond by a process of its own, since the
kernel keeps no peak of it. Weights that are a map of the file are no private pages and not in the figure.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyra_emergence.errors import DoesNotFitError
from lyra_emergence.framework import kernel_buffers, private_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from lyra_emergence.config import ModelConfig
    from lyra_emergence.load_report import LoadEvent
    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.plan import Plan

__all__ = ["DeviceCheck", "PlanCheck", "check_plan"]

JSON_FORMAT = "lyra.check/1"
_NEW_TOKENS = 4
_STRIDE = 7919
"""A prime: the prompt takes its tokens from all over the vocabulary."""
_PEAK_MARGIN_SHARE, _PEAK_MARGIN = 0.02, 16 * 2**20


@dataclass(frozen=True, slots=True)
class DeviceCheck:
    """One device, predicted and measured, in bytes.

    Attributes:
        device: torch's device name.
        predicted: The most that the plan says: weights, KV cache and activations; in main memory the private part of
            them and the kernels' buffers.
        measured: The most that was taken; None where the device keeps no count.
        weights_predicted: Weights there, without those that are a map of the file.
        weights_measured: What was taken once they were loaded.
        mapped: Weights there that are a map of the file.
    """

    device: str
    predicted: int
    measured: int | None
    weights_predicted: int
    weights_measured: int | None
    mapped: int = 0

    @property
    def off(self) -> int | None:
        """Predicted less measured: what was planned for and not taken; negative where too little was planned."""
        return None if self.measured is None else self.predicted - self.measured

    @property
    def holds(self) -> bool | None:
        """Whether no more was taken than planned, and at most 2% or 16 MiB less, whichever is more."""
        if self.measured is None or self.off is None:
            return None
        return 0 <= self.off <= max(_PEAK_MARGIN_SHARE * self.measured, _PEAK_MARGIN)


@dataclass(frozen=True, slots=True)
class PlanCheck:
    """What a check found.

    Attributes:
        plan: The plan that was checked.
        rung: The rung that the model was loaded at.
        devices: One for each device that holds something, main memory last.
        prompt_tokens: Tokens of the prompt: all that the context has room for but the new ones.
        new_tokens: Tokens generated after it.
        load_seconds: Loading.
        prefill_seconds: The prompt.
        decode_seconds: The tokens after it.
    """

    plan: Plan
    rung: str
    devices: tuple[DeviceCheck, ...]
    prompt_tokens: int
    new_tokens: int
    load_seconds: float
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decode speed; 0 where no token was generated."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def holds(self) -> bool:
        """Whether the plan's own rung was loaded and every device that was measured took what was planned."""
        return self.rung == self.plan.rung.name and all(device.holds is not False for device in self.devices)

    def to_json(self) -> dict[str, Any]:
        """Return the check as plain data; `format` names the version of this form."""
        return {
            "format": JSON_FORMAT,
            "model": self.plan.model,
            "dtype": self.plan.footprint.dtype,
            "quantization": self.plan.footprint.quantization,
            "context_length": self.plan.context_length,
            "batch": self.plan.footprint.batch,
            "planned_rung": self.plan.rung.name,
            "rung": self.rung,
            "holds": self.holds,
            "devices": [asdict(device) | {"off": device.off, "holds": device.holds} for device in self.devices],
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "load_seconds": self.load_seconds,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "tokens_per_second": self.tokens_per_second,
        }


def check_plan(
    config: ModelConfig,
    directory: Path,
    plan: Plan,
    *,
    on_event: Callable[[LoadEvent], None] | None = None,
) -> PlanCheck:
    """Load `directory` by `plan`, run it at its full context, and compare.

    The frameworks are warmed up with a small model first, so that what they take for good is not counted. The model is
    closed again.

    Raises:
        DoesNotFitError: Memory ran out, while loading on the last rung or in the run itself.
        CheckpointError, MissingExtraError: As `loading.load`.
    """
    from lyra_emergence.loading import load
    from lyra_emergence.runtime.memory import give_back, return_freed_memory
    from lyra_emergence.runtime.warm_up import run_packed_projection, run_small_model

    run_small_model()
    if plan.footprint.quantization is not None:
        from lyra_emergence.runtime.quantized import require_bitsandbytes

        require_bitsandbytes(plan.footprint.quantization)
        run_packed_projection(plan.footprint.quantization)
    give_back()
    # What the allocator has left over would serve the model, and not show.
    return_freed_memory()
    accelerators = [_Accelerator(budget.device) for budget in plan.request.accelerators]
    with _PrivateMemory() as memory:
        started = time.perf_counter()
        loaded = load(config, directory=directory, plan=plan, on_event=on_event)
        load_seconds = time.perf_counter() - started
        held = {one.device: one.taken() for one in accelerators} | {"cpu": memory.now()}
        for one in accelerators:
            # Loading took the planned room for a moment to prove that it is there: the run is what counts.
            one.forget_peak()
        try:
            prompt, new, prefill, decode = _run(loaded, plan)
            peaks = {one.device: one.peak() for one in accelerators} | {"cpu": memory.peak()}
        finally:
            rung = loaded.report.rung
            loaded.close()
    return PlanCheck(plan, rung, _devices(plan, held, peaks), prompt, new, load_seconds, prefill, decode)


def _run(loaded: LoadedModel, plan: Plan) -> tuple[int, int, float, float]:
    """Return tokens of the prompt, new tokens, and the seconds of each."""
    from lyra_emergence.generation import Stepper

    new = min(_NEW_TOKENS, plan.context_length - 1)
    prompt = plan.context_length - new
    vocabulary = int(loaded.model.config.get_text_config().vocab_size)
    stepper = Stepper(loaded, batch=plan.footprint.batch)
    clock = time.perf_counter()
    # Tokens that differ: a mixture sends those that are alike through the same experts.
    stepper.prefill([_STRIDE * place % vocabulary for place in range(prompt)])
    prefill = time.perf_counter() - clock
    clock = time.perf_counter()
    for _ in range(new):
        stepper.step(0)
    decode = time.perf_counter() - clock
    if stepper.recoveries:
        # Generation would go on; a plan that says "fits" was wrong all the same.
        first = stepper.recoveries[0]
        raise DoesNotFitError(
            f"memory ran out on {first.device}, where the plan said that all fits: {first.reason}",
            needed=plan.footprint.kv_cache,
            available=0,
            device=first.device,
            hint="run it again with nothing else running; if it says the same, the plan is wrong",
        )
    return prompt, new, prefill, decode


def _devices(plan: Plan, held: dict[str, int | None], peaks: dict[str, int | None]) -> tuple[DeviceCheck, ...]:
    checks = []
    for use in sorted(plan.devices, key=lambda use: use.device == "cpu"):
        if use.device == "disk" or not use.used:
            continue
        private = use.weights - use.mapped
        running = use.kv_cache + use.activations
        if use.device == "cpu":
            running += kernel_buffers(plan.footprint.dtype, plan.footprint.kernels)
            # Layers are packed before any kernel runs.
            running = max(running, use.packing + kernel_buffers(plan.footprint.dtype, 0))
        private += use.streaming
        predicted = private + running
        checks.append(DeviceCheck(use.device, predicted, peaks[use.device], private, held[use.device], use.mapped))
    return tuple(checks)


class _Accelerator:
    """The tensors on one accelerator, counted from here on."""

    def __init__(self, device: str) -> None:
        from lyra_emergence.runtime import memory

        self.device = device
        self._memory = memory
        self._before = memory.allocated_bytes(device)

    def forget_peak(self) -> None:
        self._memory.reset_peak(self.device)

    def taken(self) -> int:
        return self._memory.allocated_bytes(self.device) - self._before

    def peak(self) -> int | None:
        peak = self._memory.peak_bytes(self.device)
        return None if peak is None else peak - self._before


class _PrivateMemory:
    """This process's private memory, watched by another process while in a `with` block; beyond Linux it is not."""

    _WATCHER = (
        "import sys, threading, time\n"
        "path, over, peak = sys.argv[1], threading.Event(), 0\n"
        "threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()\n"
        "print(flush=True)\n"
        "while not over.is_set():\n"
        "    with open(path) as file:\n"
        "        text = file.read()\n"
        "    peak = max(peak, int(text.partition('RssAnon:')[2].split()[0]) * 1024)\n"
        "    time.sleep(0.0005)\n"
        "print(peak)\n"
    )

    def __init__(self) -> None:
        self._before = 0
        self._seen = 0
        self._watcher: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        status = Path("/proc/self/status")
        if status.is_file() and "RssAnon:" in status.read_text():
            path = f"/proc/{os.getpid()}/status"
            command: Sequence[str] = [sys.executable, "-S", "-c", self._WATCHER, path]
            self._watcher = subprocess.Popen(  # noqa: S603  # this interpreter and a program of ours
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert self._watcher.stdout is not None
            self._watcher.stdout.readline()  # it watches now
        self._before = private_bytes()
        return self

    def now(self) -> int | None:
        if self._watcher is None:
            return None
        taken = private_bytes() - self._before
        self._seen = max(self._seen, taken)
        return taken

    def peak(self) -> int | None:
        """Return the most since the block began, and stop watching."""
        if self._watcher is None:
            return None
        told, _ = self._watcher.communicate()
        return max(int(told) - self._before, self._seen)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watcher is not None and self._watcher.poll() is None:
            self._watcher.kill()
            self._watcher.communicate()
