"""Plans for several machines, with bytes, layouts and traffic worked out by hand. No test here imports torch."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lyra_emergence.errors import ConfigError, DoesNotFitError
from lyra_emergence.fleet import (
    FleetModel,
    FleetPlan,
    Hardware,
    MachineKind,
    fewest_machines,
    plan_fleet,
    read_machines,
)
from lyra_emergence.fleet.machines import RESERVED_BYTES
from lyra_emergence.fleet.pace import add_up_seconds, traffic_of
from lyra_emergence.fleet.shards import obstacle, shard
from lyra_emergence.footprint import estimate_footprint

from . import paper_checkpoints as paper

if TYPE_CHECKING:
    from pathlib import Path

    from lyra_emergence.checkpoint import CheckpointIndex

GB = 10**9

# Llama 3 70B in bfloat16, by hand: 80 layers of width 8192, 64 heads of 128 over 8 of keys and values, MLP 28672.
QUERIES = 2 * 2 * 8192 * 8192  # and the output
KEYS = 2 * 2 * 1024 * 8192  # and values
MLP = 2 * 3 * 28672 * 8192
NORMS = 2 * 2 * 8192
LAYER = QUERIES + KEYS + MLP + NORMS
TABLE = 2 * 128_256 * 8192  # the embeddings, and as large a head; 128,256 is 2,004 times 64
NORM = 2 * 8192
CACHE = 2 * 2 * 1024 * 8192  # keys and values of 8,192 tokens, a layer
HIDDEN = 2 * 8192
LOGITS = 2 * 128_256


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> CheckpointIndex:
    sizes = {"layers": 80, "hidden": 8192, "inner": 28672, "heads": 64, "key_heads": 8, "vocab": 128_256}
    return paper.llama(tmp_path_factory.mktemp("paper") / "llama-70b", context=131_072, **sizes)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> CheckpointIndex:
    return paper.llama(tmp_path_factory.mktemp("paper") / "tiny", vocab=500)


def model(index: CheckpointIndex, **wanted: Any) -> FleetModel:
    return FleetModel(index, estimate_footprint(index, **wanted))


def plan(index: CheckpointIndex, *machines: str, hardware: Hardware | None = None, **wanted: Any) -> FleetPlan:
    return plan_fleet(model(index, **wanted), read_machines(machines), hardware or Hardware())


def sizes(made: FleetPlan) -> list[tuple[int, int, int, int]]:
    """Tensor, stages, machines and replicas of each layout."""
    return [(x.tensor, len(x.stages), x.machines, x.replicas) for x in made.layouts]


# --- Machines ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "kinds"),
    [
        (["4x24GB"], [(4, 1, 24 * GB)]),
        (["2x8x80GB"], [(2, 8, 80 * GB)]),
        ([" 2 x 8 x 80 GiB "], [(2, 8, 80 * 2**30)]),
        (["1X1000x0.5TB"], [(1, 1000, 500 * GB)]),
        (["8x24GB", "2x4x48GB", "1x48GB"], [(2, 4, 48 * GB), (1, 1, 48 * GB), (8, 1, 24 * GB)]),
    ],
)
def test_machines(written: list[str], kinds: list[tuple[int, int, int]]) -> None:
    assert [(kind.count, kind.gpus, kind.nbytes) for kind in read_machines(written)] == kinds


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (["24GB"], "in '--machines': '24GB' names no machines"),
        (["x24GB"], "in '--machines': 'x24GB' names no machines"),
        (["2x2x2x2GB"], "in '--machines': '2x2x2x2GB' names no machines"),
        (["4x24"], "in '--machines': '4x24' names no machines"),
        (["4x24Gb"], "in '--machines': '24Gb' is bits; write '24GB'"),
        (["4x24G"], "in '--machines': '24G' has no unit; write '24GB' or '24GiB'"),
        (["4x2..4GB"], "in '--machines': '2..4GB' is not an amount of memory; write '6GB' or '6GiB'"),
        (["0x24GB"], "in '--machines': 0x24GB holds nothing; write machines such as 4x24GB"),
        (["4x0GB"], "in '--machines': 4x0GB holds nothing; write machines such as 4x24GB"),
        (["1001x24GB"], "in '--machines': 1,001 GPUs are more than the 1,000 that are planned for together"),
        (
            ["500x24GB", "63x8x80GB"],
            "in '--machines': 1,004 GPUs are more than the 1,000 that are planned for together",
        ),
    ],
)
def test_what_is_no_machine(written: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_machines(written)
    assert str(caught.value) == message


@given(text=st.text(alphabet="0123456789.xX GMTBibk", max_size=30))
def test_any_text_is_machines_or_an_error_of_ours(text: str) -> None:
    try:
        kinds = read_machines([text])
    except ConfigError:
        return
    (kind,) = kinds
    assert 1 <= kind.gpus_in_all <= 1000
    assert 0 <= kind.limit <= kind.nbytes


# --- Bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "weights", "cache"),
    [
        (1, LAYER, CACHE),
        (2, (QUERIES + KEYS + MLP) // 2 + NORMS, CACHE // 2),
        (8, (QUERIES + KEYS + MLP) // 8 + NORMS, CACHE // 8),
        (16, (QUERIES + MLP) // 16 + KEYS // 8 + NORMS, CACHE // 8),  # two GPUs have the same head of keys
        (64, (QUERIES + MLP) // 64 + KEYS // 8 + NORMS, CACHE // 8),
    ],
)
def test_a_gpus_share_of_a_layer(llama_70b: CheckpointIndex, size: int, weights: int, cache: int) -> None:
    shards = shard(model(llama_70b), size)
    assert {(layer.weights, layer.kv_cache, layer.read) for layer in shards.layers} == {(weights, cache, weights)}
    assert len(shards.layers) == 80
    assert (shards.first, shards.last, shards.tied) == (TABLE // size, TABLE // size + NORM, 0)
    assert shards.head_read == shards.last


def test_the_vocabulary_is_filled_up_before_it_is_divided(tiny: CheckpointIndex) -> None:
    whole, half = shard(model(tiny), 1), shard(model(tiny), 2)
    assert whole.first == 500 * 64 * 2
    assert half.first == 512 // 2 * 64 * 2


def test_a_tied_head_is_on_the_last_stage_too(tmp_path: Path) -> None:
    tied = paper.llama(tmp_path / "tied", tied=True)
    shards = shard(model(tied), 2)
    table = 512 * 64 * 2 // 2
    assert (shards.first, shards.last, shards.tied, shards.head_read) == (table, 2 * 64, table, table + 2 * 64)
    assert [
        shards.beside(first=a, last=b) for a, b in ((True, True), (True, False), (False, True), (False, False))
    ] == [
        table + 128,
        table,
        table + 128,
        0,
    ]


def test_one_gpu_takes_what_the_plan_for_one_machine_says(llama_70b: CheckpointIndex) -> None:
    footprint = estimate_footprint(llama_70b)
    (stage,) = plan(llama_70b, "1x200GB").chosen.stages
    assert (stage.weights, stage.kv_cache) == (footprint.weights, footprint.kv_cache)
    assert stage.activations == footprint.activations.of(embedding=True, layer=True, head=True)
    assert stage.weights == 80 * LAYER + 2 * TABLE + NORM
    assert stage.kv_cache == 80 * CACHE
    assert stage.limit == 184 * GB


def test_activations_are_those_of_a_share_of_the_heads(tiny: CheckpointIndex) -> None:
    # A chunk of 1,024 tokens: hidden state, embeddings, normed input; ids; rotary tables; frequencies. In a layer,
    # turning queries and keys is most: queries, keys, values (4, 2, 2 heads of 16), and three of the queries' size.
    whole, half = (shard(model(tiny), size).temporaries(first=False, last=False) for size in (1, 2))
    throughout = 1024 * (3 * 64 * 2 + 3 * 8 + 2 * 16 * 4) + 3 * 16 * 4
    assert whole == throughout + 1024 * max(3 * 128 * 2 + 128, 3 * 64 * 4, (64 + 2 * 32 + 3 * 64) * 2)
    assert half == throughout + 1024 * max(3 * 64 * 2 + 128, 3 * 64 * 4, (32 + 2 * 16 + 3 * 32) * 2)


def test_of_experts_a_token_reads_the_active_ones(tmp_path: Path) -> None:
    index = paper.experts(tmp_path / "moe", layers=2, each=26)
    (layer, _) = shard(model(index), 2).layers
    each = 3 * 256 * 512 * 2 // 2
    router = 26 * 256 * 2
    attention = 4 * 256 * 256 * 2 // 2 + 2 * 256 * 2
    assert layer.weights == attention + router + 26 * each
    assert layer.read == attention + router + 2 * each


def test_packed_weights_are_divided_with_their_scales(llama_70b: CheckpointIndex) -> None:
    packed = model(llama_70b, quantization="4bit")
    whole, half = shard(packed, 1), shard(packed, 2)
    matrices = QUERIES + KEYS + MLP
    scales = 7 * 64  # the table of each of seven matrices
    assert whole.layers[0].weights == matrices // 4 + matrices // 2 // 64 * 4 + scales + NORMS
    assert half.layers[0].weights == (whole.layers[0].weights - NORMS) // 2 + NORMS


@pytest.mark.parametrize(
    ("heads", "key_heads", "inner", "size", "reason"),
    [
        (6, 2, 128, 4, "6 attention heads are not divided by 4"),
        (12, 4, 128, 6, "4 heads of keys and values are neither divided by 6 nor divide it"),
        (4, 2, 130, 4, "the width of an MLP, 130, is not divided by 4"),
        (4, 2, 128, 4, ""),
        (6, 2, 130, 1, ""),
    ],
)
def test_sizes_that_divide_no_layer(  # noqa: PLR0917
    tmp_path: Path, heads: int, key_heads: int, inner: int, size: int, reason: str
) -> None:
    index = paper.llama(tmp_path / "odd", heads=heads, key_heads=key_heads, inner=inner, hidden=16 * heads)
    assert obstacle(model(index), size) == reason


def test_a_latent_is_cached_whole_on_every_gpu(tmp_path: Path) -> None:
    config = {
        "model_type": "deepseek_v3",
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    }
    index = paper.llama(tmp_path / "latent", config=config)
    whole, half = shard(model(index), 1), shard(model(index), 2)
    assert half.layers[0].kv_cache == whole.layers[0].kv_cache == 1024 * (32 + 16) * 2


# --- Layouts -------------------------------------------------------------------------------------


def test_two_machines_of_eight(llama_70b: CheckpointIndex) -> None:
    made = plan(llama_70b, "2x8x80GB")
    assert sizes(made) == [(8, 1, 1, 2), (4, 1, 1, 4), (2, 1, 1, 8), (1, 2, 1, 8)]
    assert made.reason == "the fastest for one conversation"
    best = made.chosen
    (stage,) = best.stages
    assert stage.weights == 80 * ((QUERIES + KEYS + MLP) // 8 + NORMS) + 2 * TABLE // 8 + NORM
    assert stage.kv_cache == 80 * CACHE // 8
    assert (stage.limit, stage.reserved, best.idle) == (73_600_000_000, RESERVED_BYTES, 0)
    room = stage.limit - stage.weights - stage.activations - RESERVED_BYTES
    assert best.sequences == room // (80 * CACHE // 8)


def test_a_pipeline_over_machines_with_one_gpu(llama_70b: CheckpointIndex) -> None:
    made = plan(llama_70b, "16x24GB")
    best = made.chosen
    assert sizes(made) == [(1, 7, 7, 2)]
    assert made.reason == "the only layout that holds the model"
    # The ends have a table of 2.1 GB each, more than a layer: they take fewer.
    assert [stage.layers for stage in best.stages] == [10, 12, 12, 12, 12, 12, 10]
    assert [stage.machine for stage in best.stages] == list(range(7))
    assert best.stages[0].weights == 10 * LAYER + TABLE
    assert best.stages[1].weights == 12 * LAYER
    assert best.stages[-1].weights == 10 * LAYER + TABLE + NORM
    assert best.idle == 2
    assert best.fullest in best.stages[1:-1]


def test_stages_on_a_machine_with_several_gpus_are_as_many_as_on_the_others(llama_70b: CheckpointIndex) -> None:
    found = {layout.tensor: layout for layout in plan(llama_70b, "4x4x24GB").layouts}
    assert {size: (len(x.stages), x.machines) for size, x in found.items()} == {1: (8, 2), 2: (4, 2), 4: (2, 2)}
    assert [stage.machine for stage in found[1].stages] == [0] * 4 + [1] * 4
    assert (found[4].gpus, found[4].gpus_per_machine, found[4].replicas) == (8, 4, 2)
    assert (found[1].traffic.within, found[1].traffic.between) == (6, 1)


def test_machines_of_several_kinds_share_one_replica(llama_70b: CheckpointIndex) -> None:
    made = plan(llama_70b, "2x48GB", "5x24GB")
    best = made.chosen
    assert sizes(made) == [(1, 5, 5, 1)]  # of 24 GB alone, it would be 7 machines
    assert [stage.limit for stage in best.stages] == [44_160_000_000] * 2 + [22_080_000_000] * 3
    assert sum(stage.layers for stage in best.stages) == 80
    assert min(stage.unused for stage in best.stages) >= 0
    assert best.idle == 2


def test_machines_of_one_kind_are_enough_where_they_are(llama_70b: CheckpointIndex) -> None:
    made = plan(llama_70b, "1x8x80GB", "3x24GB")
    assert made.layouts[0].idle == 3
    assert made.notes[-1] == "3 GPUs would be idle"


def test_what_does_not_fit_is_told_how_many_machines_would_hold_it(llama_70b: CheckpointIndex) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        plan(llama_70b, "4x24GB")
    error = caught.value
    assert str(error) == (
        "the model does not fit 4 machines with one GPU of 24.0 GB each: weights and KV cache alone are 144 GB, and "
        "its layers cannot be divided so that each GPU holds its part within 92%, 88.3 GB in all"
    )
    assert error.hint == (
        "7 machines with one GPU of 24.0 GB each would hold it; or try a shorter context (--context), or --4bit, or "
        "larger GPUs"
    )
    assert (error.needed, error.available) == (80 * (LAYER + CACHE) + 2 * TABLE + NORM, 4 * 22_080_000_000)


def test_no_number_of_machines_holds_a_layer_that_is_too_large(llama_70b: CheckpointIndex) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        plan(llama_70b, "1000x2GB")
    assert caught.value.hint == "try a shorter context (--context), or --4bit, or larger GPUs"
    assert fewest_machines(model(llama_70b), MachineKind(1, 1, 2 * GB), Hardware()) is None


def test_the_fewest_machines(llama_70b: CheckpointIndex) -> None:
    found = fewest_machines(model(llama_70b), MachineKind(1, 4, 24 * GB), Hardware())
    assert found is not None
    assert (found.machines, found.tensor, len(found.stages)) == (2, 4, 2)
    assert [x.machines for x in plan(llama_70b, "2x4x24GB").layouts] == [2, 2, 2]
    with pytest.raises(DoesNotFitError):
        plan(llama_70b, "1x4x24GB")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 30),
    more=st.integers(1, 30),
    gpus=st.sampled_from([1, 2, 4, 8]),
    size=st.sampled_from([16, 24, 48, 80]),
)
def test_more_machines_are_never_worse(llama_70b: CheckpointIndex, count: int, more: int, gpus: int, size: int) -> None:
    def found(machines: int) -> FleetPlan | None:
        try:
            return plan(llama_70b, f"{machines}x{gpus}x{size}GB")
        except DoesNotFitError:
            return None

    few, many = found(count), found(count + more)
    if few is None:
        return
    assert many is not None
    assert many.chosen.speed.decode_tokens_per_second.likely >= few.chosen.speed.decode_tokens_per_second.likely
    assert sum(x.replicas for x in many.layouts) >= sum(x.replicas for x in few.layouts)
    assert all(stage.unused >= 0 for layout in many.layouts for stage in layout.stages)
    assert all(layout.sequences >= 1 for layout in many.layouts)
    assert all(sum(stage.layers for stage in layout.stages) == 80 for layout in many.layouts)
    for layout in many.layouts:
        assert layout.idle + layout.replicas * layout.gpus == (count + more) * gpus


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contexts=st.tuples(st.integers(1, 131_072), st.integers(1, 131_072)), size=st.sampled_from([1, 4, 16]))
def test_a_longer_context_never_takes_less(llama_70b: CheckpointIndex, contexts: tuple[int, int], size: int) -> None:
    short, long = (shard(model(llama_70b, context_length=context), size) for context in sorted(contexts))
    assert short.layers[0].kv_cache <= long.layers[0].kv_cache
    assert short.layers[0].weights == long.layers[0].weights
    assert short.layers[0].kv_cache == 2 * 2 * 1024 // min(size, 8) * min(contexts)


def test_a_thousand_gpus(llama_70b: CheckpointIndex) -> None:
    made = plan(llama_70b, "125x8x80GB", context_length=131_072)
    assert sizes(made)[0] == (8, 1, 1, 125)
    assert made.chosen.idle == 0
    assert sizes(plan(llama_70b, "1x1000x24GB"))[0] == (64, 1, 1, 15)


# --- Traffic and speed ---------------------------------------------------------------------------


def test_traffic_by_hand(llama_70b: CheckpointIndex) -> None:
    whole = traffic_of(model(llama_70b), 8, [80], [0])
    # Two sums a layer and one of the embeddings, of which each GPU sends 14/8 in a ring of 8; its part of the logits.
    assert whole.reductions == 161
    assert whole.per_gpu == 161 * HIDDEN * 14 // 8 + LOGITS // 8
    assert (whole.per_boundary, whole.within, whole.between) == (0, 0, 0)
    divided = traffic_of(model(llama_70b), 4, [39, 41], [0, 1])
    assert divided.reductions == 161
    assert divided.per_gpu == math.ceil(82 * HIDDEN * 6 / 4) + LOGITS // 4
    assert (divided.per_boundary, divided.within, divided.between) == (HIDDEN, 0, 1)
    piped = traffic_of(model(llama_70b), 1, [20] * 4, [0, 0, 1, 1])
    assert (piped.reductions, piped.per_gpu, piped.per_boundary) == (0, 0, HIDDEN)
    assert (piped.within, piped.between) == (2, 1)


@pytest.mark.parametrize(
    ("nbytes", "size", "seconds"),
    [
        (10**6, 1, 0.0),
        (1000, 8, 3 * (5e-6 + 1e-6)),  # three steps with all of it
        (10**9, 8, 14 * 5e-6 + 14 / 8),  # fourteen with an eighth each
        (1000, 2, 5e-6 + 1e-6),
    ],
)
def test_adding_up_takes_the_shorter_way(nbytes: int, size: int, seconds: float) -> None:
    assert add_up_seconds(nbytes, size, 1e9, 5e-6) == pytest.approx(seconds)


def test_speed_by_hand(llama_70b: CheckpointIndex) -> None:
    hardware = Hardware(bandwidth=2e12, flops=3e14, gpu_link=1e11, link=1.25e10, assumed=())
    made = plan(llama_70b, "1x8x80GB", hardware=hardware)
    (layout,) = [x for x in made.layouts if x.tensor == 8]
    read = 80 * ((QUERIES + KEYS + MLP) // 8 + NORMS) + TABLE // 8 + NORM + 80 * CACHE // 8 // 2
    adding = 161 * 3 * (5e-6 + HIDDEN / 1e11)
    logits = 5e-6 + LOGITS * 7 / 8 / 1e11
    token = read / (0.75 * 2e12) + 80 * 30e-6 + adding + logits
    band = layout.speed.decode_tokens_per_second
    assert band.likely == pytest.approx(1 / token)
    assert band.low < band.likely < band.high
    products = 2 * 1024 * 80 * ((QUERIES + KEYS + MLP) // 8 + NORMS) / 2
    adding = 161 * (14 * 5e-6 + 14 / 8 * 1024 * HIDDEN / 1e11)
    chunk = products / (0.5 * 3e14) + 80 * 30e-6 + adding + logits
    assert layout.speed.prefill_tokens_per_second.likely == pytest.approx(1024 / chunk)


def test_a_slower_network_makes_a_pipeline_slower(llama_70b: CheckpointIndex) -> None:
    fast, slow = (plan(llama_70b, "7x24GB", hardware=Hardware(link=link)).chosen.speed for link in (1e10, 1e7))
    assert slow.decode_tokens_per_second.likely < fast.decode_tokens_per_second.likely
    assert slow.prefill_tokens_per_second.likely < fast.prefill_tokens_per_second.likely / 2


def test_of_layouts_that_are_as_fast_the_one_with_fewer_gpus_is_chosen(tiny: CheckpointIndex) -> None:
    # So small a model gains nothing from a second GPU.
    made = plan(tiny, "1x4x24GB")
    assert sizes(made)[0] == (1, 1, 1, 4)
    alone = plan(tiny, "1x24GB")
    assert (sizes(alone), alone.reason) == ([(1, 1, 1, 1)], "one GPU holds the model")


def test_what_was_not_said_is_said_to_be_assumed(llama_70b: CheckpointIndex) -> None:
    assert plan(llama_70b, "8x24GB").notes[0] == (
        "assumed: a GPU reads its memory at 1.00 TB/s (--bandwidth); a GPU computes 100 TFLOP/s (--tflops); GPUs of a "
        "machine exchange 31.5 GB/s (--gpu-link); machines exchange 1.25 GB/s (--link)"
    )
    told = Hardware(bandwidth=2e12, assumed=("link",))
    assert plan(llama_70b, "8x24GB", hardware=told).notes[0] == "assumed: machines exchange 1.25 GB/s (--link)"
    assert not any("(--" in note for note in plan(llama_70b, "8x24GB", hardware=Hardware(assumed=())).notes)


# --- JSON ----------------------------------------------------------------------------------------


def test_the_form_of_the_json(llama_70b: CheckpointIndex) -> None:
    data = json.loads(json.dumps(plan(llama_70b, "2x4x24GB", "1x24GB", batch=2).to_json()))
    assert {key: data[key] for key in ("format", "model", "dtype", "quantization", "context_length", "batch")} == {
        "format": "lyra.fleet/1",
        "model": "llama-70b",
        "dtype": "bfloat16",
        "quantization": None,
        "context_length": 8192,
        "batch": 2,
    }
    assert data["weights"] == 80 * LAYER + 2 * TABLE + NORM
    assert data["machines"] == [
        {"count": 2, "gpus": 4, "nbytes": 24 * GB, "limit": 22_080_000_000},
        {"count": 1, "gpus": 1, "nbytes": 24 * GB, "limit": 22_080_000_000},
    ]
    assert set(data["hardware"]) == {"bandwidth", "flops", "gpu_link", "link", "assumed"}
    assert set(data) == {
        *("format", "model", "dtype", "quantization", "context_length", "batch", "weights", "machines", "hardware"),
        *("layouts", "reason", "passed_over", "notes"),
    }
    layout = data["layouts"][0]
    assert set(layout) == {
        *("tensor_parallel", "pipeline_parallel", "replicas", "machines", "gpus", "idle_gpus", "sequences", "stages"),
        *("traffic", "speed"),
    }
    assert set(layout["traffic"]) == {"reductions", "per_gpu", "per_boundary", "within", "between"}
    assert set(layout["speed"]) == {"decode_tokens_per_second", "prefill_tokens_per_second", "rests_on"}
    for stage in layout["stages"]:
        parts = ("weights", "kv_cache", "activations", "reserved")
        assert stage["used"] == sum(stage[part] for part in parts)
        assert stage["unused"] == stage["limit"] - stage["used"] >= 0
        assert set(stage) == {"machine", "layers", "limit", *parts, "used", "unused"}
