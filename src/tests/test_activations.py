"""The temporaries that a plan counts: formulas against a trial forward, and the trial against a device's own count."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lyra_emergence.activations import KNOWN_TYPES, Activations
from lyra_emergence.checkpoint import CheckpointIndex, read_checkpoint
from lyra_emergence.config import ModelConfig
from lyra_emergence.footprint import PREFILL_CHUNK, estimate_footprint, is_known
from lyra_emergence.framework import KERNELS_KEPT, MOST_KERNEL_BUFFERS, kernel_buffers
from lyra_emergence.generation import Stepper
from lyra_emergence.loading import load
from lyra_emergence.machine import probe_machine
from lyra_emergence.plan import make_plan
from lyra_emergence.runtime.live_bytes import FusedAttention, LiveBytes
from lyra_emergence.runtime.memory import peak_bytes, reset_peak
from lyra_emergence.runtime.trial_forward import UntriedError, run_trial
from lyra_emergence.trial import Trial, find_trial

from .families import FAMILIES
from .paper_checkpoints import write_paper

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .simulated_accelerator import SimulatedAccelerator

_SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "vocab_size": 512,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": 16,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": {
        **_LATENT,
        **_EXPERTS,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    },
    "gemma3_text": {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {
        "n_inner": 704,
        "n_embd": 256,
        "n_layer": 2,
        "n_head": 8,
        "n_positions": 8192,
        "num_key_value_heads": None,
    },
    "minicpm3": _LATENT,
    "mistral": {"sliding_window": 512},
    "mixtral": {**_EXPERTS, "sliding_window": None},
    "olmo3": {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]},
    "olmoe": _EXPERTS,
    "gpt_neox": {"num_key_value_heads": None},
    "opt": {"ffn_dim": 704, "word_embed_proj_dim": 256, "num_key_value_heads": None},
    "qwen2_moe": {**_EXPERTS, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 256},
    "qwen3_moe": {**_EXPERTS, "moe_intermediate_size": 128},
}
_MAMBA2 = {"hidden_size": 256, "num_heads": 8, "head_dim": 64, "state_size": 32, "n_groups": 1, "expand": 2}
_SLIDING = {name for name, settings in _SETTINGS.items() if settings.get("sliding_window")}


def described(directory: Path, model_type: str, **settings: Any) -> CheckpointIndex:
    """A checkpoint of that type as transformers would write it, of tensors without data."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**_SHAPE, **_SETTINGS.get(model_type, {}), **settings})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes = {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    written = json.loads(config.to_json_string(use_diff=False)) | {"dtype": "bfloat16"}
    return write_paper(directory, shapes, written, dtype="BF16")


@pytest.mark.parametrize("context", [700, 2048, 6000])
@pytest.mark.parametrize("model_type", sorted(KNOWN_TYPES))
def test_formulas_bound_a_trial_forward_closely(model_type: str, context: int, tmp_path: Path) -> None:
    index = described(tmp_path, model_type)
    for dtype, batch in (("bfloat16", 1), ("float32", 2)):
        made = estimate_footprint(index, context_length=context, batch=batch, dtype=dtype)
        trial = run_trial(index, context, batch, dtype, PREFILL_CHUNK, trust_remote_code=False)
        # A sliding layer is longest after the prompt, whose last tokens are single ones in the trial.
        caches = [b.kv_cache for b in made.blocks if b.kind == "layer"]
        assert caches == pytest.approx(trial.kv_cache, rel=0 if model_type not in _SLIDING else 0.005)
        planned, taken = (
            one.of(layer=True, experts=True, kv_cache=made.kv_cache) for one in (made.activations, trial.activations)
        )
        assert 0.995 * taken <= planned <= 1.5 * taken
        assert made.activations.head >= trial.activations.head
        # Where a projection of a layer runs; the trial counts the head's, too.
        inside = max(trial.activations.projecting, trial.activations.earlier_projecting)
        assert max(made.activations.projecting, made.activations.earlier_projecting) >= 0.995 * inside


@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_takes_what_is_planned_and_hardly_less(
    family: str, checkpoints: Callable[[str], Path], sim: SimulatedAccelerator
) -> None:
    directory = checkpoints(family)
    config = ModelConfig(model_id=str(directory))
    plan = make_plan(config, read_checkpoint(directory), probe_machine(with_torch=True))
    use = plan.devices[0]
    before = sim.used()
    loaded = load(config, directory=directory, plan=plan)
    assert plan.rung.name == "full"
    tables = sum(t.nbytes for name, t in loaded.model.named_buffers() if name not in loaded.model.state_dict())
    assert sim.used() - before == use.weights + tables
    reset_peak("sim:0")
    stepper = Stepper(loaded)
    stepper.prefill([5] * (plan.context_length - 2))
    stepper.step(7)
    stepper.step(7)
    peak = peak_bytes("sim:0")
    assert peak is not None
    taken = peak - before - tables
    assert taken <= use.used
    assert use.used - taken <= 0.5 * use.activations
    del stepper
    loaded.close()


