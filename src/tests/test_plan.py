"""Plans with hand-computed bytes and exact maps. No test here imports torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from lyra_emergence.config.model import EXAMPLE, ModelConfig
from lyra_emergence.errors import ConfigError, DoesNotFitError
from lyra_emergence.machine import Device, Machine
from lyra_emergence.plan import Plan, Rung, make_plan

from . import paper_checkpoints as paper

if TYPE_CHECKING:
    from pathlib import Path

    from lyra_emergence.checkpoint import CheckpointIndex

GB = 10**9

# phi-2 in float16, by hand. A layer: 4 projections 2560 x 2560 and an MLP 2560 x 10240 x 2 with their biases, one norm.
LAYER = 2 * (4 * (2560 * 2560 + 2560) + 2560 * 10240 * 2 + 10240 + 2560 + 2 * 2560)
EMBEDDING = 2 * 51200 * 2560
NORM = 2 * 2 * 2560
HEAD = 2 * (51200 * 2560 + 51200)
CACHE = 2 * 2048 * 2560 * 2  # keys and values of 2048 tokens, a layer
# A chunk of 1,024 tokens: hidden state, embeddings and normed input; ids and the like; rotary tables; a mask. In a
# layer the MLP is most: its input and four tensors of its width.
BUSY = 1024 * (2 * 3 * 2560 + 3 * 8 + 2 * 4 * 80 + 2048 + 2 * (2560 + 4 * 10240)) + 3 * 80 * 4
# Of these, what has one size in every dtype.
SAME = 1024 * (3 * 8 + 2 * 4 * 80 + 2048) + 3 * 80 * 4
LOOKUP = 1024 * 2 * 2 * 2560
WHOLE = EMBEDDING + 32 * (LAYER + CACHE) + NORM + HEAD + BUSY
LAYERS = [f"model.layers.{i}" for i in range(32)]


def gpu(number: int, free: int, *, total: int | None = None, reserved: int = 0) -> Device:
    return Device(f"cuda:{number}", "cuda", number, total or free, free, reserved, "GPU")


def machine(*gpus: int, cpu: int = 16 * GB, notes: tuple[str, ...] = ()) -> Machine:
    memory = Device("cpu", "cpu", None, cpu, cpu, 0, "CPU")
    return Machine(tuple(gpu(number, free) for number, free in enumerate(gpus)), memory, notes)


@pytest.fixture(scope="module")
def phi2(tmp_path_factory: pytest.TempPathFactory) -> CheckpointIndex:
    return paper.phi2(tmp_path_factory.mktemp("paper") / "phi-2")


def plan(index: CheckpointIndex, on: Machine, **settings: Any) -> Plan:
    return make_plan(ModelConfig(**settings), index, on)


def rung(made: Plan, name: str) -> Rung:
    return next(r for r in made.rungs if r.name == name)


def where(placements: Any) -> dict[str, str]:
    return {p.block: p.device for p in placements}


def ladder(made: Plan) -> list[tuple[str, bool, str]]:
    return [(r.name, r.fits, r.reason) for r in made.rungs]


def documented_map(layers: int, device: str = "cuda:0") -> dict[str, str]:
    return {
        "model.embed_tokens": device,
        **{name: device if i < layers else "cpu" for i, name in enumerate(LAYERS)},
        "model.final_layernorm": "cpu",
        "lm_head": "cpu",
    }


# --- The documented example ----------------------------------------------------------------------


@pytest.mark.parametrize(("free", "start"), [(8 * GB, "full"), (5 * GB, "planned"), (4 * GB, "planned")])
def test_the_middle_rung_for_16_layers_is_the_documented_map(phi2: CheckpointIndex, free: int, start: str) -> None:
    made = plan(phi2, machine(free), gpu_layers_fallback=16)
    assert made.rung.name == start
    assert where(rung(made, "fallback").placements) == documented_map(16)
    assert [p.block for p in rung(made, "fallback").placements] == [*documented_map(16)]


def test_as_the_start_rung_the_documented_map_has_transformers_form(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(5 * GB), gpu_layers_fallback=16, device_map="cuda")
    assert made.rung.name == "fallback"
    assert made.device_map() == {
        "model.embed_tokens": 0,
        **dict.fromkeys(LAYERS[:16], 0),
        **dict.fromkeys(LAYERS[16:], "cpu"),
        "model.final_layernorm": "cpu",
        "lm_head": "cpu",
    }


def test_the_documented_file_on_one_gpu(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(8 * GB), **EXAMPLE)
    assert ladder(made) == [
        ("full", False, "needs 6.34 GB of cuda:0, which has 6.00 GB"),
        ("planned", True, "as many layers as the budgets allow"),
        ("fallback", True, "gpu_layers_fallback is 16"),
        ("cpu", True, "no accelerator memory needed"),
    ]
    assert made.notes == (
        (
            "max_new_tokens 4000 is more than the context of 2048 tokens has room for: "
            "answers are clamped to what the prompt leaves"
        ),
    )


def test_the_documented_file_without_a_gpu_is_one_warning_and_the_cpu(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(cpu=20 * GB), **EXAMPLE)
    assert set(where(made.placements).values()) == {"cpu"}
    assert made.notes[0] == "this machine lacks devices that the configuration names, ignored: 'max_memory.0'"
    assert len(made.notes) == 2


@pytest.mark.parametrize(("wanted", "said"), [(2047, False), (2048, True), (4000, True), (None, False)])
def test_more_new_tokens_than_context_is_said_once(phi2: CheckpointIndex, wanted: int | None, said: bool) -> None:
    kwargs = {} if wanted is None else {"max_new_tokens": wanted}
    note = (
        f"max_new_tokens {wanted} is more than the context of 2048 tokens has room for: "
        "answers are clamped to what the prompt leaves"
    )
    assert plan(phi2, machine(8 * GB), pipeline_kwargs=kwargs).notes == ((note,) if said else ())


# --- Bytes ---------------------------------------------------------------------------------------


def test_the_whole_model_to_the_byte(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(WHOLE))
    use = made.devices[0]
    assert made.rung.name == "full"
    assert set(made.device_map().values()) == {0}
    assert (use.weights, use.kv_cache) == (EMBEDDING + 32 * LAYER + NORM + HEAD, 32 * CACHE)
    assert (use.activations, use.reserved, use.used, use.unused) == (BUSY, 0, WHOLE, 0)


def test_one_byte_less_leaves_the_embeddings_behind(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(WHOLE - 1))
    assert made.rung.name == "planned"
    assert where(made.placements) == {**dict.fromkeys(documented_map(32), "cuda:0"), "model.embed_tokens": "cpu"}
    assert made.placements[0].reason == "no accelerator has room left"
    assert (made.devices[1].weights, made.devices[1].activations) == (EMBEDDING, LOOKUP)


@pytest.mark.parametrize("count", [1, 2, 15, 31])
def test_layers_fill_the_budget_to_the_byte(phi2: CheckpointIndex, count: int) -> None:
    exact = BUSY + count * (LAYER + CACHE)
    for spare, held in ((0, count), (-1, count - 1)):
        made = plan(phi2, machine(exact + spare), device_map="auto")
        assert sum(p.device == "cuda:0" for p in made.placements) == held
        assert made.devices[0].layers == held


def test_reserved_bytes_count_where_a_device_is_used(phi2: CheckpointIndex) -> None:
    memory = machine().cpu
    for reserved, name in ((600 * 10**6, "full"), (600 * 10**6 + 1, "planned")):
        on = Machine((gpu(0, WHOLE + 600 * 10**6, reserved=reserved),), memory)
        assert plan(phi2, on).rung.name == name
    unused = plan(phi2, Machine((gpu(0, GB, reserved=GB),), memory)).devices[0]
    assert (unused.used, unused.reserved) == (0, 0)


def test_two_gpus_of_different_size_hold_contiguous_layers(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(3 * GB, 4 * GB))
    devices = where(made.placements)
    first = (3 * GB - BUSY) // (LAYER + CACHE)
    assert [devices[name] for name in LAYERS] == ["cuda:0"] * first + ["cuda:1"] * (32 - first)
    assert (devices["model.final_layernorm"], devices["lm_head"]) == ("cuda:1", "cuda:1")
    assert made.rung.name == "full"
    assert made.device_map()["lm_head"] == 1


def test_three_gpus_and_the_cpu(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(GB, GB // 5, 2 * GB))
    devices = where(made.placements)
    one, two = ((size - BUSY) // (LAYER + CACHE) for size in (GB, 2 * GB))
    assert [devices[n] for n in LAYERS] == ["cuda:0"] * one + ["cuda:2"] * two + ["cpu"] * (32 - one - two)
    assert rung(made, "full").reason == "needs 6.55 GB of cuda:0 and cuda:1 and cuda:2, which have 3.20 GB"


@pytest.mark.parametrize(("bits", "matrix"), [("8bit", lambda n, rows: n + 4 * rows), ("4bit", None)])
def test_quantized_layers(phi2: CheckpointIndex, bits: str, matrix: Any) -> None:
    def packed(rows: int, columns: int) -> int:
        n = rows * columns
        return matrix(n, rows) if matrix else n // 2 + 4 * n // 64 + 64

    layer = 4 * packed(2560, 2560) + packed(10240, 2560) + packed(2560, 10240)
    layer += 2 * (4 * 2560 + 10240 + 2560 + 2 * 2560)  # biases and the norm stay in float16
    made = plan(phi2, machine(8 * GB), **{f"load_in_{bits}": True})
    assert made.footprint.quantization == bits
    assert {p.weights for p in made.placements if p.kind == "layer"} == {layer}
    assert (made.placements[0].weights, made.placements[-1].weights) == (EMBEDDING, HEAD)


def test_a_tied_head_is_counted_once_and_stays_with_its_weight(tmp_path: Path) -> None:
    index = paper.llama(tmp_path, tied=True)
    made = plan(index, machine(10**8))
    assert made.placements[-1].weights == 0
    assert made.placements[-1].device == made.placements[0].device == "cuda:0"
    table = 512 * 64 * 2
    assert made.devices[0].weights == sum(block.nbytes for block in index.layers) + table + 64 * 2
    short = plan(index, machine(made.devices[0].used - 1))
    assert where(short.placements)["model.embed_tokens"] == where(short.placements)["lm_head"] == "cpu"


# --- device_map ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wish", [None, "auto", "balanced", "balanced_low_0", "sequential"])
def test_automatic_maps_mean_the_same(phi2: CheckpointIndex, wish: str | None) -> None:
    assert plan(phi2, machine(5 * GB), device_map=wish) == plan(phi2, machine(5 * GB))


def test_cpu_uses_no_gpu(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(80 * GB), device_map="cpu", gpu_layers_fallback=16)
    assert ladder(made) == [("cpu", True, "no accelerator to use")]
    assert {p.reason for p in made.placements} == {"no accelerator to use"}
    assert [use.device for use in made.devices] == ["cpu"]
    assert made.device_map() == dict.fromkeys(documented_map(0), "cpu")


def test_cuda_1_uses_that_gpu_alone(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(80 * GB, 8 * GB), device_map="cuda:1")
    assert made.device_map() == dict.fromkeys(documented_map(0), 1)
    assert [use.device for use in made.devices] == ["cuda:1", "cpu"]


def test_cuda_is_the_first_gpu(phi2: CheckpointIndex) -> None:
    assert set(plan(phi2, machine(8 * GB, 80 * GB), device_map="cuda").device_map().values()) == {0}


def test_mps(phi2: CheckpointIndex) -> None:
    on = Machine((Device("mps", "mps", 0, 12 * GB, 12 * GB, 0, "Apple GPU"),), machine().cpu)
    for wish in ("mps", "auto", {"": "mps"}, {"": 0}):
        assert set(plan(phi2, on, device_map=wish).device_map().values()) == {"mps"}


@pytest.mark.parametrize(("wish", "named"), [("cuda", "cuda"), ("cuda:1", "cuda:1"), ("mps", "mps")])
def test_a_whole_device_that_is_not_there_is_one_warning(phi2: CheckpointIndex, wish: str, named: str) -> None:
    made = plan(phi2, machine(), device_map=wish, max_memory={"0": "6GB", "1": "6GB"})
    assert made.rung.name == "cpu"
    lacking = [note for note in made.notes if "lacks devices" in note]
    assert len(lacking) == 1
    assert lacking[0].endswith(f"'max_memory.0', 'max_memory.1', 'device_map' ({made_key(named)})")


def made_key(named: str) -> str:
    """The form that the configuration keeps a device in."""
    return str(ModelConfig(device_map=named).device_map)


def test_a_whole_device_that_is_too_small_steps_down_and_says_so(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(5 * GB), device_map="cuda")
    assert ladder(made) == [
        ("full", False, "needs 6.34 GB of cuda:0, which has 5.00 GB"),
        ("fallback", True, "as many layers as the budgets allow"),
        ("cpu", True, "no accelerator memory needed"),
    ]
    count = (5 * GB - EMBEDDING - BUSY) // (LAYER + CACHE)
    assert where(made.placements) == documented_map(count)
    assert made.notes == ("the device map does not fit: needs 6.34 GB of cuda:0, which has 5.00 GB",)


def test_an_exact_map_is_followed(phi2: CheckpointIndex) -> None:
    wish: dict[str, str | int] = {
        name: ("cuda:1" if i % 2 else 0) if i < 20 else "cpu" for i, name in enumerate(documented_map(0))
    }
    made = plan(phi2, machine(8 * GB, 8 * GB), device_map=wish)
    expected = {name: 1 if device in (1, "cuda:1") else device for name, device in wish.items()}
    assert made.device_map() == expected
    assert {p.reason for p in made.placements} == {"the device map says so"}
    assert made.rung.name == "planned"


def test_the_longest_prefix_wins(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(8 * GB, 8 * GB), device_map={"": "cpu", "model": 0, "model.layers.7": 1})
    assert made.device_map() == {**dict.fromkeys(documented_map(0), 0), "model.layers.7": 1, "lm_head": "cpu"}


def test_a_partial_map_leaves_the_rest_to_the_planner(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(8 * GB), device_map={"model.layers.3": "cpu", "lm_head": "cpu"})
    assert [name for name, device in where(made.placements).items() if device == "cpu"] == ["model.layers.3", "lm_head"]
    small = plan(phi2, machine(2 * GB), device_map={"model.embed_tokens": 0})
    count = (2 * GB - EMBEDDING - BUSY) // (LAYER + CACHE)
    assert where(small.placements) == documented_map(count)
    assert small.placements[-1].reason == "runs after the last layer, which is on the CPU"


def test_a_map_that_does_not_fit_falls_to_the_next_rung_and_says_so(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(3 * GB), device_map={"model": 0, "lm_head": "cpu"}, gpu_layers_fallback=4)
    assert where(made.placements) == documented_map(4)
    needed = "needs 6.08 GB of cuda:0, which has 3.00 GB"
    assert ladder(made)[0] == ("planned", False, needed)
    assert made.notes == (f"the device map does not fit: {needed}",)


def test_a_map_on_the_cpu_never_falls_back_to_a_gpu(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(8 * GB), device_map={"": "cpu"})
    assert [r.name for r in made.rungs] == ["planned", "cpu"]


def test_a_map_with_devices_that_are_not_there_is_one_warning(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(), device_map={**dict.fromkeys(LAYERS, 0), "lm_head": "cuda:1"}, max_memory={"0": "6GB"})
    assert set(made.device_map().values()) == {"cpu"}
    assert made.notes == (
        (
            "this machine lacks devices that the configuration names, ignored: 'max_memory.0' and 32 more, "
            "'device_map' for lm_head (1)"
        ),
    )


def test_a_map_that_names_unknown_modules_lists_every_problem(phi2: CheckpointIndex) -> None:
    wish = {"model.layer.3": 0, "model.layers.0.mlp": "cpu", "transformer": 0, "lm_head": "cpu"}
    with pytest.raises(ConfigError) as caught:
        plan(phi2, machine(), device_map=wish)
    assert str(caught.value).splitlines() == [
        "the device map does not match the model:",
        "  in 'device_map.model.layer.3': the model has no such module; did you mean 'model.layers.3'?",
        (
            "  in 'device_map.model.layers.0.mlp': it is part of block 'model.layers.0', which is placed whole; write "
            "'model.layers.0'"
        ),
        "  in 'device_map.transformer': the model has no such module; its blocks are model.embed_tokens ... lm_head",
    ]
    assert caught.value.exit_code == 2


# --- max_memory ----------------------------------------------------------------------------------


def test_budgets_are_honored_per_device(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(80 * GB, 80 * GB, cpu=80 * GB), max_memory={"0": "1GB", "1": "2GiB", "cpu": "50%"})
    assert [(use.device, use.limit) for use in made.devices] == [
        ("cuda:0", GB),
        ("cuda:1", 2 * 2**30),
        ("cpu", 40 * GB),
    ]
    assert [use.layers for use in made.devices[:2]] == [(limit - BUSY) // (LAYER + CACHE) for limit in (GB, 2 * 2**30)]
    assert made.notes == ()


def test_a_budget_for_one_device_leaves_the_other_to_the_planner(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(80 * GB, 6 * GB), max_memory={"0": "1GB"})
    count = (GB - BUSY) // (LAYER + CACHE)
    assert [where(made.placements)[name] for name in LAYERS] == ["cuda:0"] * count + ["cuda:1"] * (32 - count)
    assert made.request.accelerators[0].reason == "max_memory 1.00 GB"
    assert made.request.accelerators[1].reason == "6.00 GB free"


def test_a_budget_above_what_is_free_is_cut_with_one_note_each(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(5 * GB, cpu=8 * GB), max_memory={"0": "6GB", "cpu": "16GB"})
    assert made.notes == (
        "max_memory of cuda:0 is 6.00 GB, but 5.00 GB is free: planned with 5.00 GB",
        "max_memory of cpu is 16.0 GB, but 8.00 GB is free: planned with 8.00 GB",
    )
    assert [use.limit for use in made.devices] == [5 * GB, 8 * GB]


def test_a_budget_of_zero_is_none_of_it(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(8 * GB), max_memory={"0": 0})
    assert made.rung.name == "cpu"
    assert made.notes == ()


def test_the_cpu_is_what_the_machine_says_it_is(phi2: CheckpointIndex) -> None:
    note = "a control group limits this process to 2.00 GB of 64.0 GB RAM"
    made = plan(phi2, machine(cpu=2 * GB, notes=(note,)))
    assert made.notes == (note,)
    assert (made.devices[0].limit, made.devices[1].device) == (2 * GB, "disk")


# --- The disk, and what does not fit ---------------------------------------------------------------


def test_what_main_memory_cannot_hold_stays_in_the_file(phi2: CheckpointIndex) -> None:
    whole, short = WHOLE - EMBEDDING, WHOLE - EMBEDDING - 1
    assert [p.block for p in plan(phi2, machine(cpu=whole)).placements if p.device == "disk"] == ["model.embed_tokens"]
    made = plan(phi2, machine(cpu=short))
    # Two buffers for three layers: one less does not free any memory.
    spilled = [p for p in made.placements if p.device == "disk"]
    layers = ["model.layers.10", "model.layers.21", "model.layers.31"]
    assert [(p.block, p.streamed) for p in spilled] == [
        ("model.embed_tokens", False),
        *((layer, True) for layer in layers),
    ]
    assert {p.reason.partition(": ")[0] for p in spilled} == {"main memory cannot hold it (6.08 GB free)"}
    assert [p.reason.partition(": ")[2] for p in spilled] == [
        "read from the file as it is used",
        *["read from the file ahead of its use"] * 3,
    ]
    cpu, disk = made.devices
    assert (cpu.kv_cache, cpu.activations, cpu.layers, cpu.streaming) == (32 * CACHE, BUSY, 29, 2 * LAYER)
    assert cpu.used == WHOLE - EMBEDDING - LAYER
    assert (disk.weights, disk.layers, disk.limit) == (EMBEDDING + 3 * LAYER, 3, 0)


def test_converted_and_quantized_blocks_never_go_to_disk(phi2: CheckpointIndex) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        plan(phi2, machine(cpu=4 * GB), dtype="float32", context_length=2048)
    assert caught.value.needed == 2 * (WHOLE - SAME) + SAME
    made = plan(phi2, machine(cpu=int(4.5 * GB)), load_in_8bit=True)
    assert {p.kind for p in made.placements if p.device == "disk"} <= {"embedding", "norm", "head"}
    message = "only weights in their stored form can stay on disk:\n  in 'device_map': model.layers.31 is converted"
    with pytest.raises(ConfigError, match=message):
        plan(phi2, machine(8 * GB), load_in_4bit=True, device_map={"": 0, "model.layers.31": "disk"})


def test_a_map_may_leave_stored_blocks_on_disk(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(), device_map={"": "cpu", "model.embed_tokens": "disk"})
    assert made.device_map()["model.embed_tokens"] == "disk"
    layers = [f"model.layers.{at}" for at in (3, 4, 5)]
    for count, streamed in ((2, []), (3, layers)):
        made = plan(phi2, machine(), device_map={"": "cpu", **dict.fromkeys(layers[:count], "disk")})
        assert [p.block for p in made.placements if p.streamed] == streamed
        assert {p.block for p in made.placements if p.device == "disk"} == set(layers[:count])
        assert made.devices[0].streaming == bool(streamed) * 2 * LAYER


def test_an_open_context_is_shortened_and_said(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(cpu=500 * 10**6))
    assert made.context_length == 1024
    assert made.notes == ("the context is shortened to 1024 tokens: 2048 do not fit",)


def test_a_context_that_was_asked_for_is_never_shortened(phi2: CheckpointIndex) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        plan(phi2, machine(cpu=500 * 10**6), context_length=2048)
    error = caught.value
    assert (error.needed, error.available, error.device) == (32 * CACHE + BUSY, 500 * 10**6, "cpu")
    assert str(error) == (
        "the model does not fit: it needs 779 MB of cpu (weights 0 B, KV cache 671 MB, activations 108 MB), "
        "which has 500 MB"
    )
    tries, machines, *_ = error.hint.splitlines()
    assert tries == "try a shorter context (--context 512), or a smaller model"
    assert machines == "1 machine with one GPU of 24.0 GB would hold it"
    assert error.exit_code == 3


def test_a_context_beyond_the_model_is_refused(phi2: CheckpointIndex) -> None:
    with pytest.raises(ConfigError, match="in 'context_length': 4096 tokens is beyond the model's context of 2048"):
        plan(phi2, machine(), context_length=4096)


def test_a_context_left_open_is_planned_with_8192_at_most(tmp_path: Path) -> None:
    assert plan(paper.llama(tmp_path / "long", context=131072), machine()).context_length == 8192
    assert plan(paper.llama(tmp_path / "none", context=None), machine()).context_length == 2048


# --- The ladder ----------------------------------------------------------------------------------


def test_without_progressive_fallback_there_is_one_way(phi2: CheckpointIndex) -> None:
    whole = plan(phi2, machine(8 * GB), enable_progressive_fallback=False, gpu_layers_fallback=16)
    assert ladder(whole) == [("full", True, "the whole model fits")]
    part = plan(phi2, machine(5 * GB), enable_progressive_fallback=False)
    assert [r.name for r in part.rungs] == ["full", "planned"]
    none = plan(phi2, machine(GB // 5), enable_progressive_fallback=False)
    assert [(r.name, r.fits) for r in none.rungs] == [("full", False), ("cpu", True)]
    assert none.notes == ("no layer fits an accelerator: all run on the CPU",)


def test_without_progressive_fallback_a_whole_device_that_is_too_small_is_an_error(phi2: CheckpointIndex) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        plan(phi2, machine(5 * GB), enable_progressive_fallback=False, device_map="cuda", context_length=2048)
    assert str(caught.value) == (
        "the model does not fit: it needs 6.34 GB of cuda:0 (weights 5.56 GB, KV cache 671 MB, activations 108 MB), "
        "which has 5.00 GB"
    )
    assert (caught.value.needed, caught.value.device) == (WHOLE, "cuda:0")
    assert '"enable_progressive_fallback": true' in caught.value.hint


def test_a_gpu_too_small_for_a_layer_is_said(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(GB // 5), gpu_layers_fallback=16)
    assert ladder(made) == [
        ("full", False, "needs 6.34 GB of cuda:0, which has 200 MB"),
        ("planned", False, "no layer fits an accelerator"),
        ("fallback", False, "no layer fits an accelerator"),
        ("cpu", True, "no accelerator memory needed"),
    ]
    assert made.notes == ("no layer fits an accelerator: all run on the CPU",)


def test_layers_to_keep_left_open_are_worked_out_late(phi2: CheckpointIndex) -> None:
    late = rung(plan(phi2, machine(5 * GB)), "fallback")
    assert late == Rung(
        "fallback", (), fits=False, reason="as many layers as memory allows when it runs out", adaptive=True
    )


def test_no_layers_to_keep_is_no_middle_rung(phi2: CheckpointIndex) -> None:
    assert [r.name for r in plan(phi2, machine(5 * GB), gpu_layers_fallback=0).rungs] == ["full", "planned", "cpu"]


def test_layers_to_keep_must_be_fewer_than_planned(phi2: CheckpointIndex) -> None:
    planned = plan(phi2, machine(5 * GB)).devices[0].layers
    kept = rung(plan(phi2, machine(5 * GB), gpu_layers_fallback=planned), "fallback")
    assert (kept.fits, kept.reason) == (False, f"{planned} layers are not fewer than the {planned} planned")
    assert rung(plan(phi2, machine(5 * GB), gpu_layers_fallback=planned - 1), "fallback").fits
    more = rung(plan(phi2, machine(8 * GB), gpu_layers_fallback=99), "fallback")
    assert more.reason == "99 layers are not fewer than the 32 planned"


def test_the_late_rung_minds_what_is_free_then(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(8 * GB))
    assert where(made.with_layers(16)) == documented_map(16)
    limit = EMBEDDING + BUSY + 3 * (LAYER + CACHE)
    assert where(made.with_layers(16, {"cuda:0": limit})) == documented_map(3)
    assert where(made.with_layers(16, {"cuda:0": limit - 1})) == documented_map(2)
    assert set(where(made.with_layers(16, {"cuda:0": 0})).values()) == {"cpu"}
    assert where(made.with_layers(16, {"cuda:0": 80 * GB})) == documented_map(16)


# --- What others read ------------------------------------------------------------------------------


def test_json_is_plain_data_with_stable_keys(phi2: CheckpointIndex) -> None:
    made = plan(phi2, machine(5 * GB), **{**EXAMPLE, "max_memory": None})
    data = made.to_json()
    assert json.loads(json.dumps(data)) == data
    assert list(data) == [
        "format", "model", "dtype", "quantization", "context_length", "batch", "rung", "device_map", "devices",
        "placements", "rungs", "notes",
    ]  # fmt: skip
    assert [data[key] for key in ("format", "model", "dtype", "quantization", "context_length", "batch", "rung")] == [
        "lyra.plan/1", "phi-2", "float16", None, 2048, 1, "planned",
    ]  # fmt: skip
    assert data["device_map"] == made.device_map()
    assert list(data["devices"][0]) == [
        "device", "limit", "total", "weights", "kv_cache", "activations", "reserved", "layers", "mapped",
        "experts", "packing", "streaming", "used", "unused",
    ]  # fmt: skip
    assert data["placements"][1] == {
        "block": "model.layers.0",
        "kind": "layer",
        "device": "cuda:0",
        "weights": LAYER,
        "kv_cache": CACHE,
        "reason": "fits, layer 1 in order",
        "streamed": False,
        "through": "",
    }
    assert data["rungs"][2] == {
        "name": "fallback",
        "fits": True,
        "reason": "gpu_layers_fallback is 16",
        "layers": {"cuda:0": 16, "cpu": 16},
    }
    assert data["notes"] == list(made.notes)


def test_every_placement_has_a_reason(phi2: CheckpointIndex) -> None:
    for made in (plan(phi2, machine(5 * GB), gpu_layers_fallback=16), plan(phi2, machine(cpu=GB))):
        assert all(p.reason for r in made.rungs for p in r.placements)
    fallback = rung(plan(phi2, machine(5 * GB), gpu_layers_fallback=16), "fallback").placements
    assert {p.reason for p in fallback if p.device == "cpu"} == {"at most 16 layers stay on accelerators"}


def test_two_thousand_tensors(tmp_path: Path) -> None:
    index = paper.experts(tmp_path)
    assert len(index.tensors) == 2043
    made = plan(index, machine(10**8))
    assert made.rung.name == "planned"
    assert len(made.placements) == 2 * 24 + 3


@pytest.mark.parametrize(
    ("on", "settings", "said"),
    [
        (machine(24 * GB), {}, []),
        (machine(), {}, ["'compile_decode' has no effect: the model does not lie wholly on one accelerator"]),
        (machine(3 * GB), {}, ["'compile_decode' has no effect: the model does not lie wholly on one accelerator"]),
        (machine(24 * GB), {"load_in_4bit": True}, ["'compile_decode' has no effect: its layers are packed"]),
    ],
)
def test_what_is_not_compiled_is_said(
    on: Machine, settings: dict[str, Any], said: list[str], phi2: CheckpointIndex
) -> None:
    asked = plan(phi2, on, compile_decode=True, **settings)
    assert [note for note in asked.notes if "compile_decode" in note] == said
    assert not any("compile_decode" in note for note in plan(phi2, on, **settings).notes)
