"""Blocks that are read from their file while the model runs."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import CheckpointError
from lyra_emergence.generation import GenerationOptions, Stepper, stream_generate
from lyra_emergence.loading import load
from lyra_emergence.runtime import streaming, weights_file
from lyra_emergence.runtime.read_ahead import ReadAhead

from .families import FAMILIES, LAYERS, build_checkpoint
from .running import NEW_TOKENS, PROMPT, greedy, reference
from .test_main_memory import control_group

if TYPE_CHECKING:
    from collections.abc import Callable

    from lyra_emergence.load_report import LoadEvent
    from lyra_emergence.loading import LoadedModel

    Checkpoints = Callable[[str], Path]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps and direct reads as Linux has them")


def prefix(family: str) -> str:
    return {"gpt2": "transformer.h", "gpt-neox": "gpt_neox.layers"}.get(family, "model.layers")


def on_disk(family: str, *others: str) -> ModelConfig:
    return ModelConfig(device_map={"": "cpu", prefix(family): "disk", **dict.fromkeys(others, "disk")})


def open_files(directory: Path) -> list[Path]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.append(link.readlink())
    return [path for path in found if directory in path.parents]


def threads() -> int:
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def streamed(loaded: LoadedModel) -> int:
    stream = loaded.residency.stream
    return 0 if stream is None else len(stream._blocks)


# Experts that the file holds one by one cannot stay there: their layers without them can.
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_tokens_of_transformers(family: str, checkpoints: Checkpoints) -> None:
    directory = checkpoints(family)
    config = on_disk(family)
    if family in ("mixtral", "qwen2-moe", "olmoe"):
        layers = [f"model.layers.{at}" for at in range(LAYERS)]
        config = ModelConfig(device_map={"": "cpu", **dict.fromkeys(layers, "disk")} | _experts(family))
    loaded = load(config, directory=directory)
    assert streamed(loaded) == LAYERS
    assert greedy(loaded) == reference(directory)
    assert greedy(loaded) == reference(directory)
    loaded.close()


def _experts(family: str) -> dict[str, str]:
    inside = "block_sparse_moe.experts" if family == "mixtral" else "mlp.experts"
    first = 1 if family == "qwen2-moe" else 0
    return {f"model.layers.{at}.{inside}": "cpu" for at in range(first, LAYERS)}


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_heads_are_streamed_too_and_files_may_be_many(family: str, tmp_path: Path) -> None:
    directory = build_checkpoint(family, tmp_path / family, torch.bfloat16, max_shard_size="100KB")
    table = "model.embed_tokens" if family == "llama-tied" else "model.norm"
    loaded = load(on_disk(family, "lm_head", table), directory=directory)
    assert streamed(loaded) == LAYERS + 1
    assert greedy(loaded) == reference(directory)
    loaded.close()


def test_while_a_block_runs_its_weights_lie_in_a_buffer_and_else_in_the_map(checkpoints: Checkpoints) -> None:
    # Lyra's kernels run a layer without its parts.
    config = on_disk("llama").model_copy(update={"cpu_kernels": False})
    loaded = load(config, directory=checkpoints("llama"))
    layer = loaded.model.model.layers[1]
    homes = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    values = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    seen = []

    def look(*_: object) -> None:
        now = dict(layer.named_parameters())
        seen.append({parameter.untyped_storage().data_ptr() for parameter in now.values()})
        assert all(parameter.data_ptr() != homes[name] for name, parameter in now.items())
        assert all(torch.equal(parameter, values[name]) for name, parameter in now.items())

    layer.self_attn.register_forward_pre_hook(look)
    greedy(loaded)
    # One buffer a pass, of two in all: four blocks fall to the same one each time.
    assert len(seen) == NEW_TOKENS
    assert len(set().union(*seen)) <= 2
    assert {name: parameter.data_ptr() for name, parameter in layer.named_parameters()} == homes
    loaded.close()


def test_what_is_as_large_as_the_buffers_is_not_streamed(checkpoints: Checkpoints) -> None:
    two = {"": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    loaded = load(ModelConfig(device_map=two), directory=checkpoints("llama"))
    assert streamed(loaded) == 0
    assert greedy(loaded) == reference(checkpoints("llama"))
    loaded.close()


def test_threads_files_and_buffers_end_with_the_model(checkpoints: Checkpoints) -> None:
    directory = checkpoints("llama")
    load(ModelConfig(device_map="cpu"), directory=directory).close()
    gc.collect()
    before, held = threads(), open_files(directory)
    for closes in (True, False):
        for _ in range(3):
            loaded = load(on_disk("llama"), directory=directory)
            greedy(loaded, 2)
            assert threads() >= before + 2
            assert len(open_files(directory)) > len(held)
            if closes:
                loaded.close()
            del loaded
            gc.collect()
            # A thread that was told to end is listed until it has.
            for _ in range(200):
                if threads() == before:
                    break
                threading.Event().wait(0.01)
            assert threads() == before
            assert open_files(directory) == held


def test_answers_share_the_stream(checkpoints: Checkpoints) -> None:
    directory = checkpoints("llama")
    loaded = load(on_disk("llama"), directory=directory)
    answers: list[list[int]] = []
    workers = [threading.Thread(target=lambda: answers.append(greedy(loaded))) for _ in range(3)]
    # Without the lock too, as a pipeline of transformers' runs it.
    ids = torch.tensor([PROMPT])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW_TOKENS, "do_sample": False}

    def by_transformers() -> None:
        out = loaded.model.generate(ids, **settings)
        answers.append(out[0, len(PROMPT) :].tolist())

    workers += [threading.Thread(target=by_transformers) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert answers == [reference(directory)] * 5
    loaded.close()


def test_a_pass_that_was_broken_off_leaves_its_buffer(checkpoints: Checkpoints) -> None:
    directory = checkpoints("llama")
    loaded = load(on_disk("llama"), directory=directory)
    layer = loaded.model.model.layers[2].self_attn

    def interrupt(*_: object) -> None:
        handle.remove()
        raise KeyboardInterrupt

    for _ in range(3):
        handle = layer.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            greedy(loaded)
    assert greedy(loaded) == reference(directory)
    loaded.close()


# --- What can go wrong -----------------------------------------------------------------------------


class Disk:
    """Reads of files that a test makes fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error = 0
        self.at = 0
        self.ends: int | None = None
        real_read = os.preadv

        def preadv(fd: int, buffers: Any, offset: int) -> int:
            end = offset + len(buffers[0])
            if self.error and offset <= self.at < end:
                raise OSError(self.error, os.strerror(self.error))
            got = real_read(fd, buffers, offset)
            if self.ends is not None:
                got = max(0, min(got, self.ends - offset))
            return got

        monkeypatch.setattr(weights_file.os, "preadv", preadv)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def place_of(directory: Path, name: str) -> int:
    from lyra_emergence.checkpoint import read_checkpoint

    return read_checkpoint(directory).tensors[name].begin