def test_the_trial_counts_what_the_device_counts(checkpoints: Callable[[str], Path], sim: SimulatedAccelerator) -> None:
    directory = checkpoints("gemma2")
    index = read_checkpoint(directory)
    assert not is_known(index)
    trial = run_trial(index, 256, 1, "float32", PREFILL_CHUNK, trust_remote_code=False)
    config = ModelConfig(model_id=str(directory), context_length=256)
    loaded = load(config, directory=directory)
    before = sim.used()
    reset_peak("sim:0")
    stepper = Stepper(loaded)
    stepper.prefill([5] * 254)
    peak = peak_bytes("sim:0")
    assert peak is not None
    assert peak - before == pytest.approx(
        sum(trial.kv_cache) + trial.activations.of(layer=True, kv_cache=sum(trial.kv_cache)), rel=0.02
    )
    del stepper
    loaded.close()


def test_live_bytes_rise_and_fall_with_tensors() -> None:
    weight = torch.zeros(100)
    live = LiveBytes([weight])
    with torch.inference_mode(), live:
        one = weight + 1
        view = one[10:]
        assert (live.now, live.peak) == (400, 400)
        del one
        assert live.now == 400  # the view holds the storage
        two = view.softmax(0, dtype=torch.float64)
        # The conversion inside counts while it lasts.
        assert (live.now, live.peak) == (400 + 720, 400 + 2 * 720)
        del view, two
        assert live.now == 0
        weight.add_(1)
        assert live.now == 0


def test_recurrent_states_are_counted(tmp_path: Path) -> None:
    index = described(tmp_path, "mamba2", **_MAMBA2)
    trial, reason = find_trial(index, context=512, batch=1, dtype="bfloat16", chunk=PREFILL_CHUNK)
    assert trial is not None, reason
    # (heads, width, state) in float32, and the last four inputs of the convolution.
    states = 8 * 64 * 32 * 4 + (512 + 2 * 32) * 4 * 2
    assert trial.kv_cache == (states, states)
    longer, _ = find_trial(index, context=1024, batch=1, dtype="bfloat16", chunk=PREFILL_CHUNK)
    assert longer is not None
    assert longer.kv_cache == trial.kv_cache
    assert longer.activations.of(layer=True) > 1.9 * trial.activations.of(layer=True)  # the whole prompt at once


def test_a_plan_of_an_unknown_type_rests_on_a_trial_and_says_so(tmp_path: Path) -> None:
    index = described(tmp_path, "mamba2", **_MAMBA2)
    plan = make_plan(ModelConfig(context_length=512), index, probe_machine())
    assert "caches and activations of 'mamba2' are from a trial forward without weights" in plan.notes
    trial, _ = find_trial(index, context=512, batch=1, dtype="bfloat16", chunk=PREFILL_CHUNK)
    assert trial is not None
    assert plan.footprint.activations == trial.activations.with_experts_in_layers()
    assert plan.footprint.kv_cache == sum(trial.kv_cache)


