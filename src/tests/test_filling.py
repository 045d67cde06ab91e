"""Placements against brute force: the most layers, the fewest bytes from slow memory, the least predicted seconds."""

from __future__ import annotations

from itertools import combinations_with_replacement, product
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from lyra_emergence.dividing import divide_layers
from lyra_emergence.filling import crossings, fast_layers, place, slow_bytes
from lyra_emergence.placement import CPU, Placement, measure_use
from lyra_emergence.speed import Band, DeviceRates, DtypeRates, MachineRates, predict

from .test_placement import devices, model, request

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lyra_emergence.footprint import Footprint

MB = 10**6
_CROSSING = 1e-5


def exactly(value: float) -> Band:
    return Band(value, value, value)


def device(read: float, layer: float, *, crossing: float | None = None) -> DeviceRates:
    cache = exactly(read / 2)
    dtype = DtypeRates(exactly(read), exactly(100 * read), cache, cache, exactly(layer), exactly(5e-4), exactly(1e-7))
    if crossing is None:
        return DeviceRates({"float32": dtype})
    return DeviceRates({"float32": dtype}, exactly(10e9), exactly(crossing))


# Main memory at 40 GB/s, accelerators at 800 GB/s, as a desktop has them. Their layers' own time is small: it passes
# while weights are read, so that blocks on one accelerator would be worth more than on two.
RATES = MachineRates(
    "a desktop",
    device(40e9, 1e-4),
    {f"cuda:{n}": device(800e9, 1e-6, crossing=_CROSSING) for n in range(3)},
    exactly(2e9),
)


def seconds(footprint: Footprint, placed: Sequence[Placement]) -> float:
    shares = {block.name: block.active_share for block in footprint.blocks}
    speed = predict(footprint, placed, RATES, active_share=shares, heads_per_key=4)
    assert speed is not None
    return 1 / speed.decode_tokens_per_second.likely


@st.composite
def cases(draw: st.DrawFn) -> tuple[Footprint, tuple[int, ...]]:
    """Accelerators, and a model of like layers and like experts, of which each block costs more than a crossing."""

    def size(least: int, most: int) -> int:
        return draw(st.integers(least, most)) * MB

    count = draw(st.integers(1, 3))
    weights, cache, each = size(20, 200), size(0, 50), size(50, 600)
    mixture, first_dense = draw(st.booleans()), draw(st.booleans())
    footprint = model(
        [(weights, cache)] * count,
        experts=dict.fromkeys(range(first_dense, count), each) if mixture else None,
        share=draw(st.sampled_from([0.1, 0.25, 0.5, 0.75])),
        embedding=size(20, 200),
        norm=0,
        head=size(20, 200),
        tied=draw(st.sampled_from(["", "head", "embed"])),
        layer_activations=size(0, 20),
        head_activations=size(0, 20),
        expert_activations=size(0, 20),
    )
    gpus = draw(st.integers(1, 2))
    whole = (count * (weights + cache + each * mixture) + 400 * MB) // gpus // MB
    return footprint, tuple(size(0, whole) for _ in range(gpus))


@settings(max_examples=80, deadline=None)
@given(cases())
def test_no_other_placement_is_better(case: tuple[Footprint, tuple[int, ...]]) -> None:
    """Of all that keep the invariants, none has more layers on accelerators; of those with as many, none reads less
    from slow memory, and none is faster by more than what is spent in crossings between devices."""
    footprint, gpus = case
    asked = request(*gpus, cpu=10**15)
    placed = place(footprint, asked)
    fitting = [
        way
        for way in ways_to_place(footprint, len(gpus))
        if all(use.unused >= 0 for use in measure_use(way, footprint, asked.accelerators))
    ]
    assert fast_layers(placed) == max(map(fast_layers, fitting))
    others = [way for way in fitting if fast_layers(way) == fast_layers(placed)]
    assert slow_bytes(placed, footprint) <= min(slow_bytes(way, footprint) for way in others)
    # From one accelerator to another, four tensors go by main memory.
    crossing = crossings(placed) * 4 * 2 * _CROSSING
    assert seconds(footprint, placed) <= min(seconds(footprint, way) for way in others) + crossing + 1e-9


def ways_to_place(footprint: Footprint, gpus: int) -> Iterator[tuple[Placement, ...]]:
    """Every way that keeps the invariants.

    Layers run on from the first accelerator, then on the CPU; experts are fast only where their layer is, the head
    where a layer is, embeddings where all layers are, or the head that they share weights with.
    """
    names = [*(f"cuda:{n}" for n in range(gpus)), CPU]
    layers = [block.name for block in footprint.blocks if block.kind == "layer"]
    experts = [block for block in footprint.blocks if block.kind == "experts"]
    tied = {block.name: block.tied_to for block in footprint.blocks if block.tied_to}
    own = [name for name in ("embed", "head") if name not in tied]
    for chosen in combinations_with_replacement(names, len(layers)):
        run = dict(zip(layers, chosen, strict=True))
        fast, whole = chosen[0] != CPU, chosen[-1] != CPU
        choices = [names if run[f"layers.{block.index}"] != CPU else [CPU] for block in experts]
        choices += [names if whole or (fast and (name == "head" or tied)) else [CPU] for name in own]
        for others in product(*choices):
            where = run | dict(zip([*(block.name for block in experts), *own], others, strict=True))
            where |= {name: where[to] for name, to in tied.items() if to}
            where["norm"] = where["head"]
            yield tuple(
                Placement(block.name, block.kind, where[block.name], block.weights, block.kv_cache, "tried")
                for block in footprint.blocks
            )


def test_layers_make_room_for_a_head_that_fits_nowhere_behind_them() -> None:
    footprint = model([(16, 0), (16, 0)], norm=0, head=25, embedding=0)
    # Layer after layer from the first on, the head would have 10 left there and 19 on the second.
    where = devices(place(footprint, request(26, 35)))
    assert [where[name] for name in ("layers.0", "layers.1", "head")] == ["cuda:1", "cuda:1", "cuda:0"]


def test_layers_are_divided_so_that_most_experts_fit_beside_them() -> None:
    footprint = model([(10, 0)] * 4, experts=dict.fromkeys(range(4), 40), norm=0, head=0, embedding=0)
    # Beside 4 and 0 layers there is room for 1 and 1 blocks of experts, beside 0 and 4 for 2 and 0, beside 1 and 3 for
    # 2 and 1: 90 - 10 and 70 - 30 bytes of 40 each.
    assert divide_layers(footprint, request(90, 70).accelerators, None) == {"cuda:0": 1, "cuda:1": 3}
    where = devices(place(footprint, request(90, 70)))
    assert [where[f"layers.{i}"] for i in range(4)] == ["cuda:0", "cuda:1", "cuda:1", "cuda:1"]
    assert sorted(where[f"layers.{i}.experts"] for i in range(4)) == ["cpu", "cuda:0", "cuda:0", "cuda:1"]


def test_the_head_takes_room_from_the_layers_beside_it() -> None:
    footprint = model([(10, 0)] * 4, norm=0, head=15, embedding=0, layer_activations=3, head_activations=5)
    # 15 of head and 5 for its activations, which are more than the layers' 3, leave two layers' room of 40.
    for head_on, layers in ((None, (3, 1)), ("cuda:0", (2, 2)), ("cuda:1", (3, 1))):
        counts = divide_layers(footprint, request(40, 40).accelerators, head_on)
        assert tuple(counts.values()) == layers, head_on
