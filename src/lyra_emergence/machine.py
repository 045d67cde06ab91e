"""The machine: its devices, and how many bytes of each are free for a model.

Covers NVIDIA GPUs through NVML (without torch, so that planning stays fast), every other accelerator through
`torch.accelerator`, and main memory as the kernel and the control groups (v1 and v2) leave it. Bandwidths are not
covered.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyra_emergence.framework import MOST_KERNEL_BUFFERS, framework_costs, private_bytes
from lyra_emergence.main_memory import control_group_memory, main_memory
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["Device", "Machine", "probe_machine", "with_hardware"]

CUDA_CONTEXT_BYTES = 600 * 10**6
"""What a CUDA context and cuBLAS take before the first tensor: 450 to 560 MB on recent drivers, rounded up. Stands in
until `framework.py` has measured it on this machine."""
CUDA_WORKSPACE_BYTES = 70 * 10**6
"""cuBLAS and cuDNN workspaces, still to come once the context exists."""
_NVIDIA_NODES = ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg", "/dev/nvhost-ctrl")
"""What the driver, that of Windows under WSL, or that of Jetson boards puts up on Linux."""
_APPLE_GPU_SHARE = 0.7
"""Metal's recommended working set is between two thirds and three quarters of the unified memory."""


@dataclass(frozen=True, slots=True)
class Device:
    """One place that holds weights and computes.

    Attributes:
        name: torch's name: "cuda:0", "mps", "cpu".
        kind: The part before the colon.
        index: The ordinal that a configuration's "0" means; None for the CPU.
        total_bytes: Bytes that the device has (for the CPU: that this process may ever use).
        free_bytes: Bytes that can be taken now.
        reserved_bytes: Bytes of the free ones that the framework itself will take (modules, context, workspaces).
        description: For people: "NVIDIA RTX 4090".
    """

    name: str
    kind: str
    index: int | None
    total_bytes: int
    free_bytes: int
    reserved_bytes: int
    description: str


@dataclass(frozen=True, slots=True)
class Machine:
    """The devices of this machine.

    Attributes:
        accelerators: GPUs in the order of their ordinals; empty without one.
        cpu: Main memory, as the tightest of kernel and control groups leaves it.
        notes: What a user should know, such as a control group's limit.
    """

    accelerators: tuple[Device, ...]
    cpu: Device
    notes: tuple[str, ...] = ()

    def find(self, name: str) -> Device | None:
        """Return the device that a configuration calls `name` ("0", "cuda", "cuda:1", "mps", "cpu"), or None."""
        if name == "cpu":
            return self.cpu
        kind, _, ordinal = name.rpartition(":") if ":" in name else ("", "", name)
        if ordinal.isdecimal():
            wanted = int(ordinal)
            return next((d for d in self.accelerators if d.index == wanted and kind in ("", d.kind)), None)
        return next((d for d in self.accelerators if d.kind == name), None)


def probe_machine(*, with_torch: bool | None = None) -> Machine:
    """Ask the machine what it has.

    Args:
        with_torch: Whether to ask torch, which knows every accelerator but costs seconds to import and makes a
            context on each GPU. By default: if torch is loaded already, or only torch knows the accelerator there is.
    """
    cpu, notes = _probe_cpu()
    if with_torch is None:
        with_torch = "torch" in sys.modules or _has_accelerator_beyond_nvml()
    accelerators = tuple(_torch_accelerators(cpu) if with_torch else _nvml_accelerators(os.environ))
    return Machine(accelerators=accelerators, cpu=cpu, notes=notes)


def with_hardware(machine: Machine, gpus: Sequence[int], ram: int | None) -> Machine:
    """Return `machine` with other hardware, to plan for what is not here.

    Args:
        machine: The machine at hand.
        gpus: Bytes of each GPU, all free, in place of the accelerators that are here; empty leaves those.
        ram: Bytes of main memory, all free; None leaves what is here.
    """
    accelerators = machine.accelerators
    if gpus:
        accelerators = tuple(
            Device(f"cuda:{at}", "cuda", at, size, size, CUDA_CONTEXT_BYTES, f"a GPU of {format_bytes(size)}")
            for at, size in enumerate(gpus)
        )
    cpu = machine.cpu if ram is None else replace(machine.cpu, total_bytes=ram, free_bytes=ram)
    notes = machine.notes if ram is None else ()
    imagined = [f"{len(gpus)} GPU{'s'[: len(gpus) > 1]}"] * bool(gpus) + ["main memory"] * (ram is not None)
    return Machine(accelerators, cpu, (*notes, f"planned for {' and '.join(imagined)} as given, not as found here"))


