"""Packed weights that are kept from load to load: the same bits, mapped, never another checkpoint's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lyra_emergence import packed_files, packed_room
from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import CheckpointError
from lyra_emergence.loading import load
from lyra_emergence.machine import probe_machine
from lyra_emergence.packed_files import find_packed_files, packed_folder, read_about, read_packed
from lyra_emergence.packed_plan import keeps_packed, with_kept_weights
from lyra_emergence.packed_room import kept_folders, make_room
from lyra_emergence.plan import make_plan
from lyra_emergence.runtime.cpu import library, packed
from lyra_emergence.runtime.cpu.packed import PackedProjection

from . import disk_shim
from .families import LAYERS, build_checkpoint, make_tokenizer
from .running import PROMPT, greedy
from .simulated_accelerator import CompilerMissingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lyra_emergence.loading import LoadedModel

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]

MIB = 2**20
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="private memory is measured on Linux only")


@pytest.fixture(autouse=True, scope="module")
def _kernels() -> None:
    if library.find_library() is None:
        pytest.skip(library.why_none())


@pytest.fixture
def llama(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be changed."""
    return Path(shutil.copytree(checkpoints("llama"), tmp_path / "llama"))


def config(bits: str = "4bit", **settings: Any) -> ModelConfig:
    return ModelConfig(**{"device_map": "cpu", f"load_in_{bits}": True, **settings})


def projections(loaded: LoadedModel) -> dict[str, PackedProjection]:
    return {name: one for name, one in loaded.model.named_modules() if isinstance(one, PackedProjection)}


