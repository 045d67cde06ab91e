"""Loading on real transformers models: every split and rung gives the CPU's tokens, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from lyra_emergence.checkpoint import read_checkpoint
from lyra_emergence.config import ModelConfig
from lyra_emergence.errors import CheckpointError, DoesNotFitError, MissingExtraError, ModelUnavailableError
from lyra_emergence.loading import load
from lyra_emergence.machine import probe_machine
from lyra_emergence.plan import make_plan

from .families import FAMILIES, make_tokenizer
from .running import NEW_TOKENS, PROMPT, anonymous_bytes, greedy, reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lyra_emergence.load_report import LoadEvent
    from lyra_emergence.loading import LoadedModel

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]

LAYERS = 4


def layer_names(directory: Path) -> list[str]:
    return [block.name for block in read_checkpoint(directory).blocks if block.kind == "layer"]


def layers_on(loaded: LoadedModel, device: str) -> int:
    layers = {p.block for p in loaded.plan.placements if p.kind == "layer"}
    return sum(block.device == device for block in loaded.blocks if block.name in layers)


def in_use(sim: SimulatedAccelerator) -> tuple[int, ...]:
    return tuple(sim.used(device) for device in range(sim.devices))


# Placement: the tokens of plain transformers on the CPU, wherever the blocks are.


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_model_on_the_accelerator(family: str, checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    loaded = load(ModelConfig(), directory=checkpoints(family))
    assert loaded.report.rung == "full"
    assert layers_on(loaded, "sim:0") == LAYERS
    assert greedy(loaded) == reference(checkpoints(family))
    loaded.close()
    assert in_use(sim) == (0, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_split_over_two_accelerators_and_the_cpu(
    family: str, checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    directory = checkpoints(family)
    names = layer_names(directory)
    for count in range(LAYERS + 1):
        split: dict[str, int | str] = {"": "cpu"} | {name: i % 2 for i, name in enumerate(names[:count])}
        loaded = load(ModelConfig(device_map=split), directory=directory)
        assert greedy(loaded) == reference(directory), split
        loaded.close()
    assert in_use(sim) == (0, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rung(family: str, checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints(family)
    config = ModelConfig(gpu_layers_fallback=2)
    plan = make_plan(config, read_checkpoint(directory), probe_machine(with_torch=True))
    assert [rung.name for rung in plan.rungs] == ["full", "fallback", "cpu"]
    for start, rung in enumerate(plan.rungs):
        loaded = load(config, directory=directory, plan=replace(plan, start=start))
        assert loaded.report.rung == rung.name
        assert layers_on(loaded, "sim:0") == {"full": 4, "fallback": 2, "cpu": 0}[rung.name]
        assert greedy(loaded) == reference(directory), rung.name
        loaded.close()


def test_a_head_apart_from_its_tied_embeddings(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama-tied")
    loaded = load(ModelConfig(device_map={"": "cpu", "lm_head": 0}), directory=directory)
    assert sim.used(0) == read_checkpoint(directory).blocks[0].nbytes
    assert greedy(loaded) == reference(directory)
    loaded.close()


def test_tied_weights_on_one_device_are_one_copy(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama-tied")
    loaded = load(ModelConfig(), directory=directory)
    model = loaded.model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    placed = sum(p.weights for p in loaded.plan.placements)
    rotary = model.model.rotary_emb.inv_freq.nbytes + model.model.rotary_emb.original_inv_freq.nbytes
    assert sim.used(0) == placed + rotary
    loaded.close()


def test_transformers_own_generate_runs_on_a_split_model(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    split = {"": "cpu", "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1}
    loaded = load(ModelConfig(device_map=split), directory=directory)
    ids = torch.tensor([PROMPT])
    out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    assert out[0, len(PROMPT) :].tolist() == reference(directory)
    loaded.close()


# The ladder.


def test_out_of_memory_steps_down_the_documented_ladder(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    config = ModelConfig(gpu_layers_fallback=2)
    plan = make_plan(config, read_checkpoint(directory), probe_machine(with_torch=True))
    # Another process takes memory between the plan and the load: three layers fit, then no more.
    blocks = {p.block: p.weights for p in plan.placements}
    sim.set_cap(blocks["model.embed_tokens"] + 3 * blocks["model.layers.0"] + 1000)
    loaded = load(config, directory=directory, plan=plan)
    report = loaded.report
    assert [(a.rung, a.outcome) for a in report.attempts] == [
        ("full", "out of memory"),
        ("fallback", "out of memory"),
        ("cpu", "loaded"),
    ]
    # A look at the free bytes was enough: nothing was copied in vain.
    assert [a.bytes_copied for a in report.attempts] == [0, 0, 0]
    assert report.attempts[0].bytes_short == plan.devices[0].used - sim.cap(0)
    assert report.attempts[0].reason.endswith(" is free")
    assert greedy(loaded) == reference(directory)
    loaded.close()


def test_the_middle_rung_is_the_documented_map(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    config = ModelConfig(gpu_layers_fallback=2)
    plan = make_plan(config, read_checkpoint(directory), probe_machine(with_torch=True))
    sim.fail_at(30)
    events: list[LoadEvent] = []
    loaded = load(config, directory=directory, plan=plan, on_event=events.append)
    assert [(a.rung, a.outcome) for a in loaded.report.attempts] == [("full", "out of memory"), ("fallback", "loaded")]
    assert loaded.report.device_map == {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": 0,
        "model.layers.2": "cpu",
        "model.layers.3": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    assert greedy(loaded) == reference(directory)
    assert [event.kind for event in events if event.kind in ("rung-failed", "demote")] == ["rung-failed", "demote"]
    loaded.close()


def test_a_fallback_reads_no_weight_twice(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    config = ModelConfig(gpu_layers_fallback=2)
    plan = make_plan(config, read_checkpoint(directory), probe_machine(with_torch=True))
    # Fails where the reserve is proved, after every block was promoted.
    sim.fail_at(sum(1 for _ in promoted_tensors(directory)) + 1)
    promoted: list[str] = []

    def note(event: LoadEvent) -> None:
        if event.kind == "promote":
            promoted.append(event.message)

    loaded = load(config, directory=directory, plan=plan, on_event=note)
    full, fallback = loaded.report.attempts
    assert (full.outcome, fallback.outcome) == ("out of memory", "loaded")
    assert full.bytes_copied == sim_bytes_of(loaded, "full")
    assert fallback.bytes_copied == 0
    assert len(promoted) == len(set(promoted))
    loaded.close()


def promoted_tensors(directory: Path) -> list[str]:
    index = read_checkpoint(directory)
    # Two rotary tables come with the layers.
    return [*index.tensors, "inv_freq", "original_inv_freq"]


def sim_bytes_of(loaded: LoadedModel, rung: str) -> int:
    placements = next(r for r in loaded.plan.rungs if r.name == rung).placements
    rotary = loaded.model.model.rotary_emb
    return sum(p.weights for p in placements) + rotary.inv_freq.nbytes + rotary.original_inv_freq.nbytes


@pytest.mark.parametrize("nth", [1, 7, 20, 39, 41])
def test_a_failure_at_any_allocation_leaves_a_right_model(
    nth: int, checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    directory = checkpoints("llama")
    sim.fail_at(nth)
    loaded = load(ModelConfig(), directory=directory)
    assert loaded.report.attempts[0].outcome == "out of memory"
    assert loaded.report.attempts[-1].outcome == "loaded"
    assert greedy(loaded) == reference(directory)
    loaded.close()
    assert in_use(sim) == (0, 0)


def test_without_a_number_the_fallback_keeps_what_fits(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    plan = make_plan(ModelConfig(), read_checkpoint(directory), probe_machine(with_torch=True))
    weights = {p.block: p.nbytes for p in plan.placements}
    reserve = plan.footprint.activations.layer
    sim.set_cap(weights["model.embed_tokens"] + 3 * weights["model.layers.0"] + reserve + 600)
    loaded = load(ModelConfig(), directory=directory, plan=plan)
    assert [(a.rung, a.outcome) for a in loaded.report.attempts] == [("full", "out of memory"), ("fallback", "loaded")]
    assert layers_on(loaded, "sim:0") == 3
    assert greedy(loaded) == reference(directory)
    loaded.close()


def test_a_persistent_failure_ends_on_the_cpu(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    sim.fail_at(1, persistent=True)
    loaded = load(ModelConfig(gpu_layers_fallback=2), directory=checkpoints("llama"))
    assert [a.outcome for a in loaded.report.attempts] == ["out of memory", "out of memory", "loaded"]
    assert loaded.report.rung == "cpu"
    assert in_use(sim) == (0, 0)
    assert greedy(loaded) == reference(checkpoints("llama"))
    loaded.close()


def test_the_report_tells_each_attempt(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    sim.fail_at(12)
    loaded = load(ModelConfig(gpu_layers_fallback=1), directory=checkpoints("llama"))
    failed, succeeded = loaded.report.attempts
    assert failed.reason.startswith("sim out of memory") or "out of memory" in failed.reason
    assert failed.block == "model.layers.1"
    assert failed.device_bytes_before == {"sim:0": 0, "sim:1": 0}
    assert failed.bytes_copied > 0
    assert failed.device_bytes_after["sim:0"] == failed.bytes_copied
    assert succeeded.device_bytes_after["sim:0"] == sim.used(0) > 0
    assert loaded.report.seconds >= sum(a.seconds for a in loaded.report.attempts)
    assert json.loads(json.dumps(loaded.report.to_json()))["rung"] == "fallback"
    loaded.close()


def test_no_fallback_gives_the_first_failure_to_the_user(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    sim.fail_at(10)
    with pytest.raises(DoesNotFitError, match=r"^out of memory on sim:0 while loading 'llama': ") as caught:
        load(ModelConfig(enable_progressive_fallback=False), directory=checkpoints("llama"))
    assert caught.value.hint == 'set "enable_progressive_fallback": true, or a lower "max_memory"'
    # Though the error is still held, the devices are empty.
    assert in_use(sim) == (0, 0)


@pytest.mark.parametrize("times", [1, 2])
def test_a_failure_without_a_reason_is_tried_once_more(
    times: int, checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    seen: list[str] = []

    def fail(event: LoadEvent) -> None:
        seen.append(event.kind)
        if event.kind == "map" and seen.count("map") <= times:
            raise SystemError("<function f at 0x7f> returned NULL without setting an exception")

    config, directory = ModelConfig(), checkpoints("llama")
    if times == 2:
        # A defect of an extension looks the same: the error comes out as it is, and is not called a lack of memory.
        with pytest.raises(SystemError, match="returned NULL without"):
            load(config, directory=directory, on_event=fail)
    else:
        loaded = load(config, directory=directory, on_event=fail)
        assert greedy(loaded) == reference(directory)
        loaded.close()
    assert seen[:3] == ["map", "retry", "map"]
    assert seen.count("retry") == 1
    assert in_use(sim) == (0, 0)


class OtherError(RuntimeError):
    """An error that is not about memory."""


def test_other_errors_surface_at_once_and_unchanged(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    seen: list[LoadEvent] = []

    def fail(event: LoadEvent) -> None:
        seen.append(event)
        if event.kind == "promote":
            raise OtherError("CUDA error: device-side assert triggered")

    with pytest.raises(OtherError, match="device-side assert"):
        load(ModelConfig(), directory=checkpoints("llama"), on_event=fail)
    assert [event.kind for event in seen] == ["map", "promote"]
    assert in_use(sim) == (0, 0)


def test_a_failure_in_a_copying_thread_keeps_the_blocks_before_it(
    checkpoints: Checkpoints, sim: SimulatedAccelerator
) -> None:
    plan = make_plan(ModelConfig(), read_checkpoint(checkpoints("llama")), probe_machine(with_torch=True))
    # The eleventh tensor is the last of layer 0: embeddings, nine of the layer, then this one fails.
    sim.fail_at(11)
    loaded = load(ModelConfig(), directory=checkpoints("llama"), plan=plan)
    failed = loaded.report.attempts[0]
    assert failed.block == "model.layers.1"
    assert failed.bytes_copied == sum(p.weights for p in plan.placements[:2])
    assert sim.pinned() == 0
    assert greedy(loaded) == reference(checkpoints("llama"))
    loaded.close()


def test_a_model_is_found_by_the_id_in_its_configuration(checkpoints: Checkpoints) -> None:
    loaded = load(ModelConfig(model_id=str(checkpoints("llama")), device_map="cpu"))
    assert loaded.plan.model == "llama"
    loaded.close()
    with pytest.raises(ModelUnavailableError, match="there is no such folder"):
        load(ModelConfig(model_id="./nowhere"))


def test_weights_stay_in_the_file(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 40_000, "hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**shape, dtype="bfloat16")).to(torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    before = anonymous_bytes()
    loaded = load(ModelConfig(device_map="cpu"), directory=tmp_path)
    assert loaded.report.bytes_mapped > 80_000_000
    assert loaded.report.bytes_copied == 0
    assert anonymous_bytes() - before < loaded.report.bytes_mapped // 10
    loaded.close()


# Dtypes and quantization.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_dtype_change_is_transformers_own(dtype: str, checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    from transformers import AutoModelForCausalLM

    directory = checkpoints("qwen2")
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).state_dict()
    split = {"": "cpu", "model.layers.0": 0, "model.layers.1": 0}
    loaded = load(ModelConfig(dtype=dtype, device_map=split), directory=directory)
    assert loaded.model.dtype == loaded.model.config.dtype == getattr(torch, dtype)
    for name, tensor in loaded.model.state_dict().items():
        assert tensor.dtype == plain[name].dtype
        assert torch.equal(tensor.cpu(), plain[name]), name
    loaded.close()


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quantized_on_the_cpu_as_transformers_does(bits: str, family: str, checkpoints: Checkpoints) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    directory = checkpoints(family)
    loaded = load(ModelConfig(device_map="cpu", cpu_kernels=False, **{f"load_in_{bits}": True}), directory=directory)
    quantization = BitsAndBytesConfig(
        **{f"load_in_{bits}": True}, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    theirs = AutoModelForCausalLM.from_pretrained(directory, quantization_config=quantization, device_map="cpu")
    packed = {type(module).__name__ for module in loaded.model.modules() if "bit" in type(module).__name__}
    assert packed == {"Linear8bitLt" if bits == "8bit" else "Linear4bit"}
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(ids).logits, theirs(ids).logits.float())
    loaded.close()


def test_quantized_on_both_sides_of_a_split(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    whole = load(ModelConfig(device_map="cpu", load_in_8bit=True), directory=directory)
    split = load(ModelConfig(device_map={"": "cpu", "model.layers.0": 0}, load_in_8bit=True), directory=directory)
    assert sum(p.weights for p in split.plan.placements if p.device == "sim:0") <= sim.used(0)
    assert greedy(split) == greedy(whole)
    whole.close()
    split.close()


def test_quantization_without_its_extra_names_the_command(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(MissingExtraError, match=r"^'load_in_4bit' needs the extra 'quant'") as caught:
        load(ModelConfig(load_in_4bit=True), directory=checkpoints("llama"))
    assert "pip install 'lyra-emergence[quant]'" in caught.value.hint


# Broken checkpoints.


def test_missing_weights_are_an_error_not_random_numbers(checkpoints: Checkpoints, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = shutil.copytree(checkpoints("llama"), tmp_path / "copy")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"1 weights of LlamaForCausalLM are missing: model\.layers\.2\.mlp\.up_proj"
    ):
        load(ModelConfig(), directory=directory)


def test_a_missing_tokenizer_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoints("llama"), tmp_path / "copy")
    for file in directory.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        load(ModelConfig(), directory=directory)


def test_an_unknown_architecture_is_told_in_a_line(checkpoints: Checkpoints, tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoints("llama"), tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    with pytest.raises(CheckpointError, match=r"has model type `nonsense` but") as caught:
        load(ModelConfig(), directory=directory)
    assert "\n" not in str(caught.value)
    assert caught.value.hint == "check config.json; a newer transformers may know the architecture"