def test_a_disk_that_fails_is_an_error_that_names_file_and_tensor(checkpoints: Checkpoints, disk: Disk) -> None:
    directory, name = checkpoints("llama"), "model.layers.2.self_attn.q_proj.weight"
    loaded = load(on_disk("llama"), directory=directory)
    assert greedy(loaded) == reference(directory)
    disk.error, disk.at = errno.EIO, place_of(directory, name) + 2 * weights_file.PAGE
    with pytest.raises(CheckpointError) as caught:
        greedy(loaded)
    where = directory / "model.safetensors"
    assert str(caught.value) == f"{where}: tensor '{name}': its weights cannot be read: Input/output error"
    disk.error = 0
    assert greedy(loaded) == reference(directory)
    loaded.close()


def test_a_read_that_nobody_waited_for_is_tried_again_when_it_fails() -> None:
    begun, wanted = threading.Event(), threading.Event()
    reads: list[int] = []

    class Source:
        def read(self, target: memoryview, goes_on: Any) -> None:
            reads.append(len(reads))
            if len(reads) == 1:
                begun.set()
                assert wanted.wait(10)
                raise CheckpointError("the disk was ill")
            target[:1] = b"x"

    memory = bytearray(1)
    ring = ReadAhead([Source()], [memoryview(memory)])
    assert begun.wait(10)  # ahead, before anybody asks
    taken: list[int | None] = []
    reader = threading.Thread(target=lambda: taken.append(ring.take(0)))
    reader.start()
    while ring._ring._wanted is None:
        time.sleep(0.001)
    wanted.set()
    reader.join(10)
    assert (taken, reads, memory) == ([0], [0, 1], b"x")
    ring.close()


