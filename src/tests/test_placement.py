"""The invariants of placing on random models and budgets, and single cases."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyra_emergence.activations import Activations
from lyra_emergence.budgets import Budget, Request
from lyra_emergence.filling import place
from lyra_emergence.footprint import BlockFootprint, Footprint
from lyra_emergence.placement import DISK, DeviceUse, Placement, check_fits, measure_use, refuse

SIZES = st.integers(0, 60)


def budget(device: str, limit: int, reserved: int = 0) -> Budget:
    return Budget(device, limit, limit, limit, reserved, f"{limit} B free")


def request(*gpus: int, cpu: int = 10**6, pinned: dict[str, str] | None = None, reserved: int = 0) -> Request:
    budgets = tuple(budget(f"cuda:{n}", limit, reserved) for n, limit in enumerate(gpus))
    return Request(budgets, budget("cpu", cpu), pinned or {}, None, ())


def model(
    layers: list[tuple[int, int]],
    *,
    experts: dict[int, int] | None = None,
    share: float = 0.25,
    expert_activations: int = 0,
    embedding: int = 10,
    norm: int = 1,
    head: int | None = 10,
    tied: str = "",
    layer_activations: int = 0,
    head_activations: int = 0,
    unmapped: frozenset[str] = frozenset(),
) -> Footprint:
    """A model of layers with (weights, KV cache), and the weights of the experts of those layers that have any.

    `tied` is "head" or "embed", the block without weights of its own.
    """

    def block(name: str, kind: str, weights: int, cache: int = 0, tied_to: str | None = None) -> BlockFootprint:
        return BlockFootprint(name, kind, tied_to, 0 if tied_to else weights, cache, name not in unmapped)

    def whole_layer(number: int, sizes: tuple[int, int]) -> list[BlockFootprint]:
        parts = [replace(block(f"layers.{number}", "layer", *sizes), index=number)]
        if experts and number in experts:
            inside = block(f"layers.{number}.experts", "experts", experts[number])
            parts.append(replace(inside, index=number, active_share=share))
        return parts

    blocks = (
        block("embed", "embedding", embedding, tied_to="head" if tied == "embed" else None),
        *(part for i, sizes in enumerate(layers) for part in whole_layer(i, sizes)),
        block("norm", "norm", norm),
        block("head", "head", head or 0, tied_to="embed" if tied == "head" else None),
    )
    busy = Activations(
        embedding=0,
        layer=layer_activations,
        head=head_activations,
        experts=expert_activations,
        experts_alone=expert_activations // 2,
    )
    return Footprint(blocks, 128, 1, "float32", None, busy)


def devices(placed: tuple[Placement, ...]) -> dict[str, str]:
    return {p.block: p.device for p in placed}


@st.composite
def models(draw: st.DrawFn) -> Footprint:
    layers = draw(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=7))
    names = ["embed", "norm", "head", *(f"layers.{i}" for i in range(len(layers)))]
    return model(
        layers,
        experts=draw(st.dictionaries(st.integers(0, len(layers) - 1), SIZES)),
        share=draw(st.sampled_from([0.1, 0.5, 0.75])),
        expert_activations=draw(st.integers(0, 30)),
        embedding=draw(SIZES),
        norm=draw(SIZES),
        head=draw(SIZES),
        tied=draw(st.sampled_from(["", "head", "embed"])),
        layer_activations=draw(st.integers(0, 30)),
        head_activations=draw(st.integers(0, 30)),
        unmapped=frozenset(draw(st.sets(st.sampled_from(names)))),
    )


@st.composite
def requests(draw: st.DrawFn, *, pinned: tuple[str, ...] = ()) -> Request:
    gpus = draw(st.lists(st.integers(0, 250), max_size=3))
    names = [*(f"cuda:{n}" for n in range(len(gpus))), "cpu"]
    pins = {name: draw(st.sampled_from(names)) for name in pinned if draw(st.booleans())}
    return request(*gpus, cpu=draw(st.integers(0, 600)), pinned=pins, reserved=draw(st.integers(0, 20)))


limits = st.one_of(st.none(), st.integers(0, 8))


def check(footprint: Footprint, asked: Request, placed: tuple[Placement, ...]) -> None:
    blocks = {block.name: block for block in footprint.blocks}
    assert [p.block for p in placed] == list(blocks)
    assert all(p.reason for p in placed)
    assert all(blocks[p.block].mapped for p in placed if p.device == DISK and p.weights)
    where = devices(placed)
    for block in footprint.blocks:
        if block.tied_to is not None and not asked.pinned:
            assert where[block.name] == where[block.tied_to]
    assert sum(p.weights for p in placed) >= footprint.weights
    assert sum(p.kv_cache for p in placed) == footprint.kv_cache


@settings(max_examples=150, deadline=None)
@given(models(), requests(), limits)
def test_the_invariants_hold(footprint: Footprint, asked: Request, layer_limit: int | None) -> None:
    placed = place(footprint, asked, layer_limit=layer_limit)
    check(footprint, asked, placed)
    assert sum(p.weights for p in placed) == footprint.weights
    uses = measure_use(placed, footprint, asked.accelerators)
    assert all(use.unused >= 0 for use in uses if use.device != DISK and use.used)
    order = [budget.device for budget in asked.accelerators] + ["cpu", DISK]
    path = [order.index(p.device) for p in placed if p.kind == "layer"]
    slow = [step for step in path if step < len(order) - 2]
    assert slow == sorted(slow)
    assert path[: len(slow)] == slow
    if layer_limit is not None:
        assert len(slow) <= layer_limit


@settings(max_examples=150, deadline=None)
@given(models(), requests())
def test_as_many_layers_as_can_be_are_on_accelerators(footprint: Footprint, asked: Request) -> None:
    placed = place(footprint, asked)
    found = sum(p.kind == "layer" and p.device.startswith("cuda") for p in placed)
    assert found == most_layers(footprint, asked)


def most_layers(footprint: Footprint, asked: Request) -> int:
    """The best of all ways to cut the layers into one run per device, the first device's run first.

    Experts can do without an accelerator.
    """
    layers = [b.nbytes for b in footprint.blocks if b.kind == "layer"]
    busy = footprint.activations.of(layer=True)
    room = [b.limit - b.reserved - busy for b in asked.accelerators]
    best = 0
    for cuts in combinations_with_replacement(range(len(layers) + 1), len(room)):
        runs = [layers[a:b] for a, b in pairwise((0, *cuts))]
        if all(not run or sum(run) <= left for run, left in zip(runs, room, strict=True)):
            best = max(best, *cuts, 0)
    return best


def test_experts_leave_before_the_rest_of_their_layers_and_come_back_last() -> None:
    footprint = model([(10, 2)] * 3, experts={1: 40, 2: 40}, norm=0, head=20, embedding=60)
    order = ["layers.0", "layers.1", "layers.2", "norm", "head", "layers.1.experts", "layers.2.experts", "embed"]
    for limit, count in ((12, 1), (35, 2), (36, 3), (55, 3), (56, 5), (95, 5), (96, 6), (136, 7), (195, 7), (196, 8)):
        placed = place(footprint, request(limit))
        assert {p.block for p in placed if p.device == "cuda:0"} == set(order[:count]), limit
    stays = {p.block: p.reason for p in place(footprint, request(96)) if p.device == "cpu"}
    assert stays["layers.2.experts"] == (
        "no accelerator has room left; a token reads few of its experts, so layers go first"
    )


def test_layers_come_first_also_where_a_token_reads_most_of_a_mixture() -> None:
    footprint = model([(10, 2)] * 3, experts={0: 20, 1: 20, 2: 20}, share=0.75, norm=0, head=0, embedding=0)
    where = devices(place(footprint, request(64)))
    assert [where[f"layers.{i}"] for i in range(3)] == ["cuda:0"] * 3
    # 3 layers of 12 bytes leave room for the experts of one.
    assert [where[f"layers.{i}.experts"] for i in range(3)] == ["cuda:0", "cpu", "cpu"]


def test_the_fewest_accelerators_that_hold_all_are_used() -> None:
    footprint = model([(10, 0)] * 4, norm=0, head=10, embedding=10)
    assert set(devices(place(footprint, request(30, 60))).values()) == {"cuda:1"}
    assert set(devices(place(footprint, request(40, 30, 20))).values()) == {"cuda:0", "cuda:1"}


def test_experts_without_room_beside_their_layer_go_to_another_accelerator() -> None:
    footprint = model([(10, 0)] * 2, experts={0: 40, 1: 40}, norm=0, head=0, embedding=0)
    where = devices(place(footprint, request(25, 45)))
    assert (where["layers.0"], where["layers.1"]) == ("cuda:0", "cuda:0")
    assert (where["layers.0.experts"], where["layers.1.experts"]) == ("cuda:1", "cpu")


def test_the_disk_takes_experts_before_layers() -> None:
    footprint = model([(10, 0)] * 2, experts={0: 40, 1: 40}, norm=0, head=0, embedding=0)
    assert [p.block for p in place(footprint, request(cpu=60)) if p.device == DISK] == ["layers.1.experts"]


@settings(max_examples=150, deadline=None)
@given(models(), st.data())
def test_pinned_blocks_stay_and_the_rest_never_overfills(footprint: Footprint, data: st.DataObject) -> None:
    asked = data.draw(requests(pinned=tuple(block.name for block in footprint.blocks)))
    placed = place(footprint, asked)
    check(footprint, asked, placed)
    where = devices(placed)
    assert all(where[name] in (device, DISK if device == "cpu" else device) for name, device in asked.pinned.items())
    alone = tuple(p for p in placed if p.reason == "the device map says so")
    before = {use.device: use.unused for use in measure_use(alone, footprint, asked.accelerators)}
    for use in measure_use(placed, footprint, asked.accelerators):
        # What the map itself puts there may be too much; the planner adds nothing to such a device.
        assert use.device == DISK or use.unused >= 0 or before[use.device] < 0


def test_a_tied_block_follows_its_weight_in_both_directions() -> None:
    for tied in ("head", "embed"):
        footprint = model([(10, 0)] * 2, embedding=30, head=30, tied=tied)
        assert set(devices(place(footprint, request(51))).values()) == {"cuda:0"}
        short = devices(place(footprint, request(50)))
        assert short == {"embed": "cpu", "layers.0": "cuda:0", "layers.1": "cuda:0", "norm": "cuda:0", "head": "cpu"}


def test_a_map_that_parts_tied_blocks_costs_a_copy() -> None:
    footprint = model([(10, 0)] * 4, embedding=30, tied="head")
    placed = place(footprint, request(61, pinned={"embed": "cpu", "head": "cuda:0"}))
    assert [p.weights for p in placed if p.block in ("embed", "head")] == [30, 30]
    assert [p.device for p in placed if p.kind == "layer"] == ["cuda:0"] * 3 + ["cpu"]


def test_a_map_that_pins_one_of_two_tied_blocks_takes_the_other_along() -> None:
    footprint = model([(10, 0)] * 2, embedding=30, tied="head")
    for name in ("embed", "head"):
        where = devices(place(footprint, request(99, 99, pinned={name: "cuda:1"})))
        assert where["embed"] == where["head"] == "cuda:1"


def test_embeddings_alone_never_go_to_an_accelerator() -> None:
    footprint = model([(50, 0)] * 2, embedding=10)
    assert set(devices(place(footprint, request(40), layer_limit=2)).values()) == {"cpu"}


def test_activations_count_once_per_device() -> None:
    footprint = model([(10, 0)] * 4, layer_activations=5, head_activations=3, embedding=10, head=10)
    # Layers and head run one after the other: the larger figure holds for both.
    exact = 4 * 10 + 5 + 1 + 10 + 10
    assert set(devices(place(footprint, request(exact))).values()) == {"cuda:0"}
    assert devices(place(footprint, request(exact - 1)))["embed"] == "cpu"
    uses = measure_use(place(footprint, request(25, 25)), footprint, request(25, 25).accelerators)
    assert [(use.layers, use.activations) for use in uses] == [(2, 5), (2, 5)]


def test_a_head_without_layers_pays_for_itself_alone() -> None:
    footprint = model([(10, 0)] * 2, layer_activations=5, head_activations=3, embedding=10, head=10)
    asked = request(30, pinned={"head": "cuda:0", "layers.0": "cpu", "layers.1": "cpu"})
    uses = measure_use(place(footprint, asked), footprint, (*asked.accelerators, asked.cpu))
    assert [(use.device, use.activations) for use in uses] == [("cuda:0", 3), ("cpu", 5)]


@pytest.mark.parametrize(("copied", "on_cpu"), [(True, 20), (False, 20 + 14)])
def test_what_has_its_home_in_main_memory_counts_there_wherever_its_copy_is(copied: bool, on_cpu: int) -> None:
    footprint = model([(10, 0)] * 2, embedding=0, norm=0, head=0, unmapped=frozenset({"layers.0", "layers.1"}))
    blocks = tuple(
        replace(block, home=7, home_is_copy=copied) if block.kind == "layer" else block for block in footprint.blocks
    )
    footprint = replace(footprint, blocks=blocks)
    for asked, gpu, cpu in ((request(20), 20, 14), (request(10), 10, 7 + on_cpu // 2), (request(), 0, on_cpu)):
        uses = measure_use(place(footprint, asked), footprint, (*asked.accelerators, asked.cpu))
        held = {use.device: use.weights for use in uses}
        assert (held.get("cuda:0", 0), held["cpu"]) == (gpu, cpu)


def test_the_disk_takes_lookups_then_layers_evenly_then_the_rest() -> None:
    footprint = model([(10, 2)] * 6, embedding=20, norm=1, head=10)
    expected = {
        **dict.fromkeys((0,), ""),
        **dict.fromkeys((1, 20), "e"),
        # Two buffers of 10: three layers free 10, four 20.
        **dict.fromkeys((21, 30), "e135"),
        **dict.fromkeys((31, 40), "e1245"),
        **dict.fromkeys((41, 50), "e12345"),
        **dict.fromkeys((51, 60), "e012345"),
        61: "e012345h",
        70: "e012345h",
        71: "e012345hn",
    }
    short = {"embed": "e", "head": "h", "norm": "n", **{f"layers.{at}": str(at) for at in range(6)}}
    for over, names in expected.items():
        asked = request(cpu=20 + 6 * 12 + 11 - over)
        placed = place(footprint, asked)
        assert "".join(short[p.block] for p in placed if p.device == DISK) == "".join(
            sorted(names, key="e012345nh".index)
        ), over
        assert [p.block for p in placed if p.streamed] == [
            p.block for p in placed if p.device == DISK and p.kind in ("layer", "head")
        ]
        cpu = measure_use(placed, footprint, (asked.cpu,))[0]
        assert cpu.streaming == 20 * any(p.streamed for p in placed)
        assert cpu.unused >= 0


def test_what_leaves_no_room_for_buffers_is_left_to_the_kernel() -> None:
    footprint = model([(10, 2)] * 6, embedding=20, norm=1, head=10)
    placed = place(footprint, request(cpu=6 * 2 + 19))
    # All that can be left in the file are 91, of which buffers take 20: one too few. Without them, 80 are enough.
    assert [p.block for p in placed if p.device == DISK] == ["embed", *(f"layers.{at}" for at in range(6))]
    assert not any(p.streamed for p in placed)


def test_a_tied_head_is_streamed_from_its_table() -> None:
    footprint = model([(20, 0)] * 4, embedding=10, norm=0, tied="head")
    asked = request(cpu=45)
    placed = place(footprint, asked)
    assert [(p.block, p.streamed) for p in placed if p.device == DISK] == [
        ("embed", False),
        *((f"layers.{at}", True) for at in range(4)),
        ("head", True),
    ]
    assert measure_use(placed, footprint, (asked.cpu,))[0].used == 2 * 20


def test_a_shared_embedding_is_no_lookup_and_takes_the_head_along() -> None:
    footprint = model([(10, 0)] * 2, embedding=20, norm=0, tied="head")
    assert [p.block for p in place(footprint, request(cpu=39)) if p.device == DISK] == ["layers.1"]
    assert {p.block for p in place(footprint, request(cpu=0)) if p.device != DISK} == {"norm"}


def test_the_disk_is_for_stored_blocks_alone() -> None:
    footprint = model([(10, 0)] * 2, unmapped=frozenset({"layers.0", "layers.1"}))
    assert {p.block for p in place(footprint, request(cpu=0)) if p.device == DISK} == {"embed", "norm", "head"}


def test_the_cpu_computes_what_the_disk_holds() -> None:
    footprint = model([(10, 2)] * 2, layer_activations=5, head_activations=3)
    asked = request(cpu=0)
    cpu, disk = measure_use(place(footprint, asked), footprint, (asked.cpu,))
    assert (cpu.device, cpu.weights, cpu.kv_cache, cpu.activations, cpu.layers) == ("cpu", 0, 4, 5, 0)
    assert (disk.device, disk.weights, disk.kv_cache, disk.layers) == (DISK, 41, 0, 2)


def test_what_does_not_fit_names_the_device_that_is_shortest() -> None:
    fits = DeviceUse("cuda:0", 100, 100, 60, 20, 10, 10, 2)
    short = DeviceUse("cuda:1", 100, 100, 60, 20, 10, 11, 2)
    shorter = DeviceUse("cpu", 1000, 1000, 2000, 0, 0, 0, 2)
    disk = DeviceUse(DISK, 0, 0, 10**9, 0, 0, 0, 2)
    assert check_fits((fits, disk)) is None
    assert check_fits((fits, short, shorter)) == "needs 101 B of cuda:1, which has 100 B"
    error = refuse((fits, short, shorter, disk), "try less")
    assert str(error) == (
        "the model does not fit: it needs 2.00 kB of cpu (weights 2.00 kB, KV cache 0 B, activations 0 B), "
        "which has 1.00 kB"
    )
    assert (error.needed, error.available, error.device, error.hint) == (2000, 1000, "cpu", "try less")


def test_packing_is_over_before_there_is_a_cache() -> None:
    footprint = replace(model([(10, 4), (10, 4)], norm=0, head=0, embedding=0, layer_activations=5), packing=20)
    (cpu,) = measure_use(place(footprint, request(cpu=60)), footprint, (budget("cpu", 60),))
    # 20 while packing, and 8 of cache and 5 of activations after it.
    assert (cpu.activations, cpu.packing, cpu.temporaries, cpu.used) == (5, 20, 20 - 8, 20 + 8 + 12)
    on_gpu = place(footprint, request(60, cpu=60))
    gpu = measure_use(on_gpu, footprint, (budget("cuda:0", 60),))[0]
    assert (gpu.packing, gpu.used) == (0, 20 + 8 + 5)
