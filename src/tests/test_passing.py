"""Converted weights on the CPU that are held only while their block runs."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
import torch

from lyra_emergence.config import ModelConfig
from lyra_emergence.generation import Stepper
from lyra_emergence.loading import load

from .families import build_checkpoint
from .running import PROMPT, greedy

if TYPE_CHECKING:
    from pathlib import Path

    from lyra_emergence.loading import LoadedModel


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return build_checkpoint("llama", tmp_path / "llama", torch.bfloat16)


def dtypes(loaded: LoadedModel) -> set[torch.dtype]:
    return {parameter.dtype for parameter in loaded.model.model.layers.parameters()}


@pytest.mark.parametrize("cpu_kernels", [False, True])
def test_copies_live_for_the_pass_of_their_block_and_come_back(stored: Path, cpu_kernels: bool) -> None:
    config = ModelConfig(device_map="cpu", dtype="float32", cpu_kernels=cpu_kernels)
    loaded = load(config, directory=stored)
    expected = greedy(loaded)
    assert dtypes(loaded) == {torch.float32}
    assert loaded.residency.pass_copies()
    assert not loaded.residency.pass_copies()
    stepper = Stepper(loaded)
    tokens = [int(stepper.prefill(PROMPT).argmax())]
    while len(tokens) < len(expected):
        tokens.append(int(stepper.step(tokens[-1]).argmax()))
        assert dtypes(loaded) == {torch.bfloat16}
    assert tokens == expected
    gc.collect()
    held = [tensor for tensor in gc.get_objects() if type(tensor) is torch.nn.Parameter]
    shape = loaded.model.model.layers[0].mlp.up_proj.weight.shape
    assert not [tensor for tensor in held if tensor.dtype == torch.float32 and tensor.shape == shape]
    stepper.close()
    loaded.residency.climb()
    assert dtypes(loaded) == {torch.float32}
    assert greedy(loaded) == expected
    loaded.close()


def test_what_is_the_map_itself_has_no_copies_to_let_go(stored: Path) -> None:
    loaded = load(ModelConfig(device_map="cpu"), directory=stored)
    assert not loaded.residency.pass_copies()
    loaded.close()