class Counted:
    """Sources of a byte each, which note when they are read."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.reads = 0

    def read(self, target: memoryview, _goes_on: Any) -> None:
        self.reads += 1
        target[:1] = bytes([self.number])


def taken(ring: ReadAhead, memories: list[bytearray], source: int) -> int:
    buffer = ring.take(source)
    assert buffer is not None
    try:
        return memories[buffer][0]
    finally:
        ring.leave(source)


def test_a_thread_that_dies_before_its_first_step_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def stillborn(_work: Any, _arguments: Any) -> int:
        return 1  # what a thread does whose first frame finds no memory: nothing

    monkeypatch.setattr("lyra_emergence.runtime.read_ahead._thread.start_new_thread", stillborn)
    memories = [bytearray(1), bytearray(1)]
    sources = [Counted(number) for number in range(4)]
    ring = ReadAhead(sources, [memoryview(memory) for memory in memories])
    for _ in range(2):
        assert [taken(ring, memories, number) for number in range(4)] == [0, 1, 2, 3]
    ring.close()


def test_a_read_that_finds_no_memory_to_begin_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("lyra_emergence.runtime.read_ahead._thread.start_new_thread", refuse)
    memories = [bytearray(1)]
    ring = ReadAhead([Counted(7), Counted(8)], [memoryview(memory) for memory in memories])
    with monkeypatch.context() as patch:
        patch.setattr(ring._ring, "_fill", refuse)
        for _ in range(3):
            with pytest.raises(MemoryError):
                ring.take(1)
    assert [taken(ring, memories, number) for number in (1, 0)] == [8, 7]
    ring.close()


def test_a_file_that_was_cut_off_is_an_error(checkpoints: Checkpoints, disk: Disk) -> None:
    directory = checkpoints("llama")
    loaded = load(on_disk("llama"), directory=directory)
    disk.ends = place_of(directory, "model.layers.0.mlp.down_proj.weight")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'model\.layers\..*: the file ends at \d+ b"):
        greedy(loaded)
    disk.ends = None
    assert greedy(loaded) == reference(directory)
    loaded.close()


def test_a_file_that_is_deleted_or_replaced_is_read_on(tmp_path: Path) -> None:
    directory = build_checkpoint("llama", tmp_path / "llama")
    expected = reference(directory)
    loaded = load(on_disk("llama"), directory=directory)
    file = directory / "model.safetensors"
    (tmp_path / "new").write_bytes(bytes(file.stat().st_size))
    (tmp_path / "new").replace(file)
    assert greedy(loaded) == expected
    loaded.close()


@pytest.mark.parametrize("when", ["opened", "read"])
def test_where_direct_reads_are_not_to_be_had_pages_are_given_up(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    real_open, real_read, dropped = os.open, os.preadv, []
    direct: set[int] = set()

    def opened(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT and when == "opened":
            raise OSError(errno.EINVAL, "no direct reads")
        fd = real_open(path, flags, *rest, **more)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        if fd in direct:
            raise OSError(errno.EINVAL, "not aligned as this disk wants it")
        return real_read(fd, buffers, offset)

    def advised(_fd: int, _begin: int, nbytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append(nbytes)

    monkeypatch.setattr(weights_file.os, "open", opened)
    monkeypatch.setattr(weights_file.os, "preadv", preadv)
    monkeypatch.setattr(weights_file.os, "posix_fadvise", advised)
    directory = checkpoints("llama")
    loaded = load(on_disk("llama"), directory=directory)
    assert greedy(loaded) == reference(directory)
    assert sum(dropped) > LAYERS * 64 * 64 * 4
    loaded.close()


def test_without_memory_for_buffers_pages_are_read_as_they_are_met(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(streaming, "_buffer", refuse)
    events: list[LoadEvent] = []
    loaded = load(on_disk("llama"), directory=checkpoints("llama"), on_event=events.append)
    assert "main memory has no room for buffers" in "".join(event.message for event in events if event.kind == "note")
    assert greedy(loaded) == reference(checkpoints("llama"))
    loaded.close()


def test_without_threads_who_wants_a_block_reads_it(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("lyra_emergence.runtime.read_ahead._thread.start_new_thread", refuse)
    loaded = load(on_disk("llama"), directory=checkpoints("llama"))
    assert streamed(loaded) == LAYERS
    assert greedy(loaded) == reference(checkpoints("llama"))
    loaded.close()


def test_memory_that_runs_short_takes_the_buffers(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(on_disk("llama"), directory=checkpoints("llama"))
    layer, left = loaded.model.model.layers[1], [2]

    def fail(*_: object) -> None:
        if left[0]:
            left[0] -= 1
            raise MemoryError

    layer.register_forward_pre_hook(fail)
    chunks = list(stream_generate(loaded, PROMPT, GenerationOptions(max_new_tokens=NEW_TOKENS)))
    assert [token for chunk in chunks for token in chunk.token_ids] == reference(checkpoints("llama"))
    stats = chunks[-1].stats
    assert stats is not None
    assert "weights are read from the file page by page" in [recovery.remedy for recovery in stats.recoveries]
    assert loaded.residency.stream is not None
    assert not loaded.residency.stream.close()
    loaded.close()


def test_one_thread_computes_while_the_disk_is_waited_for(checkpoints: Checkpoints) -> None:
    torch.set_num_threads(2)
    try:
        loaded = load(on_disk("llama"), directory=checkpoints("llama"))
        seen: list[int] = []
        loaded.model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
        stepper = Stepper(loaded)
        token = int(stepper.prefill(PROMPT).argmax())
        stepper.step(token)
        stepper.close()
        assert seen == [2, 1]
        assert torch.get_num_threads() == 2
        loaded.close()
    finally:
        torch.set_num_threads(1)


# --- Main memory that is really short --------------------------------------------------------------

# What libraries take, and the compiler, is there before the limit is set: it leaves 70% of the weights.
CHILD = """
import os, sys
from pathlib import Path
from lyra_emergence.config import ModelConfig
from lyra_emergence.runtime.cpu.library import find_library
from lyra_emergence.runtime.warm_up import run_small_model

