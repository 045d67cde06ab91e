"""Caches cut back, moved and kept in main memory: a forward pass after it gives the logits it would have given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer

from lyra_emergence.runtime.kv_cache import (
    OffloadedLayer,
    cut_back,
    held_bytes,
    move_layer,
    offload,
    offloading_caches,
    onload,
)

from .running import PROMPT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]


@pytest.fixture
def model(checkpoints: Checkpoints) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoints("llama"), local_files_only=True).eval()


@torch.inference_mode()
def logits_of(model: Any, tokens: list[int], caches: dict[str, Any]) -> torch.Tensor:
    inputs = torch.tensor([tokens], device=model.device)
    return model(input_ids=inputs, use_cache=True, **caches).logits[:, -1].cpu()


def undisturbed(model: Any) -> torch.Tensor:
    """The logits after the prompt in two pieces, which differ in their last bits from those after it in one."""
    caches = {"past_key_values": DynamicCache(config=model.config)}
    logits_of(model, list(PROMPT[:5]), caches)
    return logits_of(model, list(PROMPT[5:]), caches)


@pytest.fixture
def on_sim(model: Any, sim: SimulatedAccelerator) -> Any:
    yield model.to("sim:0")
    model.to("cpu")


@torch.inference_mode()
def test_offloaded_caches_leave_the_device_and_change_no_logit(on_sim: Any, sim: SimulatedAccelerator) -> None:
    whole = undisturbed(on_sim)
    at_rest = sim.settled()[0]
    caches = {"past_key_values": DynamicCache(config=on_sim.config)}
    logits_of(on_sim, list(PROMPT[:5]), caches)
    # 5 tokens, float32: keys and values of each layer are 5 x heads x size x 4 bytes.
    config = on_sim.config
    per_layer = 2 * 5 * config.num_key_value_heads * config.head_dim * 4
    assert held_bytes(caches, "sim:0") == config.num_hidden_layers * per_layer
    assert offload(caches, range(1, config.num_hidden_layers))
    assert held_bytes(caches, "sim:0") == per_layer
    assert held_bytes(caches, "cpu") == (config.num_hidden_layers - 1) * per_layer
    assert not offload(caches, range(1, config.num_hidden_layers))
    assert torch.equal(logits_of(on_sim, list(PROMPT[5:]), caches), whole)
    onload(caches, range(config.num_hidden_layers))
    assert held_bytes(caches, "cpu") == 0
    assert {type(layer) for layer in caches["past_key_values"].layers} == {DynamicLayer}
    assert cut_back(caches, 5)
    assert torch.equal(logits_of(on_sim, list(PROMPT[5:]), caches), whole)
    del caches
    assert sim.settled()[0] == at_rest


@torch.inference_mode()
def test_caches_begun_in_main_memory(on_sim: Any, sim: SimulatedAccelerator) -> None:
    whole = undisturbed(on_sim)
    caches = offloading_caches(on_sim.config, {0, 2})
    logits_of(on_sim, list(PROMPT[:5]), caches)
    kinds = [type(layer) for layer in caches["past_key_values"].layers]
    assert kinds == [OffloadedLayer, DynamicLayer] * 2
    # A step that failed between keys and values leaves more of the one than of the other.
    first = caches["past_key_values"].layers[0]
    first.keys = torch.cat([first.keys, first.keys[..., :2, :]], dim=-2)
    assert cut_back(caches, 5)
    assert torch.equal(logits_of(on_sim, list(PROMPT[5:]), caches), whole)


@torch.inference_mode()
def test_a_block_that_leaves_finds_its_offloaded_cache(model: Any) -> None:
    whole = undisturbed(model)
    caches = offloading_caches(model.config, {0})
    logits_of(model, list(PROMPT[:5]), caches)
    assert move_layer(caches, 0, "cpu")
    assert torch.equal(logits_of(model, list(PROMPT[5:]), caches), whole)


def test_what_is_not_known_is_not_touched() -> None:
    class Derived(DynamicLayer):
        pass

    cache = DynamicCache()
    cache.layers = [Derived()]
    assert not cut_back({"past_key_values": cache}, 0)
    assert not move_layer({"past_key_values": cache}, 0, "cpu")
    assert not offload({"past_key_values": cache}, {0})
    assert not offload({"cache_params": object()}, {0})