def test_results_are_kept_and_a_damaged_file_is_replaced(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = described(tmp_path, "bloom", n_layer=2, n_head=8)
    trial, _ = find_trial(index, context=300, batch=1, dtype="bfloat16", chunk=PREFILL_CHUNK)
    kept = next(home.rglob("trials.json"))

    def fail(*_: object, **__: object) -> Trial:
        raise AssertionError("run again")

    monkeypatch.setattr("lyra_emergence.runtime.trial_forward.run_trial", fail)
    assert find_trial(index, context=300, batch=1, dtype="bfloat16", chunk=PREFILL_CHUNK) == (trial, "")
    with pytest.raises(AssertionError, match="run again"):
        find_trial(index, context=301, batch=1, dtype="bfloat16", chunk=PREFILL_CHUNK)
    monkeypatch.undo()
    for damage in ("", "{", "[]", '{"format": "lyra.trials/4", "trials": {"a": 1}}'):
        kept.write_text(damage)
        assert find_trial(index, context=300, batch=1, dtype="bfloat16", chunk=PREFILL_CHUNK) == (trial, "")
    assert json.loads(kept.read_text())["trials"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "no_such_type"}, "transformers does not build it: "),
        ({"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "code.Model"}}, "its code comes with the"),
        ({"model_type": "mra", "architectures": ["MraForCausalLM"]}, "transformers does not build it: "),
        ({"model_type": "xlnet", "d_model": 64, "n_head": 2, "n_layer": 1}, "its forward pass needs data: "),
        ({"model_type": "llama", "hidden_size": 7, "num_attention_heads": 2}, "transformers does not build it: "),
    ],
)
def test_what_cannot_be_tried_says_why(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    index = write_paper(tmp_path, {"model.layers.0.w.weight": (4, 4), "lm_head.weight": (4, 4)}, config)
    with pytest.raises(UntriedError, match=reason):
        run_trial(index, 64, 1, "float32", 16, trust_remote_code=False)


def test_fused_attention_on_the_cpu_lays_keys_and_values_out_anew(tmp_path: Path) -> None:
    index = described(tmp_path, "llama", intermediate_size=64)
    for dtype, context, packed in (
        # 8 heads of 32 for keys and 32 for values, in bfloat16, and for two sequences.
        ("bfloat16", 2048, 2 * 8 * 2048 * (32 + 32) * 2),
        ("float32", 2048, 0),
        # One token over two chunks: too few queries for it to pay. The chunk before it counts, with 2048 tokens.
        ("bfloat16", 2049, 2 * 8 * 2048 * (32 + 32) * 2),
    ):
        made = estimate_footprint(index, context_length=context, batch=2, dtype=dtype)
        busy = made.activations
        assert busy.of(layer=True, on_cpu=True) == busy.of(layer=True) + packed
        assert busy.cpu_layer == busy.layer + packed * (context == 2048)


def test_what_kernels_take_on_the_cpu_is_counted_beside_tensors() -> None:
    live = LiveBytes([])
    with torch.inference_mode(), FusedAttention(live), live:
        queries = torch.empty(2, 4, 100, 16, dtype=torch.bfloat16, device="meta")
        keys = torch.empty(2, 4, 300, 16, dtype=torch.bfloat16, device="meta")
        held = (2 * 4 * 100 * 16 + 2 * 4 * 300 * 16) * 2
        assert live.now == held
        live.forget_peaks()
        torch.nn.functional.scaled_dot_product_attention(queries, keys, keys)
        # The output, a float32 for each query, and keys and values once more.
        assert live.peak == held + 2 * 4 * 100 * (16 * 2 + 4)
        assert live.cpu_peak == live.peak + 2 * 4 * 300 * (16 + 16) * 2
        live.forget_peaks()
        scores = torch.empty(8, 100, 301, dtype=torch.bfloat16, device="meta")
        made = live.now
        out = torch.bmm(scores[:, :, :300], keys.view(8, 300, 16))
        # Rows of 300 with a gap behind each are copied; the output is there by then.
        assert live.peak == made + out.nbytes
        assert live.cpu_peak == live.peak + 8 * 100 * 300 * 2
        live.forget_peaks()
        # Transposed matrices are taken as they are, and so is float32.
        torch.bmm(scores[:, :, :300].contiguous(), keys.view(8, 300, 16))
        torch.bmm(scores.transpose(1, 2).float(), scores.float())
        assert live.cpu_peak == live.peak


def test_kernels_are_counted_by_shapes_and_numbers_of_tokens(tmp_path: Path) -> None:
    index = described(tmp_path / "llama", "llama")
    # Of queries and output, of keys and values, of gate and up, and of down: for 1,024 tokens, for what is left of the
    # prompt and for one token. The head sees one token.
    for context, kernels in ((512, 4 * 2 + 1), (1024, 4 * 2 + 1), (1025, 4 * 3 + 1), (6000, 4 * 3 + 1)):
        assert estimate_footprint(index, context_length=context).kernels == kernels
    mixture = described(tmp_path / "mixtral", "mixtral")
    assert estimate_footprint(mixture, context_length=512).kernels == KERNELS_KEPT
    recurrent = described(tmp_path / "mamba2", "mamba2", **_MAMBA2)
    written_out = described(tmp_path / "bloom", "bloom", n_layer=2, n_head=8)
    # In and out; the state of a token is multiplied in one shape. A recurrent state takes the prompt whole.
    for index, kernels in ((recurrent, 2 * 2 + 1 + 1), (written_out, KERNELS_KEPT)):
        trial, _ = find_trial(index, context=2048, batch=1, dtype="bfloat16", chunk=PREFILL_CHUNK)
        assert estimate_footprint(index, context_length=2048, trial=trial).kernels == kernels
    assert kernel_buffers("bfloat16", 5) - kernel_buffers("bfloat16", 0) == 5 * 700 * 1024
    assert kernel_buffers("bfloat16", 300) == kernel_buffers("bfloat16", KERNELS_KEPT) == MOST_KERNEL_BUFFERS
    assert kernel_buffers("float32", 300) == kernel_buffers("float32", 0)


def test_unpacking_counts_where_a_projection_runs() -> None:
    live = LiveBytes([])
    with torch.inference_mode(), FusedAttention(live), live:
        inputs = torch.empty(10, 8, device="meta")  # 320 bytes
        weight = torch.empty(4, 8, device="meta")  # 128 bytes
        live.forget_peaks()
        torch.nn.functional.linear(inputs, weight)
        wide = inputs.double()
        del wide
    assert live.projecting == 320 + 128 + 10 * 4 * 4
    assert live.peak == 320 + 128 + 640
    busy = Activations(embedding=0, layer=900, head=0, earlier=1000, projecting=500, earlier_projecting=990)
    unpacked = busy.with_unpacked_projection(300, on_cpu=100)
    assert (unpacked.layer, unpacked.earlier) == (900, 1290)
    # On the CPU what is unpacked has the same room for a whole pass.
    assert [unpacked.of(layer=True, on_cpu=on_cpu) for on_cpu in (False, True)] == [1290, 1100]
    # Where the moment is not known, it may be the fullest one.
    unpacked = Activations(embedding=0, layer=900, head=0).with_unpacked_projection(300, on_cpu=300)
    assert (unpacked.layer, unpacked.earlier) == (1200, 0)


def test_packed_layers_of_a_tried_type_take_more_only_in_projections(tmp_path: Path) -> None:
    index = described(tmp_path, "mamba2", **_MAMBA2)
    trial, _ = find_trial(index, context=512, batch=1, dtype="bfloat16", chunk=PREFILL_CHUNK)
    assert trial is not None
    plain, packed = (
        estimate_footprint(index, context_length=512, trial=trial, quantization=form).activations
        for form in (None, "4bit")
    )
    # Of the prompt, most is taken in the scan, between the projections; the widest of these is unpacked whole.
    unpacked = 256 * (2 * 512 + 2 * 32 + 8) * 2
    assert trial.activations.earlier_projecting + unpacked < trial.activations.earlier
    assert packed.earlier == plain.earlier
    # Of a single token, the projection itself.
    assert packed.layer == trial.activations.projecting + unpacked > plain.layer


def test_keys_wider_than_values_are_not_fused_on_the_cpu(tmp_path: Path) -> None:
    index = described(tmp_path / "latent", "deepseek_v3", intermediate_size=64, moe_intermediate_size=16)
    heads, key, value = 8, 32 + 16, 32
    for dtype, size, converted in (
        ("float32", 4, 0),
        ("bfloat16", 2, 700 * heads * key + 700 * heads * (key + value)),
    ):
        busy = estimate_footprint(index, context_length=700, batch=2, dtype=dtype).activations
        # Beside inputs, for each of two sequences: scores and softmax in float32, which of them are infinite, scaled
        # queries, what is converted, and a mask of its own, as a number and as a boolean.
        more = 700 * 700 * (heads * (4 + 4 + 1) + size + 1) + 4 * (700 * heads * key + converted)
        attention = 700 * heads * (key + value) + 700 * heads * (key + value) + 700 * heads * key
        expanded = 700 * heads * (32 + 32 + key)
        hidden = 3 * 700 * 256 * size
        throughout = 2 * hidden + 2 * 3 * 700 * 8 + 2 * 2 * 700 * 16 * 4 + 3 * 16 * 4
        assert busy.of(layer=True, on_cpu=True) == throughout + 2 * (attention + expanded) * size + 2 * more
    trial, _ = find_trial(index, context=700, batch=2, dtype="bfloat16", chunk=PREFILL_CHUNK)
    assert trial is not None
    tried = estimate_footprint(index, context_length=700, batch=2, trial=trial).activations
    assert tried.of(layer=True, on_cpu=True) == tried.layer + 2 * more


def test_experts_that_are_merged_take_main_memory(checkpoints: Callable[[str], Path]) -> None:
    index = read_checkpoint(checkpoints("mixtral"))
    made = estimate_footprint(index)
    merged = {b.name: b.nbytes for b in index.blocks if b.kind == "experts"}
    assert len(merged) == len(index.layers)
    assert {b.name: b.home for b in made.blocks if b.home} == merged
    # What is beside them stays a map of the file.
    assert {b.name for b in made.blocks if not b.mapped} == set(merged)
