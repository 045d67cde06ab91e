"""Free memory as the kernel, the control groups and the drivers say it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from lyra_emergence import machine as machine_module
from lyra_emergence.framework import framework_costs
from lyra_emergence.machine import (
    Device,
    Machine,
    available_cpu_bytes,
    control_group_memory,
    probe_machine,
    visible_gpus,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .simulated_accelerator import SimulatedAccelerator

GiB = 2**30
UNLIMITED = 1 << 60
V1_UNLIMITED = "9223372036854771712"


def tree(root: Path, files: Mapping[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def v2(root: Path, path: str, groups: Mapping[str, tuple[object, int, int]]) -> Path:
    """A v2 tree: (memory.max, memory.current, inactive_file) by folder."""
    files: dict[str, object] = {"proc/self/cgroup": f"0::{path}"}
    for folder, (limit, used, cache) in groups.items():
        base = f"sys/fs/cgroup/{folder}".rstrip("/")
        files[f"{base}/memory.max"] = limit
        files[f"{base}/memory.current"] = used
        files[f"{base}/memory.stat"] = f"anon 5\nfile 9\ninactive_file {cache}\nactive_file 7"
    return tree(root, files)


def v1(root: Path, path: str, groups: Mapping[str, tuple[object, int, int]]) -> Path:
    lines = f"12:cpuset:/\n5:memory:{path}\n1:name=systemd:{path}\n0::{path}"
    files: dict[str, object] = {"proc/self/cgroup": lines}
    for folder, (limit, used, cache) in groups.items():
        base = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
        files[f"{base}/memory.limit_in_bytes"] = limit
        files[f"{base}/memory.usage_in_bytes"] = used
        files[f"{base}/memory.stat"] = f"inactive_file 1\ntotal_rss 5\ntotal_inactive_file {cache}"
    return tree(root, files)


# --- Control groups --------------------------------------------------------------------------------


def test_a_limit_in_v2(tmp_path: Path) -> None:
    root = v2(tmp_path, "/lyra", {"lyra": (4 * GiB, 3 * GiB, GiB // 2)})
    assert control_group_memory(root) == (4 * GiB, 4 * GiB - (3 * GiB - GiB // 2))


def test_a_limit_in_v1(tmp_path: Path) -> None:
    root = v1(tmp_path, "/lyra", {"lyra": (4 * GiB, 3 * GiB, GiB // 2), "": (V1_UNLIMITED, 9 * GiB, 0)})
    assert control_group_memory(root) == (4 * GiB, 4 * GiB - (3 * GiB - GiB // 2))


@pytest.mark.parametrize("limit", ["max", V1_UNLIMITED, "nonsense", ""])
def test_no_limit(tmp_path: Path, limit: str) -> None:
    assert control_group_memory(v2(tmp_path / "2", "/a", {"a": (limit, GiB, 0)})) == (UNLIMITED, UNLIMITED)
    assert control_group_memory(v1(tmp_path / "1", "/a", {"a": (limit, GiB, 0)})) == (UNLIMITED, UNLIMITED)


def test_the_tightest_of_nested_groups_binds_in_both_senses(tmp_path: Path) -> None:
    groups = {"a": (8 * GiB, 7 * GiB, 0), "a/b": ("max", 3 * GiB, 0), "a/b/c": (4 * GiB, GiB, 0)}
    limit, free = control_group_memory(v2(tmp_path, "/a/b/c", groups))
    assert (limit, free) == (4 * GiB, GiB)  # the limit of c, what is left of a


def test_in_a_container_the_named_path_lies_above_the_mount(tmp_path: Path) -> None:
    assert control_group_memory(v2(tmp_path / "2", "/docker/0123", {"": (2 * GiB, GiB, 0)})) == (2 * GiB, GiB)
    assert control_group_memory(v1(tmp_path / "1", "/docker/0123", {"": (2 * GiB, GiB, 0)})) == (2 * GiB, GiB)
    assert control_group_memory(v2(tmp_path / "3", "/../..", {"": (2 * GiB, GiB, 0)})) == (2 * GiB, GiB)


def test_more_used_than_allowed_leaves_nothing_and_cache_no_more_than_is_used(tmp_path: Path) -> None:
    assert control_group_memory(v2(tmp_path / "over", "/a", {"a": (GiB, 2 * GiB, 0)})) == (GiB, 0)
    assert control_group_memory(v2(tmp_path / "cache", "/a", {"a": (GiB, GiB // 2, 2 * GiB)})) == (GiB, GiB)


def test_without_control_groups_or_statistics(tmp_path: Path) -> None:
    assert control_group_memory(tmp_path) == (UNLIMITED, UNLIMITED)
    root = v2(tmp_path, "/a", {"a": (2 * GiB, GiB, 0)})
    (root / "sys/fs/cgroup/a/memory.stat").unlink()
    assert control_group_memory(root) == (2 * GiB, GiB)


def test_a_limit_reaches_the_device_and_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "control_group_memory", lambda: (10**9, 4 * 10**8))
    found = probe_machine(with_torch=False)
    assert (found.cpu.total_bytes, found.cpu.free_bytes) == (10**9, 4 * 10**8)
    assert len(found.notes) == 1
    assert found.notes[0].startswith("a control group limits this process to 1.00 GB of ")


# --- GPUs ------------------------------------------------------------------------------------------

UUIDS = ["GPU-aaaa1111", "GPU-aabb2222", "GPU-cccc3333"]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("0,1,2", [0, 1, 2]),
        ("2,0", [2, 0]),
        (" 1 , 2 ", [1, 2]),
        ("-1", []),
        ("0,-1,2", [0]),
        ("3", []),
        ("1,7,0", [1]),
        ("1,1", [1]),
        ("GPU-cccc3333,GPU-aabb", [2, 1]),
        ("GPU-aa", []),
        ("GPU-c,0", [2, 0]),
        ("MIG-0123", []),
        ("all", []),
        ("0,,1", [0]),
    ],
)
def test_cuda_visible_devices(visible: str | None, expected: list[int]) -> None:
    assert visible_gpus(UUIDS, visible) == expected


def test_without_nvml_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert probe_machine(with_torch=False).accelerators == ()


def gpu(kind: str, index: int) -> Device:
    return Device(f"{kind}:{index}", kind, index, 10, 5, 0, "")


CPU = Device("cpu", "cpu", None, 10, 5, 0, "")
MPS = Device("mps", "mps", 0, 10, 5, 0, "")


@pytest.mark.parametrize(
    ("accelerators", "name", "expected"),
    [
        ("cuda cuda", "0", "cuda:0"),
        ("cuda cuda", "1", "cuda:1"),
        ("cuda cuda", "2", None),
        ("cuda cuda", "cuda", "cuda:0"),
        ("cuda cuda", "cuda:1", "cuda:1"),
        ("cuda cuda", "cuda:2", None),
        ("cuda", "xpu", None),
        ("cuda", "xpu:0", None),
        ("cuda", "mps", None),
        ("xpu", "0", "xpu:0"),
        ("xpu", "cuda:0", None),
        ("mps", "0", "mps"),
        ("mps", "mps", "mps"),
        ("mps", "mps:0", "mps"),
        ("mps", "cuda", None),
        ("", "0", None),
        ("", "cuda", None),
        ("", "cpu", "cpu"),
        ("cuda", "cpu", "cpu"),
        ("cuda", "disk", None),
        ("cuda", "", None),
        ("cuda", "-1", None),
    ],
)
def test_find(accelerators: str, name: str, expected: str | None) -> None:
    devices = tuple(MPS if kind == "mps" else gpu(kind, i) for i, kind in enumerate(accelerators.split()))
    found = Machine(devices, CPU).find(name)
    assert (found.name if found else None) == expected


# --- This machine ----------------------------------------------------------------------------------


def test_this_machines_memory_is_sane() -> None:
    cpu = probe_machine(with_torch=False).cpu
    assert (cpu.name, cpu.kind, cpu.index) == ("cpu", "cpu", None)
    # What torch takes, less what this process has already.
    assert 0 <= cpu.reserved_bytes < framework_costs().main_memory
    assert 0 < cpu.free_bytes <= cpu.total_bytes <= psutil.virtual_memory().total
    assert cpu.description.endswith(f"{os.cpu_count()} cores")
    assert available_cpu_bytes() == pytest.approx(cpu.free_bytes, rel=0.5)


def test_the_simulated_devices_are_seen_with_what_is_free(sim: SimulatedAccelerator) -> None:
    import torch

    sim.set_cap(3_000_000, 0)
    sim.set_cap(5_000_000, 1)
    sim.occupy(1_000_000, 1)
    held = torch.empty(1000, dtype=torch.uint8, device="sim:0")
    for found in (probe_machine(with_torch=True), probe_machine()):
        assert [(d.name, d.kind, d.index, d.total_bytes, d.free_bytes) for d in found.accelerators] == [
            ("sim:0", "sim", 0, 3_000_000, 2_999_000),
            ("sim:1", "sim", 1, 5_000_000, 4_000_000),
        ]
        assert found.find("1") == found.find("sim:1") == found.accelerators[1]
    del held


def test_without_an_accelerator_torch_finds_none() -> None:
    import torch

    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    assert probe_machine(with_torch=True).accelerators == ()