group, directory = map(Path, sys.argv[1:])
with (directory / "model.safetensors").open("rb") as file:
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
(group / "cgroup.procs").write_text(str(os.getpid()))
run_small_model()
find_library()
from lyra_emergence.generation import Stepper
from lyra_emergence.loading import load

def number(*names):
    return next(int((group / name).read_text()) for name in names if (group / name).exists())

def read_bytes():
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))

weights = (directory / "model.safetensors").stat().st_size
limit = number("memory.usage_in_bytes", "memory.current") + int(0.7 * weights)
name = next(name for name in ("memory.limit_in_bytes", "memory.max") if (group / name).exists())
(group / name).write_text(str(limit))
loaded = load(ModelConfig(device_map="cpu", context_length=256), directory=directory)
stepper = Stepper(loaded)
tokens = [int(stepper.prefill([5, 6, 7]).argmax())]
for _ in range(4):
    tokens.append(int(stepper.step(tokens[-1]).argmax()))
before = read_bytes()
for _ in range(8):
    tokens.append(int(stepper.step(tokens[-1]).argmax()))
read = (read_bytes() - before) // 8
streamed = sum(p.weights for p in loaded.plan.placements if p.streamed)
stepper.close()
loaded.close()
print(weights, streamed, read, *tokens, flush=True)
"""


def test_within_seventy_per_cent_of_the_weights_a_token_reads_only_what_is_streamed(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from .families import make_tokenizer

    group = control_group()
    directory = tmp_path / "model"
    config = LlamaConfig(
        vocab_size=400, hidden_size=512, intermediate_size=1536, num_hidden_layers=16, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=256, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    del model
    try:
        environment: dict[str, Any] = os.environ | {"PYTHONPATH": str(Path(streaming.__file__).parents[2])}
        command = [sys.executable, "-c", CHILD, str(group), str(directory)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    finally:
        group.rmdir()
    assert done.returncode == 0, done.stderr
    weights, streamed_bytes, read, *tokens = done.stdout.split()
    # Of what does not stay, each byte is read once for a token, and hardly anything else.
    assert 0.2 * int(weights) < int(streamed_bytes) < 0.95 * int(weights)
    assert 0.9 * int(streamed_bytes) < int(read) < 1.1 * int(streamed_bytes)
    plain = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.tensor([[5, 6, 7]])
    out = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(tokens), do_sample=False)
    assert [int(token) for token in tokens] == out[0, 3:].tolist()
