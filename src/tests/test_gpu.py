"""The same promises on a real GPU: tokens, steps down the ladder, quantization, and memory given back.

Run in a process of their own (`uv run pytest -m gpu src/tests/test_gpu.py`): once the simulated accelerator is
registered, torch takes it for the machine's accelerator.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.config import ModelConfig
from lyra_emergence.loading import load
from lyra_emergence.machine import probe_machine
from lyra_emergence.plan import make_plan

from .families import FAMILIES, LAYERS, build_checkpoint
from .running import greedy, reference
from .test_guests import LONG, answer, expected, split, where_blocks_run
from .test_streaming import prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Checkpoints = Callable[[str], Path]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]


@pytest.fixture(autouse=True)
def _nothing_stays_on_the_gpu() -> Iterator[None]:
    if hasattr(torch, "sim"):
        pytest.skip("the simulated accelerator is registered: run this file in a process of its own")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rung_gives_the_cpus_tokens(family: str, checkpoints: Checkpoints) -> None:
    directory = checkpoints(family)
    config = ModelConfig(gpu_layers_fallback=2)
    plan = make_plan(config, read_checkpoint(directory), probe_machine(with_torch=True))
    for start, rung in enumerate(plan.rungs):
        loaded = load(config, directory=directory, plan=replace(plan, start=start))
        assert loaded.report.rung == rung.name
        assert greedy(loaded) == reference(directory), rung.name
        loaded.close()


def test_real_out_of_memory_steps_down(checkpoints: Checkpoints) -> None:
    directory = checkpoints("llama")
    plan = make_plan(ModelConfig(), read_checkpoint(directory), probe_machine(with_torch=True))
    # The look at the free bytes does not know this limit: the allocation itself fails.
    torch.cuda.set_per_process_memory_fraction(1e-9)
    loaded = load(ModelConfig(), directory=directory, plan=plan)
    assert loaded.report.attempts[0].outcome == "out of memory"
    assert "CUDA out of memory" in loaded.report.attempts[0].reason
    assert loaded.report.rung == "cpu"
    assert greedy(loaded) == reference(directory)
    loaded.close()


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantized_blocks_on_the_gpu_and_on_the_cpu(bits: str, checkpoints: Checkpoints) -> None:
    split = {"": 0, "model.layers.2": "cpu", "model.layers.3": "cpu"}
    config = ModelConfig(device_map=split, dtype="bfloat16", **{f"load_in_{bits}": True})
    loaded = load(config, directory=checkpoints("llama"))
    planned = sum(p.weights for p in loaded.plan.placements if p.device == "cuda:0")
    assert planned <= torch.cuda.memory_allocated() < planned + 2**20
    assert len(greedy(loaded)) > 0
    loaded.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_prompt_runs_layers_of_main_memory_on_the_gpu(family: str, checkpoints: Checkpoints) -> None:
    directory = checkpoints(family)
    loaded = load(split(family), directory=directory)
    before = {name: parameter.detach().cpu() for name, parameter in loaded.model.named_parameters()}
    at_rest = torch.cuda.memory_allocated()
    loaded.residency.least_tokens = len(LONG)
    seen = where_blocks_run(loaded)
    for _ in range(3):  # copies race with what computes, if they do
        assert answer(loaded) == expected(directory)
    assert seen[f"{prefix(family)}.{LAYERS - 1}"][0] == "cuda:0"
    assert all(torch.equal(before[name], parameter.cpu()) for name, parameter in loaded.model.named_parameters())
    assert torch.cuda.memory_allocated() == at_rest
    loaded.close()


def test_a_compiled_step_gives_the_same_tokens(checkpoints: Checkpoints) -> None:
    directory, notes = checkpoints("llama"), []
    config = ModelConfig(device_map={"": 0}, compile_decode=True)
    loaded = load(config, directory=directory, on_event=lambda event: notes.append(event.message))
    for _ in range(3):  # the first traces, the second records, the third replays
        assert greedy(loaded) == reference(directory)
    assert loaded.compiled is not None
    assert not loaded.compiled.ended, notes
    at_rest = torch.cuda.memory_allocated()
    assert greedy(loaded) == reference(directory)
    assert torch.cuda.memory_allocated() <= at_rest
    loaded.close()


def test_guests_wait_for_their_copies_and_hosts_for_their_guests(tmp_path: Path) -> None:
    # Layers large enough that copying one and computing one take milliseconds each.
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    directory = build_checkpoint("llama", tmp_path / "wide", torch.float32, sizes=sizes)
    loaded = load(split(), directory=directory)
    loaded.residency.least_tokens = len(LONG)
    for _ in range(5):
        assert answer(loaded) == expected(directory)
    loaded.close()
