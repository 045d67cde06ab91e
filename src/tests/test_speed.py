"""Predicted speeds by hand from made-up rates, the probe on this machine, and the cache of rates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from lyra_emergence.footprint import estimate_footprint
from lyra_emergence.machine import Device, Machine, probe_machine
from lyra_emergence.placement import Placement
from lyra_emergence.speed import (
    Band,
    DeviceRates,
    DtypeRates,
    MachineRates,
    Speed,
    cached_rates,
    fingerprint,
    measure_rates,
    predict,
    rates,
)
from lyra_emergence.speed.cache import keep, rates_path

from . import paper_checkpoints as paper

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lyra_emergence.footprint import Footprint

    from .simulated_accelerator import SimulatedAccelerator

MiB = 2**20
CPU = Device("cpu", "cpu", None, 8 * 2**30, 8 * 2**30, 0, "a processor")
GPU = Device("cuda:0", "cuda", 0, 8 * 2**30, 8 * 2**30, 0, "a card")

# The paper Llama: width 64, inner width 128, 4 heads on 2 of keys, 4 layers, 512 tokens of vocabulary, bfloat16.
LAYER = 2 * (64 * 64 + 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64)
NORM, TABLE = 2 * 64, 2 * 512 * 64
CACHE = 1024 * 2 * 32 * 2  # of a layer: 1,024 tokens of keys and values
LAYERS = 4
ODD_PAGES = 1.15  # how much slower the map's pages are read than the probe's buffer
CPU_TIMES = {
    "read": 1e6,
    "matmul": 1e9,
    "cache_alone": 4e6,
    "cache_shared": 1e6,
    "layer": 0.25,
    "token": 0.5,
    "kernel": 0.125,
}
GPU_TIMES = {
    "read": 1e8,
    "matmul": 1e11,
    "cache_alone": 4e8,
    "cache_shared": 1e8,
    "layer": 0.125,
    "token": 0.25,
    "kernel": 0.0625,
}


def exact(value: float) -> Band:
    return Band(value, value, value)


def device_rates(times: Mapping[str, float], **more: Band) -> DeviceRates:
    return DeviceRates({"bfloat16": DtypeRates(**{name: exact(value) for name, value in times.items()})}, **more)


RATES = MachineRates(
    fingerprint="made up",
    cpu=device_rates(CPU_TIMES),
    accelerators={"cuda:0": device_rates(GPU_TIMES, copy=exact(1e9), crossing=exact(0.001))},
    file_read=exact(1e5),
)


@pytest.fixture
def llama(tmp_path: Path) -> Footprint:
    return estimate_footprint(paper.llama(tmp_path))


def placed(footprint: Footprint, device: str = "cpu", **others: str) -> tuple[Placement, ...]:
    """Every block on `device`, but for the blocks whose last name is in `others`: `_3="cuda:0"` moves layer 3."""

    def where(name: str) -> str:
        last = name.rpartition(".")[2]
        return others.get(f"_{last}" if last.isdecimal() else last, device)

    return tuple(Placement(b.name, b.kind, where(b.name), b.weights, b.kv_cache, "") for b in footprint.blocks)


def decode_seconds(speed: Speed | None) -> float:
    assert speed is not None
    return 1 / speed.decode_tokens_per_second.likely


# --- Decoding --------------------------------------------------------------------------------------


def test_a_token_on_the_cpu_reads_all_weights_but_the_embedding_and_half_of_the_cache(llama: Footprint) -> None:
    speed = predict(llama, placed(llama), RATES, heads_per_key=1)
    weights = (LAYERS * LAYER + NORM + TABLE) * ODD_PAGES / 1e6
    assert decode_seconds(speed) == pytest.approx(weights + LAYERS * CACHE / 2 / 4e6 + LAYERS * 0.25 + 0.5)


def test_the_paper_llama_is_what_the_figures_here_say(llama: Footprint) -> None:
    found = [(block.kind, block.weights, block.kv_cache) for block in llama.blocks]
    layers = [("layer", LAYER, CACHE)] * LAYERS
    assert found == [("embedding", TABLE, 0), *layers, ("norm", NORM, 0), ("head", TABLE, 0)]


@pytest.mark.parametrize(
    ("heads", "seconds_per_byte"),
    # 0.25e-6 for one head, 1e-6 for four; between them a straight line, beyond them in proportion.
    [(1, 0.25e-6), (2, 0.5e-6), (3, 0.75e-6), (4, 1e-6), (8, 2e-6)],
)
def test_the_cache_costs_more_where_more_heads_share_it(llama: Footprint, heads: int, seconds_per_byte: float) -> None:
    without = decode_seconds(predict(llama, placed(replace_cache(llama, 0)), RATES, heads_per_key=heads))
    with_cache = decode_seconds(predict(llama, placed(llama), RATES, heads_per_key=heads))
    assert with_cache - without == pytest.approx(LAYERS * CACHE / 2 * seconds_per_byte)


def replace_cache(footprint: Footprint, nbytes: int) -> Footprint:
    blocks = tuple(replace(block, kv_cache=nbytes if block.kind == "layer" else 0) for block in footprint.blocks)
    return replace(footprint, blocks=blocks)


def test_where_the_heads_are_not_known_the_band_holds_one_to_eight(llama: Footprint) -> None:
    speeds = [predict(llama, placed(llama), RATES, heads_per_key=heads) for heads in (None, 1, 4, 8)]
    unknown, one, four, eight = [speed.decode_tokens_per_second for speed in speeds if speed is not None]
    assert unknown.likely == pytest.approx(four.likely)
    assert unknown.high == pytest.approx(one.high)
    assert unknown.low == pytest.approx(eight.low)


def test_a_tied_head_reads_the_embeddings_table(tmp_path: Path, llama: Footprint) -> None:
    tied = estimate_footprint(paper.llama(tmp_path / "tied", tied=True))
    assert [block.weights for block in tied.blocks if block.kind == "head"] == [0]
    assert decode_seconds(predict(tied, placed(tied), RATES)) == decode_seconds(predict(llama, placed(llama), RATES))


def test_blocks_on_disk_are_read_from_the_file_and_computed_on_the_cpu(llama: Footprint) -> None:
    there = decode_seconds(predict(llama, placed(llama, _3="disk"), RATES))
    here = decode_seconds(predict(llama, placed(llama), RATES))
    assert there - here == pytest.approx(LAYER / 1e5 - LAYER * ODD_PAGES / 1e6)


def test_streamed_blocks_are_read_while_others_run(llama: Footprint) -> None:
    here = placed(llama)
    ahead = tuple(replace(p, device="disk", streamed=True) if p.kind == "layer" else p for p in here)
    reading = LAYERS * LAYER / 1e5
    assert decode_seconds(predict(llama, ahead, RATES)) == pytest.approx(reading + 0.5)
    fast = replace(RATES, file_read=exact(1e12))
    computing = decode_seconds(predict(llama, ahead, fast))
    assert computing == pytest.approx(decode_seconds(predict(llama, here, RATES)))


def test_an_accelerator_overlaps_reading_and_overhead(llama: Footprint) -> None:
    speed = predict(llama, placed(llama, "cuda:0"), RATES, heads_per_key=1)
    assert decode_seconds(speed) == pytest.approx(LAYERS * 0.125 + 0.25)
    slow = device_rates({**GPU_TIMES, "layer": 1e-6})
    reading = predict(llama, placed(llama, "cuda:0"), replace(RATES, accelerators={"cuda:0": slow}), heads_per_key=1)
    work = (LAYERS * LAYER + NORM + TABLE) / 1e8 + LAYERS * CACHE / 2 / 4e8
    assert decode_seconds(reading) == pytest.approx(work + 0.25)


def test_a_plan_over_two_devices_adds_their_times_and_two_crossings(llama: Footprint) -> None:
    # Layers 0 and 1 on the accelerator: into it from the embedding, and out of it to layer 2.
    speed = predict(llama, placed(llama, _0="cuda:0", _1="cuda:0"), RATES, heads_per_key=1)
    on_cpu = (2 * LAYER + NORM + TABLE) * ODD_PAGES / 1e6 + 2 * CACHE / 2 / 4e6 + 2 * 0.25
    assert decode_seconds(speed) == pytest.approx(2 * 0.125 + on_cpu + 0.5 + 2 * 4 * 0.001)


def test_the_logits_come_back_to_the_first_device(llama: Footprint) -> None:
    one_way = placed(llama, "cuda:0", embed_tokens="cpu")
    speed = predict(llama, one_way, RATES)
    assert decode_seconds(speed) == pytest.approx(LAYERS * 0.125 + 0.5 + 2 * 4 * 0.001)


def test_a_mixture_reads_its_active_share(llama: Footprint) -> None:
    shares = {block.name: 0.25 for block in llama.blocks if block.kind == "layer"}
    whole = predict(llama, placed(llama), RATES)
    sparse = predict(llama, placed(llama), RATES, active_share=shares)
    assert decode_seconds(whole) - decode_seconds(sparse) == pytest.approx(0.75 * LAYERS * LAYER * ODD_PAGES / 1e6)
    assert whole is not None
    assert sparse is not None
    # 1,000,000 tokens a second through a whole layer's products would take long beside its overhead.
    assert sparse.prefill_tokens_per_second.likely > whole.prefill_tokens_per_second.likely


@pytest.mark.parametrize(("quantization", "read", "layers"), [("8bit", 0.6, 4.0), ("4bit", 0.65, 1.5)])
def test_packed_layers_read_slower_and_pay_for_small_operators(
    tmp_path: Path, quantization: Any, read: float, layers: float
) -> None:
    packed = estimate_footprint(paper.llama(tmp_path), quantization=quantization)
    speed = predict(packed, placed(packed), RATES, heads_per_key=1)
    weights = sum(block.weights for block in packed.blocks if block.kind == "layer")
    plain = (NORM + TABLE) * ODD_PAGES / 1e6
    cache = LAYERS * CACHE / 2 / 4e6
    assert decode_seconds(speed) == pytest.approx(weights / (1e6 * read) + plain + cache + LAYERS * layers * 0.25 + 0.5)


def test_layers_in_kernels_have_rates_of_their_own(llama: Footprint, tmp_path: Path) -> None:
    held = RATES.cpu.dtypes["bfloat16"]
    kernels = replace(held, fused_layer=exact(0.01), fused_cache=exact(8e6))
    rates = replace(RATES, cpu=DeviceRates({"bfloat16": kernels}))
    plain = (LAYERS * LAYER + NORM + TABLE) * ODD_PAGES / 1e6
    assert llama.fused
    speed = predict(llama, placed(llama), rates, heads_per_key=1)
    assert decode_seconds(speed) == pytest.approx(plain + LAYERS * CACHE / 2 / 8e6 + LAYERS * 0.01 + 0.5)
    # Another kind of layer goes through its own forward pass.
    speed = predict(replace(llama, fused=False), placed(llama), rates, heads_per_key=1)
    assert decode_seconds(speed) == pytest.approx(plain + LAYERS * CACHE / 2 / 4e6 + LAYERS * 0.25 + 0.5)
    packed = estimate_footprint(paper.llama(tmp_path / "packed"), quantization="4bit")
    speed = predict(packed, placed(packed), rates, heads_per_key=1)
    weights = sum(block.weights for block in packed.blocks if block.kind == "layer")
    rest = (NORM + TABLE) * ODD_PAGES / 1e6 + LAYERS * CACHE / 2 / 8e6 + LAYERS * 0.01 + 0.5
    assert decode_seconds(speed) == pytest.approx(weights / 0.9e6 + rest)
    assert MachineRates.from_json(rates.to_json()) == rates


def test_a_batch_counts_all_its_sequences(tmp_path: Path) -> None:
    pair = estimate_footprint(paper.llama(tmp_path), batch=2)
    speed = predict(pair, placed(pair), RATES, heads_per_key=1)
    step = (LAYERS * LAYER + NORM + TABLE) * ODD_PAGES / 1e6 + 2 * LAYERS * CACHE / 2 / 4e6 + LAYERS * 0.25 + 0.5
    assert decode_seconds(speed) == pytest.approx(step / 2)


def test_blocks_that_text_does_not_run_cost_nothing(llama: Footprint) -> None:
    tower = replace(llama.blocks[0], name="vision", kind="other", weights=10**9)
    more = replace(llama, blocks=(*llama.blocks, tower))
    assert predict(more, placed(more, vision="meta"), RATES) == predict(llama, placed(llama), RATES)


# --- Prefill, bands, words -------------------------------------------------------------------------


def test_prefill_multiplies_every_weight_of_the_layers_twice_a_token(llama: Footprint) -> None:
    speed = predict(llama, placed(llama), RATES)
    assert speed is not None
    tokens = 512  # half of the context of 1,024
    seconds = 1.5 * 2 * (LAYERS * LAYER / 2) * tokens / 1e9 + LAYERS * 0.25
    assert speed.prefill_tokens_per_second.likely == pytest.approx(tokens / seconds)


def test_a_chunk_of_prefill_is_the_most_that_runs_at_once(tmp_path: Path) -> None:
    long = estimate_footprint(paper.llama(tmp_path, context=8192), context_length=8192)
    speed = predict(long, placed(long), RATES)
    assert speed is not None
    seconds = 1.5 * 2 * (LAYERS * LAYER / 2) * 1024 / 1e9 + LAYERS * 0.25
    assert speed.prefill_tokens_per_second.likely == pytest.approx(1024 / seconds)


@pytest.mark.parametrize(("context", "used"), [(1024, 8), (4, 2 * 2)])
def test_products_with_experts_pay_for_their_kernels_on_the_cpu(llama: Footprint, context: int, used: int) -> None:
    at, one = next((at, block) for at, block in enumerate(llama.blocks) if block.kind == "layer")
    inside = replace(one, name="experts", kind="experts", weights=0, kv_cache=0, experts=8, active_share=0.25)
    mixture = replace(llama, context_length=context, blocks=(*llama.blocks[: at + 1], inside, *llama.blocks[at + 1 :]))
    dense = replace(llama, context_length=context)

    def seconds(footprint: Footprint, device: str) -> float:
        speed = predict(footprint, placed(footprint, device), RATES)
        assert speed is not None
        return context // 2 / speed.prefill_tokens_per_second.likely

    # Two products with each expert that a token goes through: of 2 tokens, 2 of 8 each.
    assert seconds(mixture, "cpu") - seconds(dense, "cpu") == pytest.approx(2 * used * 0.125)
    assert seconds(mixture, "cuda:0") == pytest.approx(seconds(dense, "cuda:0"))


def test_the_band_holds_the_models_error_and_grows_with_the_probes(llama: Footprint) -> None:
    no_overhead = {**CPU_TIMES, "layer": 1e-9, "token": 1e-9, "cache_alone": 1e12, "cache_shared": 1e12}
    steady = replace(RATES, cpu=device_rates(no_overhead))
    first = predict(llama, placed(llama), steady)
    assert first is not None
    band = first.decode_tokens_per_second
    assert (band.low / band.likely, band.high / band.likely) == pytest.approx((1 / 1.5, 1.25), rel=1e-4)
    unsteady = replace(steady.cpu.dtypes["bfloat16"], read=Band(0.5e6, 1e6, 1.5e6))
    second = predict(llama, placed(llama), replace(steady, cpu=DeviceRates({"bfloat16": unsteady})))
    assert second is not None
    assert second.decode_tokens_per_second.low == pytest.approx(band.low / 2, rel=1e-4)
    assert second.decode_tokens_per_second.high == pytest.approx(band.high * 1.5, rel=1e-4)


def test_it_says_what_the_figures_rest_on(llama: Footprint) -> None:
    speed = predict(llama, placed(llama, _0="cuda:0", _3="disk"), RATES)
    assert speed is not None
    assert speed.rests_on == (
        "a token reads 214 kB on cpu at 1.00 MB/s, 74.0 kB from the file at 100 kB/s, 74.0 kB on cuda:0 at 100 MB/s "
        "and 262 kB of KV cache (half of 1024 tokens), and each of 4 layers adds 250 ms"
    )


@pytest.mark.parametrize(
    "lacking",
    [
        replace(RATES, accelerators={}),
        replace(RATES, accelerators={"cuda:0": DeviceRates({})}),
        replace(RATES, cpu=DeviceRates({"float32": RATES.cpu.dtypes["bfloat16"]})),
        replace(RATES, file_read=None),
    ],
    ids=["no accelerator", "one without room", "another dtype", "no file"],
)
def test_what_was_not_measured_is_not_predicted(llama: Footprint, lacking: MachineRates) -> None:
    assert predict(llama, placed(llama, _0="cuda:0", _3="disk"), RATES) is not None
    assert predict(llama, placed(llama, _0="cuda:0", _3="disk"), lacking) is None


def test_no_placements_give_no_speed(llama: Footprint) -> None:
    assert predict(llama, (), RATES) is None


@pytest.mark.parametrize("figures", [(2, 1, 3), (1, 3, 2), (-1, 0, 1), (0, 1, float("inf")), (0, float("nan"), 1)])
def test_a_band_is_in_order(figures: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="is no band"):
        Band(*figures)


def test_bands_add_and_divide_edge_by_edge() -> None:
    band = Band(1, 2, 4)
    assert band + band == band.times(2) == Band(2, 4, 8)
    assert band.under(8) == Band(2, 4, 8)
    assert band.widened(2, 3) == Band(0.5, 2, 12)
    assert band.beside(Band(0.5, 3, 5)) == Band(1, 3, 9)


# --- The probe -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "weights"
    path.write_bytes(os.urandom(16 * MiB))
    return path


@pytest.fixture(scope="module")
def measured(large_file: Path) -> MachineRates:
    """What the probe finds here; with a file given it writes nothing, and this runs before a test has its home."""
    return measure_rates(file=large_file)


def test_the_cpu_is_measured_in_every_dtype(measured: MachineRates) -> None:
    assert measured.fingerprint == fingerprint(probe_machine())
    assert list(measured.cpu.dtypes) == ["float32", "bfloat16", "float16"]
    assert (measured.cpu.copy, measured.cpu.crossing) == (None, None)
    for found in measured.cpu.dtypes.values():
        for name in ("read", "matmul", "cache_alone", "cache_shared", "layer", "token", "kernel"):
            assert getattr(found, name).low > 0
        # Any machine that runs torch reads more than 10 MB/s and less than 100 TB/s: the unit is bytes/s.
        assert 1e7 < found.read.likely < 1e14
        assert found.layer.likely < 10


def test_a_file_is_read_and_left_as_it_was(measured: MachineRates, large_file: Path) -> None:
    assert measured.file_read is not None
    assert large_file.stat().st_size == 16 * MiB


def test_without_a_file_a_temporary_one_is_measured_and_removed() -> None:
    found = measure_rates()
    assert found.file_read is not None
    assert [path.name for path in rates_path().parent.iterdir()] == ["kernels"]  # which every test shares


@pytest.mark.parametrize("size", [None, 0, MiB])
def test_a_file_that_is_missing_or_small_gives_no_rate(tmp_path: Path, size: int | None) -> None:
    from lyra_emergence.speed.file_probe import measure_file

    path = tmp_path / "weights"
    if size is not None:
        path.write_bytes(bytes(size))
    assert measure_file(path) is None


def test_the_probe_leaves_no_memory_and_no_state(measured: MachineRates, large_file: Path) -> None:
    import torch

    from .running import anonymous_bytes

    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux tells a process's own memory")
    torch.manual_seed(3)
    state, threads, dtype = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
    before = anonymous_bytes()
    measure_rates(file=large_file)
    # The buffer alone has 96 MiB.
    assert anonymous_bytes() - before < 24 * MiB
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert not torch.is_inference_mode_enabled()


def test_accelerators_are_measured_and_left_empty(sim: SimulatedAccelerator, large_file: Path) -> None:
    sim.reset(cap=1024 * MiB)
    sim.occupy(sim.cap(1), 1)  # no room for a probe on the second
    found = measure_rates(file=large_file)
    assert list(found.accelerators) == ["sim:0", "sim:1"]
    first, second = found.accelerators.values()
    assert list(first.dtypes) == ["float32", "bfloat16", "float16"]
    assert first.copy is not None
    assert first.copy.low > 0
    assert first.crossing is not None
    assert first.crossing.low > 0
    assert second == DeviceRates({})
    assert found.fingerprint == fingerprint(probe_machine())
    assert sim.used(0) == 0


def test_a_dtype_that_runs_out_of_memory_is_left_out(sim: SimulatedAccelerator, large_file: Path) -> None:
    sim.reset(cap=96 * MiB)  # a quarter is the buffer; the cache of 8,192 tokens has no room in any dtype
    found = measure_rates(file=large_file)
    assert found.accelerators["sim:0"].dtypes == {}


def test_accelerators_that_are_not_here_are_not_measured(large_file: Path) -> None:
    found = measure_rates(Machine((GPU,), CPU), file=large_file)
    assert found.accelerators == {}


# --- The cache -------------------------------------------------------------------------------------

HERE = Machine((GPU,), CPU)


def kept(machine: Machine = HERE) -> MachineRates:
    """Made-up rates of `machine`, written to the cache."""
    found = replace(RATES, fingerprint=fingerprint(machine))
    keep(found)
    return found


def test_rates_come_back_as_they_were_kept(home: Path) -> None:
    assert cached_rates(HERE) is None
    found = kept()
    assert cached_rates(HERE) == found
    assert rates_path() == home / ".cache/lyra-emergence/rates.json"
    assert json.loads(rates_path().read_text())["format"] == "lyra.rates/2"
    assert sorted(path.name for path in rates_path().parent.iterdir()) == ["kernels", "rates.json"]


def test_measured_rates_survive_the_round_trip(measured: MachineRates) -> None:
    keep(measured)
    assert cached_rates(probe_machine()) == measured


def test_rates_are_measured_once(large_file: Path) -> None:
    machine = probe_machine()
    first = rates(machine, file=large_file)
    assert cached_rates(machine) == first
    assert rates(machine, file=large_file) == first
    fresh = rates(machine, file=large_file, fresh=True)
    assert fresh != first
    assert cached_rates(machine) == fresh


def _broken(**changes: Any) -> str:
    data = replace(RATES, fingerprint=fingerprint(HERE)).to_json() | changes
    return json.dumps({"format": "lyra.rates/2", "machines": {fingerprint(HERE): data}})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": "lyra.rates/2"}',
        '{"format": "lyra.rates/2", "machines": []}',
        '{"format": "lyra.rates/2", "machines": {}}',
        "[" * 100_000,
        '{"format": "lyra.trials/1", "trials": {}}',
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_and_rewritten(text: str) -> None:
    rates_path().parent.mkdir(parents=True, exist_ok=True)
    rates_path().write_text(text)
    assert cached_rates(HERE) is None
    found = kept()
    assert cached_rates(HERE) == found


@pytest.mark.parametrize(
    "changes",
    [
        {"cpu": None},
        {"cpu": {"dtypes": {"bfloat16": {}}, "copy": None, "crossing": None}},
        {"file_read": 3},
        {"file_read": {"low": 0, "likely": 1, "high": 2}},
        {"file_read": {"low": 2, "likely": 1, "high": 2}},
        {"file_read": {"low": 1, "likely": "fast", "high": 2}},
        {"accelerators": []},
    ],
)
def test_a_damaged_entry_is_ignored_and_rewritten(changes: Mapping[str, Any]) -> None:
    rates_path().parent.mkdir(parents=True, exist_ok=True)
    rates_path().write_text(_broken())
    assert cached_rates(HERE) is not None
    rates_path().write_text(_broken(**changes))
    assert cached_rates(HERE) is None
    found = kept()
    assert cached_rates(HERE) == found


def test_other_machines_keep_their_rates() -> None:
    others = [Machine((replace(GPU, description=f"card {n}"),), CPU) for n in range(21)]
    found = [kept(machine) for machine in others]
    assert cached_rates(others[0]) is None  # the oldest of 21 goes
    assert [cached_rates(machine) for machine in others[1:]] == found[1:]


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large_file: Path
) -> None:
    blocker = tmp_path / "a file"
    blocker.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    machine = probe_machine()
    assert rates(machine, file=large_file).cpu.dtypes
    assert cached_rates(machine) is None
    assert measure_rates().file_read is None


def test_the_fingerprint_names_what_rates_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from lyra_emergence.speed import cache

    before = fingerprint(HERE)
    assert before == fingerprint(HERE)
    assert before.endswith("; cuda:0 a card")
    changed = {before, fingerprint(Machine((), CPU)), fingerprint(Machine((replace(GPU, description="other"),), CPU))}
    monkeypatch.setenv("OMP_NUM_THREADS", "97")
    changed.add(fingerprint(HERE))
    monkeypatch.setattr(cache, "_cores", lambda: 96)
    changed.add(fingerprint(HERE))
    monkeypatch.setattr(cache, "_cpu_model", lambda: "another processor")
    changed.add(fingerprint(HERE))
    monkeypatch.setattr(cache.metadata, "version", lambda name: f"{name} of tomorrow")
    changed.add(fingerprint(HERE))
    assert len(changed) == 7
    assert fingerprint(HERE) == "another processor; 96 cores, 97 threads; torch torch of tomorrow; cuda:0 a card"


def test_reading_and_predicting_need_no_torch(home: Path, tmp_path: Path) -> None:
    machine = probe_machine(with_torch=False)
    keep(replace(RATES, fingerprint=fingerprint(machine)))
    paper.llama(tmp_path)
    script = f"""
import sys
from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.config import ModelConfig
from lyra_emergence.machine import probe_machine
from lyra_emergence.plan import make_plan
from lyra_emergence.speed import cached_rates, predict
from pathlib import Path

machine = probe_machine(with_torch=False)
plan = make_plan(ModelConfig(device_map="cpu"), read_checkpoint(Path({str(tmp_path)!r})), machine)
print(predict(plan.footprint, plan.placements, cached_rates(machine)).rests_on)
print([name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, imported = done.stdout.splitlines()
    assert said.startswith("a token reads 362 kB on cpu at 1.00 MB/s")
    assert imported == "[]"