def available_cpu_bytes() -> int:
    """Return the bytes of main memory that this process can still take."""
    return _probe_cpu()[0].free_bytes


def _probe_cpu() -> tuple[Device, tuple[str, ...]]:
    installed, available = main_memory()
    limit, free_below_limit = control_group_memory()
    total, free = min(installed, limit), min(available, free_below_limit)
    notes: tuple[str, ...] = ()
    if limit < installed:
        notes = (f"a control group limits this process to {format_bytes(limit)} of {format_bytes(installed)} RAM",)
    name = platform.processor() or platform.machine()
    # What this process has already is no longer among the free bytes.
    reserved = max(0, framework_costs().main_memory + MOST_KERNEL_BUFFERS - private_bytes())
    return Device("cpu", "cpu", None, total, free, reserved, f"{name}, {os.cpu_count()} cores"), notes


def _has_accelerator_beyond_nvml() -> bool:
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    return Path("/dev/kfd").exists()


def nvml_devices() -> tuple[Device, ...]:
    """Return the NVIDIA GPUs as the driver reports them, without making a context on any."""
    return tuple(_nvml_accelerators(os.environ))


def _may_have_nvidia() -> bool:
    """Return whether a driver of NVIDIA may be there; importing its library to ask takes a fifth of a plan's time."""
    return not sys.platform.startswith("linux") or any(Path(node).exists() for node in _NVIDIA_NODES)


def _nvml_accelerators(environ: Mapping[str, str]) -> Iterator[Device]:
    if not _may_have_nvidia():
        return
    try:
        import pynvml
    except ImportError:
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return
    costs = framework_costs().gpus
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        uuids = [_text(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        for index, physical in enumerate(visible_gpus(uuids, environ.get("CUDA_VISIBLE_DEVICES"))):
            memory = pynvml.nvmlDeviceGetMemoryInfo(handles[physical])
            name = _text(pynvml.nvmlDeviceGetName(handles[physical]))
            total, free = int(memory.total), int(memory.free)
            reserved = costs.get(f"cuda:{index}", CUDA_CONTEXT_BYTES)
            yield Device(f"cuda:{index}", "cuda", index, total, free, reserved, name)
    except pynvml.NVMLError:
        return
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def visible_gpus(uuids: list[str], visible: str | None) -> list[int]:
    """Return the physical numbers of the GPUs that CUDA will show, in its order.

    As CUDA reads `CUDA_VISIBLE_DEVICES`: numbers or unique prefixes of UUIDs; the first invalid one ends the list.
    """
    if visible is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.isdecimal() and int(entry) < len(uuids):
            found = [int(entry)]
        else:
            found = [i for i, uuid in enumerate(uuids) if entry and uuid.startswith(entry)]
        if len(found) != 1 or found[0] in chosen:
            break
        chosen.append(found[0])
    return chosen


def _torch_accelerators(cpu: Device) -> Iterator[Device]:
    import torch

    if not torch.accelerator.is_available():
        return
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return
    kind = accelerator.type
    module: Any = torch.get_device_module(kind)
    if kind == "mps":
        yield _metal_device(module, cpu)
        return
    for index in range(torch.accelerator.device_count()):
        free, total = module.mem_get_info(index)
        name = getattr(module, "get_device_name", lambda _: kind)(index)
        reserved = CUDA_WORKSPACE_BYTES if kind == "cuda" else 0
        # Blocks that torch's allocator caches are free for us, though the driver counts them as used.
        cached = module.memory_reserved(index) - module.memory_allocated(index) if kind == "cuda" else 0
        yield Device(f"{kind}:{index}", kind, index, int(total), int(free) + int(cached), reserved, str(name))


def _metal_device(module: Any, cpu: Device) -> Device:
    recommended = getattr(module, "recommended_max_memory", lambda: int(cpu.total_bytes * _APPLE_GPU_SHARE))()
    used = module.driver_allocated_memory()
    # The GPU shares main memory: what others hold is gone for it too.
    free = min(max(0, recommended - used), cpu.free_bytes)
    return Device("mps", "mps", 0, int(recommended), int(free), 0, "Apple GPU (unified memory)")
