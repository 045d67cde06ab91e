"""Budgets and device maps, read against machines that are written down here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from lyra_emergence.budgets import Budget, Request, read_request
from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import ConfigError
from lyra_emergence.footprint import BlockFootprint, Footprint
from lyra_emergence.machine import Device, Machine
from lyra_emergence.plan import make_plan
from lyra_emergence.speed import Band, DeviceRates, DtypeRates, MachineRates, fingerprint
from lyra_emergence.speed.cache import keep

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GB = 10**9
CPU = Device("cpu", "cpu", None, 32 * GB, 20 * GB, 0, "CPU")
GPUS = (
    Device("cuda:0", "cuda", 0, 24 * GB, 20 * GB, GB, "large"),
    Device("cuda:1", "cuda", 1, 8 * GB, 6 * GB, GB, "small"),
)
NAMES = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.10", "model.norm", "lm_head")
KINDS = ("embedding", "layer", "layer", "layer", "norm", "head")


def footprint(*, unmapped: tuple[str, ...] = (), tied: bool = False) -> Footprint:
    blocks = tuple(
        BlockFootprint(
            name, kind, "model.embed_tokens" if tied and kind == "head" else None, 1, 1, name not in unmapped
        )
        for name, kind in zip(NAMES, KINDS, strict=True)
    )
    return Footprint(blocks, 128, 1, "float32", None, 1, 1)


def read(on: Machine | None = None, what: Footprint | None = None, **settings: Any) -> Request:
    return read_request(ModelConfig(**settings), on or Machine(GPUS, CPU), what or footprint())


def limits(request: Request) -> dict[str, int]:
    return {budget.device: budget.limit for budget in (*request.accelerators, request.cpu)}


def test_by_default_all_that_is_free() -> None:
    request = read()
    assert request.accelerators == (
        Budget("cuda:0", 20 * GB, 20 * GB, 24 * GB, GB, "20.0 GB free"),
        Budget("cuda:1", 6 * GB, 6 * GB, 8 * GB, GB, "6.00 GB free"),
    )
    assert request.cpu == Budget("cpu", 20 * GB, 20 * GB, 32 * GB, 0, "20.0 GB free")
    assert (request.pinned, request.whole_on, request.notes) == ({}, None, ())


@pytest.mark.parametrize(
    ("max_memory", "expected"),
    [
        ({"0": "6GB"}, (6 * GB, 6 * GB, 20 * GB)),
        ({"cuda:1": "6GB"}, (20 * GB, 6 * GB, 20 * GB)),
        ({"1": 0, "cpu": 0}, (20 * GB, 0, 0)),
        ({"0": "50%", "cpu": "50%"}, (12 * GB, 6 * GB, 16 * GB)),
        ({"disk": "1GB"}, (20 * GB, 6 * GB, 20 * GB)),
        ({"0": 1, "1": "2KiB", "cpu": "0.5GB"}, (1, 2048, GB // 2)),
    ],
)
def test_max_memory(max_memory: dict[str, str | int], expected: tuple[int, int, int]) -> None:
    request = read(max_memory=max_memory)
    assert tuple(limits(request).values()) == expected
    assert request.notes == ()


def test_more_than_is_free_is_cut_and_said_once_per_device() -> None:
    request = read(max_memory={"0": "90%", "1": "7GB", "cpu": "20GB"})
    assert tuple(limits(request).values()) == (20 * GB, 6 * GB, 20 * GB)
    assert request.notes == (
        "max_memory of cuda:0 is 21.6 GB, but 20.0 GB is free: planned with 20.0 GB",
        "max_memory of cuda:1 is 7.00 GB, but 6.00 GB is free: planned with 6.00 GB",
    )
    assert request.accelerators[0].reason == "20.0 GB free, below the configured 21.6 GB"
    assert request.cpu.reason == "max_memory 20.0 GB"


def test_all_devices_that_are_not_there_are_one_warning() -> None:
    on = Machine((), CPU)
    names = {"0": "6GB", "mps": "6GB", "xpu:1": "6GB", "cpu": "16GB"}
    lacking = "this machine lacks devices that the configuration names, ignored: "
    assert read(on, max_memory=names).notes == (f"{lacking}'max_memory.0', 'max_memory.mps', 'max_memory.xpu:1'",)
    assert read(on, device_map="mps").notes == (f"{lacking}'device_map' (mps)",)
    by_layer = read(on, device_map={"model.layers.0": 0, "model.layers.1": 1, "model.layers.10": 0, "lm_head": "cpu"})
    assert by_layer.notes == (
        f"{lacking}'device_map' for model.layers.0 and 1 more (0), 'device_map' for model.layers.1 (1)",
    )
    assert by_layer.pinned == {
        "model.layers.0": "cpu",
        "model.layers.1": "cpu",
        "model.layers.10": "cpu",
        "lm_head": "cpu",
    }
    assert read(on, device_map={"": 0}).notes == (f"{lacking}'device_map' and 5 more (0)",)


@pytest.mark.parametrize("wish", [None, "auto", "balanced", "balanced_low_0", "sequential"])
def test_automatic(wish: str | None) -> None:
    assert read(device_map=wish) == read()


def test_whole_devices() -> None:
    assert read(device_map="cpu").accelerators == ()
    assert read(device_map="cpu").whole_on is None
    one = read(device_map="cuda:1", max_memory={"1": "2GB"})
    assert (one.whole_on, limits(one)) == ("cuda:1", {"cuda:1": 2 * GB, "cpu": 20 * GB})
    assert read(device_map="cuda").whole_on == "cuda:0"
    lacking = read(device_map="cuda:2")
    assert (lacking.whole_on, lacking.accelerators) == (None, ())


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"lm_head": "cpu"}, {"lm_head": "cpu"}),
        ({"model.layers.1": 1}, {"model.layers.1": "cuda:1"}),
        ({"model.layers": 0}, {"model.layers.0": "cuda:0", "model.layers.1": "cuda:0", "model.layers.10": "cuda:0"}),
        ({"": "cuda:1"}, dict.fromkeys(NAMES, "cuda:1")),
        ({"": "cpu", "model": 0}, {**dict.fromkeys(NAMES, "cuda:0"), "lm_head": "cpu"}),
        ({"model": "cpu", "model.layers": 0, "model.layers.0": 1, "lm_head": "disk"}, {
            "model.embed_tokens": "cpu",
            "model.layers.0": "cuda:1",
            "model.layers.1": "cuda:0",
            "model.layers.10": "cuda:0",
            "model.norm": "cpu",
            "lm_head": "disk",
        }),
    ],
)  # fmt: skip
def test_custom_maps(wish: dict[str, str | int], expected: dict[str, str]) -> None:
    request = read(device_map=wish)
    assert request.pinned == expected
    assert [budget.device for budget in request.accelerators] == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("model.layer", "the model has no such module; did you mean 'model.layers'?"),
        ("lm_haed", "the model has no such module; did you mean 'lm_head'?"),
        ("transformer.h.0", "the model has no such module; its blocks are model.embed_tokens ... lm_head"),
        ("model.layers.1.mlp", "it is part of block 'model.layers.1', which is placed whole; write 'model.layers.1'"),
    ],
)
def test_modules_that_are_not_there(key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(device_map={key: "cpu"})
    assert caught.value.problems == (f"in 'device_map.{key}': {problem}",)
    assert str(caught.value).startswith("the device map does not match the model:\n")


def test_the_disk_holds_stored_blocks_alone() -> None:
    what = footprint(unmapped=("model.layers.1",))
    assert read(what=what, device_map={"model.layers.0": "disk"}).pinned == {"model.layers.0": "disk"}
    with pytest.raises(ConfigError) as caught:
        read(what=what, device_map={"model.layers": "disk"})
    problem = "in 'device_map': model.layers.1 is converted or quantized; write 'cpu'"
    assert caught.value.problems == (problem,)


def test_a_tied_head_on_disk_needs_its_weight_in_stored_form() -> None:
    what = footprint(unmapped=("model.embed_tokens",), tied=True)
    with pytest.raises(ConfigError) as caught:
        read(what=what, device_map={"lm_head": "disk"})
    assert caught.value.problems == ("in 'device_map': lm_head is converted or quantized; write 'cpu'",)


def test_accelerators_of_several_paces_are_filled_fastest_first(checkpoints: Callable[[str], Path]) -> None:
    index = read_checkpoint(checkpoints("llama"))
    gpus = tuple(Device(f"cuda:{at}", "cuda", at, 8 * GB, 8 * GB, 0, f"card {at}") for at in range(3))
    found = Machine(gpus, Device("cpu", "cpu", None, 64 * GB, 64 * GB, 0, ""))

    def order(*paces: float, **settings: Any) -> list[str]:
        measured = {gpu.name: _reading(pace) for gpu, pace in zip(gpus, paces, strict=True)}
        keep(MachineRates(fingerprint(found), _reading(1e10), measured, None))
        plan = make_plan(ModelConfig(**settings), index, found)
        return [budget.device for budget in plan.request.accelerators]

    assert order(1e12, 2e12, 3e12) == ["cuda:2", "cuda:1", "cuda:0"]
    assert order(1e12, 2e12, 1e12) == ["cuda:1", "cuda:0", "cuda:2"]
    assert order(1e12, 1.1e12, 1.2e12) == ["cuda:0", "cuda:1", "cuda:2"]
    assert order(1e12, 2e12, 3e12, device_map="sequential") == ["cuda:0", "cuda:1", "cuda:2"]
    # What fits one card is on the fastest.
    order(1e12, 2e12, 3e12)
    assert {p.device for p in make_plan(ModelConfig(), index, found).placements} == {"cuda:2"}


def _reading(pace: float) -> DeviceRates:
    exact = Band(pace, pace, pace)
    return DeviceRates({"float32": DtypeRates(exact, exact, exact, exact, exact, exact, exact)}, exact, exact)