def tensors(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    found = projections(loaded)
    return {f"{n}.{part}": getattr(p, part).clone() for n, p in found.items() for part in ("codes", "scales")}


@torch.inference_mode()
def logits(loaded: LoadedModel) -> torch.Tensor:
    return loaded.model(torch.tensor([PROMPT])).logits


def loaded_bits(directory: Path, **settings: Any) -> tuple[dict[str, torch.Tensor], set[bool], list[str]]:
    """The packed tensors of a load, whether they are mapped, and what was said of them."""
    said: list[str] = []
    loaded = load(
        config(**settings),
        directory=directory,
        on_event=lambda e: said.append(e.message) if e.kind in ("pack", "note") else None,
    )
    found = tensors(loaded), {p.mapped for p in projections(loaded).values()}, said
    loaded.close()
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- The same, mapped --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mixtral"])
def test_a_second_load_has_the_same_bits_and_packs_nothing(
    family: str, bits: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoints(family)
    first = load(config(bits), directory=directory)
    expected, wanted = tensors(first), logits(first)
    assert expected
    assert not any(p.mapped for p in projections(first).values())
    copied, nbytes = first.report.bytes_copied, sum(t.nbytes for t in expected.values())
    assert copied >= nbytes
    first.close()
    monkeypatch.setattr(packed, "_pack", lambda *_: pytest.fail("packed anew"))
    second = load(config(bits), directory=directory)
    assert all(p.mapped for p in projections(second).values())
    assert all(p.data_ptr() % 32 == 0 for one in projections(second).values() for p in (one.codes, one.scales))
    assert same(tensors(second), expected)
    assert torch.equal(logits(second), wanted)
    assert second.report.bytes_copied <= copied - nbytes
    second.close()


def test_what_is_kept_and_used_is_said(llama: Path) -> None:
    _, _, first = loaded_bits(llama)
    _, _, second = loaded_bits(llama)
    (kept,) = kept_folders()
    assert kept.about is not None
    assert (kept.about.model, kept.about.quantization) == ("llama", "4bit")
    assert [line.partition(" of ")[2] for line in first] == ["packed weights are kept for the next load"]
    assert [line.partition(" of ")[2] for line in second] == ["packed weights are mapped from the cache"]
    loaded_bits(llama, bits="8bit")
    assert len(kept_folders()) == 2


def test_another_dtype_uses_the_same_weights(llama: Path) -> None:
    first, _, _ = loaded_bits(llama)
    second, mapped, _ = loaded_bits(llama, dtype="bfloat16")
    assert mapped == {True}
    assert same(first, second)


@pytest.mark.parametrize("settings", [{"packed_cache": 0}, {"packed_cache": "0GB"}, {"cpu_kernels": False}])
def test_turned_off_nothing_is_kept_and_nothing_used(settings: dict[str, Any], llama: Path) -> None:
    assert loaded_bits(llama, **settings)[2] == []
    assert not packed_folder().exists()
    loaded_bits(llama)
    _, mapped, said = loaded_bits(llama, **settings)
    assert True not in mapped
    assert said == []


def test_code_of_strangers_is_not_relied_on(llama: Path) -> None:
    index = read_checkpoint(llama)
    foreign = replace(index, config={**index.config, "auto_map": {"AutoModelForCausalLM": "x.M"}})
    assert keeps_packed(config(), foreign)
    assert keeps_packed(config(trust_remote_code=True), index)
    assert not keeps_packed(config(trust_remote_code=True), foreign)


MEASURED = """
import sys
from pathlib import Path
from lyra_emergence.config import ModelConfig
from lyra_emergence.framework import private_bytes
from lyra_emergence.loading import load
from lyra_emergence.runtime.memory import return_freed_memory
from lyra_emergence.runtime.warm_up import run_packed_projection, run_small_model
run_small_model(), run_packed_projection(sys.argv[2])
return_freed_memory()
before = private_bytes()
loaded = load(ModelConfig(device_map="cpu", **{f"load_in_{sys.argv[2]}": True}), directory=Path(sys.argv[1]))
print(private_bytes() - before)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with 47 million weights in its projections, that says nothing sensible."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("wide") / "wide"
    settings = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=384, max_position_embeddings=256, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(settings).bfloat16().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def run(program: str, *arguments: object) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout.splitlines()[-1]


@on_linux
def test_mapped_weights_are_no_private_memory(wide: Path) -> None:
    nbytes = 47 * 10**6
    assert int(run(MEASURED, wide, "8bit")) > 0.95 * nbytes
    assert int(run(MEASURED, wide, "8bit")) < 8 * MIB


# --- Plans -------------------------------------------------------------------------------------------


def planned(directory: Path, bits: str = "4bit", **settings: Any) -> Any:
    return make_plan(config(bits, **settings), read_checkpoint(directory), probe_machine())


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_plan_counts_what_is_kept_as_mapped(bits: str, llama: Path) -> None:
    (before,) = planned(llama, bits).devices
    load(config(bits), directory=llama).close()
    (after,) = planned(llama, bits).devices
    held = sum(t.nbytes for path in kept_folders()[0].path.glob("*.safetensors") for t in read_packed(path) or ())
    assert held > 0
    assert after.mapped - before.mapped == held
    assert (before.weights, before.kv_cache) == (after.weights, after.kv_cache)
    assert after.packing == 0
    for off in ({"packed_cache": 0}, {"cpu_kernels": False}):
        (same_as_before,) = planned(llama, bits, **off).devices
        assert same_as_before.mapped == before.mapped


def test_a_plan_counts_layers_one_by_one(checkpoints: Checkpoints) -> None:
    # GPT-2's matrices are turned before they are packed, which takes a copy.
    directory = checkpoints("gpt2")
    load(config(), directory=directory).close()
    whole, none = planned(directory).devices[0], planned(directory, packed_cache=0).devices[0]
    next(kept_folders()[0].path.glob("*.2.safetensors")).unlink()
    part = planned(directory).devices[0]
    assert (whole.packing, part.packing) == (0, none.packing)
    assert none.packing > 0
    assert whole.mapped - part.mapped == pytest.approx((whole.mapped - none.mapped) / LAYERS)


def test_where_there_is_no_compiler_nothing_counts_as_mapped(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(config(), directory=llama).close()
    (kept,) = planned(llama).devices
    monkeypatch.setattr("lyra_emergence.packed_plan.find_compiler", lambda: None)
    (none,) = planned(llama).devices
    assert none.mapped < kept.mapped


CHECKED = """
import json, sys
from pathlib import Path
from lyra_emergence.check import check_plan
from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.config import ModelConfig
from lyra_emergence.machine import probe_machine
from lyra_emergence.plan import make_plan
directory = Path(sys.argv[1])
config = ModelConfig(model_id=str(directory), device_map="cpu", **{f"load_in_{sys.argv[2]}": True})
plan = make_plan(config, read_checkpoint(directory), probe_machine())
print(json.dumps(check_plan(config, directory, plan).to_json()))
"""


@on_linux
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_plan_holds_with_and_without_what_is_kept(bits: str, wide: Path) -> None:
    (packing,) = json.loads(run(CHECKED, wide, bits))["devices"]
    (mapped,) = json.loads(run(CHECKED, wide, bits))["devices"]
    assert packing["weights_predicted"] > 20 * MIB
    assert packing["weights_measured"] > 20 * MIB
    assert packing["holds"], packing
    assert mapped["weights_predicted"] < MIB
    assert mapped["weights_measured"] < 8 * MIB
    assert mapped["holds"], mapped


def test_plans_outlive_what_is_kept(llama: Path) -> None:
    early = planned(llama)
    load(config(), directory=llama, plan=early).close()
    late = planned(llama)
    again = load(config(), directory=llama, plan=early)
    assert all(p.mapped for p in projections(again).values())
    again.close()
    shutil.rmtree(packed_folder())
    anew = load(config(), directory=llama, plan=late)
    assert not any(p.mapped for p in projections(anew).values())
    anew.close()


# --- Whose weights they are ---------------------------------------------------------------------------


def exchange(directory: Path, seed: int) -> None:
    """Puts other weights into the checkpoint's file, which stays as long and as old as it was."""
    file = directory / "model.safetensors"
    status = file.stat()
    other = build_checkpoint("llama", directory.with_name(f"other-{seed}"))
    data = bytearray((other / "model.safetensors").read_bytes())
    half = len(data) // 2 // 4 * 4
    values = torch.frombuffer(data, dtype=torch.float32, offset=half, count=(len(data) - half) // 4)
    values += torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)) / 10
    with file.open("r+b") as stream:
        stream.write(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_checkpoint_that_is_exchanged_in_place_gets_its_own_weights(llama: Path) -> None:
    old, _, _ = loaded_bits(llama)
    other_bits, _, _ = loaded_bits(llama, bits="8bit")
    exchange(llama, 1)
    new, mapped, _ = loaded_bits(llama)
    assert mapped == {False}
    assert not same(new, old)
    assert same(new, loaded_bits(llama, packed_cache=0)[0])
    assert same(new, loaded_bits(llama)[0])
    # Those of the old weights went; of the other packing they wait for their turn.
    assert sorted(kept.about.quantization for kept in kept_folders() if kept.about) == ["4bit", "8bit"]
    assert not same(loaded_bits(llama, bits="8bit")[0], other_bits)


def test_weights_that_change_while_they_are_packed_are_not_kept(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = packed._pack

    def touching(*arguments: Any) -> Any:
        os.utime(llama / "model.safetensors")
        return real(*arguments)

    monkeypatch.setattr(packed, "_pack", touching)
    _, _, said = loaded_bits(llama)
    assert said == ["packed weights are not kept for the next load: the checkpoint has changed since it was opened"]
    assert kept_folders() == ()


def test_the_hub_s_hash_is_enough(llama: Path) -> None:
    blobs, snapshot = llama / "blobs", llama / "snapshots" / "0"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in [path for path in llama.iterdir() if path.is_file()]:
        name = "0" * 64 if path.suffix == ".safetensors" else path.name
        (snapshot / path.name).symlink_to(path.rename(blobs / name))
    first = find_packed_files(read_checkpoint(snapshot), "4bit")
    os.utime(blobs / ("0" * 64), (1, 1))
    second = find_packed_files(read_checkpoint(snapshot), "4bit")
    (blobs / ("0" * 64)).rename(blobs / ("1" * 64))
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(blobs / ("1" * 64))
    third = find_packed_files(read_checkpoint(snapshot), "4bit")
    assert first
    assert second
    assert third
    assert first.folder == second.folder != third.folder


def test_other_kernels_and_other_libraries_pack_anew(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = read_checkpoint(llama)
    folders = set()
    for packing in ("one", "two"):
        monkeypatch.setattr(packed_files, "_packing", lambda packing=packing: packing)
        for quantization in ("8bit", "4bit"):
            found = find_packed_files(index, quantization)
            assert found is not None
            folders.add(found.folder)
    assert len(folders) == 4


def test_a_block_s_name_leads_nowhere_else(llama: Path) -> None:
    files = find_packed_files(read_checkpoint(llama), "4bit")
    assert files is not None
    for name in ("../../x", "/etc/x", "..", "a\0b"):
        assert files.path(name).parent == files.folder
        assert "\0" not in str(files.path(name))


# --- Damage ------------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[:-1],
    "cut at a page": lambda data: data[:4096],
    "longer": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "zeros behind the header": lambda data: data[:1024] + bytes(len(data) - 1024),
    "zeros at the end": lambda data: data[:-4096] + bytes(4096),
    "another header": lambda data: data.replace(b"q_proj.codes", b"x_proj.codes"),
    "another dtype": lambda data: data.replace(b'"U8"', b'"I8"', 1),
    "no checksum": lambda data: data.replace(b'"check"', b'"chick"'),
    "text": lambda data: b"x" * len(data),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_packed_anew(name: str, llama: Path) -> None:
    expected, _, _ = loaded_bits(llama)
    path = next(kept_folders()[0].path.glob("*.1.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[name](whole))
    assert read_packed(path) is None
    found, mapped, _ = loaded_bits(llama)
    assert same(found, expected)
    assert mapped == {True, False}
    assert path.read_bytes() == whole
    assert loaded_bits(llama)[1] == {True}


def test_whole_files_with_other_tensors_are_packed_anew(llama: Path) -> None:
    expected, _, _ = loaded_bits(llama)
    path = next(kept_folders()[0].path.glob("*.1.safetensors"))
    name = "self_attn.q_proj"
    half = memoryview(bytes(64))
    for held in ([(f"{name}.codes", "U8", half)], [(f"{name}.codes", "U8", half), (f"{name}.scales", "F16", half)]):
        path.write_bytes(b"".join(packed_files._parts(held)))
        assert read_packed(path)
        assert same(loaded_bits(llama)[0], expected)


def test_a_file_that_vanishes_after_it_was_looked_at(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _, _ = loaded_bits(llama)
    real = read_packed

    def vanishing(path: Path) -> Any:
        found = real(path)
        path.unlink()
        return found

    monkeypatch.setattr("lyra_emergence.runtime.cpu.packed_store.read_packed", vanishing)
    found, mapped, _ = loaded_bits(llama)
    assert mapped == {False}
    assert same(found, expected)


def test_a_folder_that_says_nothing_of_itself(llama: Path) -> None:
    folder = packed_folder() / "4bit-0"
    folder.mkdir(parents=True)
    for text in ("", "[]", "{}", '{"format": "lyra.packed/1"}', '{"format": "lyra.packed/1", "model": 3}', "[" * 10**5):
        (folder / "about.json").write_text(text)
        assert read_about(folder) is None
    assert [kept.about for kept in kept_folders()] == [None]


# --- Disks -------------------------------------------------------------------------------------------

SWEEP = """
import shutil
from lyra_emergence.config import ModelConfig
from lyra_emergence.loading import load
from lyra_emergence.packed_files import packed_folder, read_packed
from lyra_emergence.runtime.cpu.packed import PackedProjection
config = ModelConfig(device_map="cpu", load_in_4bit=True)
said = []
def told(event):
    if event.kind == "note": said.append(event.message)
def work():
    said.clear()
    loaded = load(config, directory=Path(sys.argv[2]), on_event=told)
    modules = [m for m in loaded.model.modules() if isinstance(m, PackedProjection)]
    found = [m.codes.numpy().tobytes() for m in modules], [m.scales.numpy().tobytes() for m in modules]
    mapped = sum(m.mapped for m in modules)
    loaded.close()
    return found, mapped
def wipe(): shutil.rmtree(packed_folder(), ignore_errors=True)
def halves(): return [p.name for p in packed_folder().rglob("*.safetensors") if read_packed(p) is None]
expected, _ = work()
EVERY = 3  # each load syncs its files anew, which takes a second on a busy disk; test_disk_failures.py has every call
found = {"failed": 0, "said": [], "killed": 0, "partly": 0, "wrong": []}
def expect(what, given, wanted):
    if given not in wanted: found["wrong"].append([what, repr(given)[:200]])
for code, ever in ((errno.ENOSPC, 0), (errno.EIO, 1)):
    nth = 1 - EVERY
    while True:
        nth += EVERY
        wipe()
        disk.disk_fail_at(nth, code, ever)
        expect(f"bits at {nth}", work()[0] == expected, [True])
        met = disk.disk_injected()
        disk.disk_fail_at(0, 0, 0)
        if not met: break
        found["failed"] += 1
        found["said"] += said
        expect(f"halves at {nth}", halves(), [[]])
        expect(f"temporary files at {nth}", list(packed_folder().rglob("*.tmp")), [[]])
nth = 1 - EVERY
while True:
    nth += EVERY
    wipe()
    if not killed_at(nth, work): break
    found["killed"] += 1
    expect(f"halves after death at {nth}", halves(), [[]])
    bits, mapped = work()
    expect(f"bits after death at {nth}", bits == expected, [True])
    found["partly"] += 0 < mapped < len(expected[0])
    expect(f"all after death at {nth}", work()[1], [len(expected[0])])
print(json.dumps(found))
"""


@pytest.mark.timeout(900)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the shim is made for Linux")
def test_a_disk_that_is_full_or_fails_or_loses_the_process_anywhere(
    request: pytest.FixtureRequest, home: Path, llama: Path
) -> None:
    assert request.config.cache is not None
    try:
        shim = disk_shim.compile_shim(request.config.cache.mkdir("disk_shim"))
    except CompilerMissingError as error:
        pytest.skip(str(error))
    found = disk_shim.run(shim, home, SWEEP, str(llama))
    assert found["wrong"] == []
    # For each layer: open, write, fsync, rename and the folder's own fsync.
    assert found["failed"] >= 2 * 4 * LAYERS // 3
    assert found["killed"] >= 4 * LAYERS // 3
    assert found["partly"] >= 4 * (LAYERS - 2) // 3
    assert {line.partition(": ")[0] for line in found["said"]} == {"packed weights are not kept for the next load"}
    assert {line.partition(": ")[2] for line in found["said"]} == {"no space left on device", "input/output error"}


def test_a_cache_folder_that_is_none(llama: Path) -> None:
    packed_folder().write_text("a file")
    _, _, said = loaded_bits(llama)
    assert len(said) == 1
    assert said[0].startswith("packed weights are not kept for the next load: ")


def test_memory_that_runs_out_while_it_is_written(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr("lyra_emergence.packed_files.replace_file", refused)
    assert loaded_bits(llama)[2] == ["packed weights are not kept for the next load: none left"]


TWICE = """
import sys, time
from pathlib import Path
from lyra_emergence.config import ModelConfig
from lyra_emergence.loading import load
sys.stdin.readline()
said = []
load(ModelConfig(device_map="cpu", load_in_8bit=True), directory=Path(sys.argv[1]),
     on_event=lambda e: said.append(e.message) if e.kind == "note" else None)
print(said)
"""


def test_two_processes_that_pack_at_once(wide: Path) -> None:
    command = [sys.executable, "-c", TWICE, str(wide)]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    time.sleep(1)
    ends = [process.communicate("\n")[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert [lines[-1] for lines in ends] == ["[]", "[]"]
    found, mapped, _ = loaded_bits(wide, bits="8bit")
    assert mapped == {True}
    assert same(found, loaded_bits(wide, bits="8bit", packed_cache=0)[0])
    assert not list(packed_folder().rglob("*.tmp"))


# --- Room --------------------------------------------------------------------------------------------


@pytest.fixture
def three(checkpoints: Checkpoints, tmp_path: Path) -> list[packed_files.PackedFiles]:
    """Three checkpoints' packed weights of 100 kB each; the first was used longest ago."""
    made = []
    for number in range(3):
        directory = Path(shutil.copytree(checkpoints("llama"), tmp_path / f"model-{number}"))
        files = find_packed_files(read_checkpoint(directory), "4bit")
        assert files is not None
        files.write("layer", [("a.codes", "U8", memoryview(bytes(100_000)))])
        os.utime(files.folder / "about.json", (number, number))
        made.append(files)
    return made


def names() -> list[str]:
    return [kept.about.model for kept in kept_folders() if kept.about]


def test_what_was_used_longest_ago_goes_first(three: list[packed_files.PackedFiles]) -> None:
    assert names() == ["model-0", "model-1", "model-2"]
    three[0].mark_used()
    assert names() == ["model-1", "model-2", "model-0"]
    assert make_room(three[2], 150_000, 400_000) == ""
    assert len(names()) == 3
    assert make_room(three[2], 200_000, 310_000) == ""
    assert names() == ["model-2", "model-0"]
    assert make_room(three[2], 310_001, 310_000) == "they take 310 kB, and 'packed_cache' allows 310 kB"
    assert names() == ["model-2", "model-0"]


def test_some_of_the_disk_is_left_free(three: list[packed_files.PackedFiles], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"total": 10**6, "used": 0, "free": 150_000})
    monkeypatch.setattr(packed_room.shutil, "disk_usage", lambda _: usage)
    # A tenth stays free: 50 kB may be written.
    assert make_room(three[0], 150_000, 10**9) == ""
    assert len(names()) == 3
    assert make_room(three[0], 201_000, 10**9) == ""
    assert names() == ["model-0", "model-2"]
    too_much = make_room(three[0], 900_000, 10**9)
    assert too_much.startswith("the disk has too little space: ")
    assert names() == ["model-0", "model-2"]


def test_what_cannot_be_removed_is_no_room(
    three: list[packed_files.PackedFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_room.shutil, "rmtree", lambda *_, **__: None)
    assert make_room(three[2], 200_000, 310_000) == "older ones are in use"


def test_what_dead_processes_left_goes(three: list[packed_files.PackedFiles]) -> None:
    stale = [files.folder / ".a.safetensors.0123456789ab.tmp" for files in three[:2]]
    fresh = three[0].folder / ".b.safetensors.0123456789ab.tmp"
    for path in (*stale, fresh):
        path.touch()
    for path in stale:
        os.utime(path, (0, 0))
    make_room(three[0], 0, 10**9)
    assert [path for path in (*stale, fresh) if path.exists()] == [fresh]


def test_more_than_is_allowed_is_not_begun(llama: Path) -> None:
    other = load(config("8bit"), directory=llama)
    other.close()
    _, _, said = loaded_bits(llama, packed_cache="20 kB")
    assert len(said) == 1
    assert said[0].endswith("and 'packed_cache' allows 20.0 kB")
    assert [kept.about.quantization for kept in kept_folders() if kept.about] == ["8bit"]


@pytest.mark.skipif(sys.platform == "win32", reason="a file that is mapped cannot be removed there")
def test_weights_in_use_may_be_removed(llama: Path) -> None:
    loaded_bits(llama)
    loaded = load(config(), directory=llama)
    expected = greedy(loaded)
    shutil.rmtree(packed_folder())
    assert greedy(loaded) == expected
    loaded.close()


# --- Moves -------------------------------------------------------------------------------------------


def test_blocks_that_leave_an_accelerator_come_from_the_cache(llama: Path, sim: SimulatedAccelerator) -> None:
    on_cpu = load(config("8bit"), directory=llama)
    expected = tensors(on_cpu)
    on_cpu.close()
    loaded = load(ModelConfig(device_map="auto", load_in_8bit=True), directory=llama)
    assert projections(loaded) == {}
    moved = loaded.residency.step_down("sim:0", 1, least=2)
    found = projections(loaded)
    layers = [name for name in moved if ".layers." in name]
    assert len(found) == 7 * len(layers) > 0
    assert all(p.mapped for p in found.values())
    assert all(torch.equal(value, expected[name]) for name, value in tensors(loaded).items())
    assert greedy(loaded)
    loaded.close()


def test_a_model_in_use_writes_nothing(llama: Path, sim: SimulatedAccelerator) -> None:
    loaded = load(ModelConfig(device_map="auto", load_in_8bit=True), directory=llama)
    loaded.residency.step_down("sim:0", 1, least=3)
    assert projections(loaded)
    assert kept_folders() == ()
    loaded.close()


def test_a_split_keeps_its_part_and_a_whole_adds_the_rest(llama: Path, sim: SimulatedAccelerator) -> None:
    split = {"": "cpu", "model.layers.0": 0}
    load(ModelConfig(device_map=split, load_in_8bit=True), directory=llama).close()
    assert len(list(packed_folder().rglob("*.safetensors"))) == LAYERS - 1
    plan = make_plan(ModelConfig(device_map=split, load_in_8bit=True), read_checkpoint(llama), probe_machine())
    (cpu,) = (use for use in plan.devices if use.device == "cpu")
    assert cpu.packing == 0 or not any(p.device == "sim:0" for p in plan.placements)
    assert loaded_bits(llama, bits="8bit")[1] == {True, False}
    assert loaded_bits(llama, bits="8bit")[1] == {True}


# --- Small things ------------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_looked_at(llama: Path) -> None:
    index = read_checkpoint(llama)
    plan = planned(llama)
    (llama / "model.safetensors").unlink()
    assert find_packed_files(index, "4bit") is None
    packed_folder().mkdir(parents=True)
    assert with_kept_weights(plan.footprint, config(), index) == plan.footprint
    with pytest.raises(CheckpointError):
        load(config(), directory=llama, plan=plan)


def test_the_kept_file_is_one_that_safetensors_reads(llama: Path) -> None:
    from safetensors.torch import load_file

    expected, _, _ = loaded_bits(llama)
    path = next(kept_folders()[0].path.glob("model.layers.1.safetensors"))
    held = load_file(path)
    held.pop("check")
    assert held.keys() == {name.removeprefix("model.layers.1.") for name in expected if ".layers.1." in name}
    assert all(torch.equal(value, expected[f"model.layers.1.{name}"]) for name, value in held.items())
