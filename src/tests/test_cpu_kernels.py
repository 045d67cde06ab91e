"""Compiled kernels on the CPU: they multiply and attend as torch does, where they apply, and step aside elsewhere."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from lyra_emergence import main_memory
from lyra_emergence.compiler import find_compiler
from lyra_emergence.config import ModelConfig
from lyra_emergence.generation import GenerationOptions, stream_generate
from lyra_emergence.loading import load
from lyra_emergence.runtime.cpu import decoder, library
from lyra_emergence.runtime.cpu.choice import Choice
from lyra_emergence.runtime.cpu.linear import quicken
from lyra_emergence.runtime.cpu.packed import PackedProjection
from lyra_emergence.runtime.kv_cache import give_room
from lyra_emergence.runtime.scratch import keeping_scratch, scratch

from .families import FAMILIES
from .running import NEW_TOKENS, PROMPT, greedy, reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def kernels() -> library.Library:
    found = library.find_library()
    if found is None:
        pytest.skip(library.why_none())
    return found


def always(_weight: torch.Tensor, _tokens: int) -> bool:
    return True


# --- Projections -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 33), (333, 1056), (64, 64), (130, 4097)])
def test_a_projection_is_as_exact_as_torch_s(
    kernels: library.Library, dtype: torch.dtype, tokens: int, rows: int, columns: int
) -> None:
    linear = nn.Linear(columns, rows, bias=rows % 2 == 1).to(dtype).requires_grad_(requires_grad=False)
    x = torch.randn(1, tokens, columns).to(dtype)
    bias = linear.bias.double() if linear.bias is not None else None
    exact = functional.linear(x.double(), linear.weight.double(), bias)
    own = linear(x)
    quicken(linear, kernels, always)
    calls = _counted(linear)
    quick = linear(x)
    assert calls == [1]
    assert (quick.dtype, quick.shape) == (own.dtype, own.shape)
    assert (quick.double() - exact).norm() <= 1.5 * (own.double() - exact).norm() + 1e-6 * exact.norm()


def _counted(linear: Any) -> list[int]:
    """How often the kernels are called for a projection, counted in a list of one number."""
    calls = [0]
    forward = linear.forward
    whole = forward._library

    class Counting:
        most_tokens = whole.most_tokens

        def linear(self, *arguments: Any) -> None:
            calls[0] += 1
            whole.linear(*arguments)

    forward._library = Counting()
    return calls


def test_what_the_kernels_do_not_take_goes_to_torch(kernels: library.Library) -> None:
    linear = nn.Linear(32, 16)
    quicken(linear, kernels, always)
    calls = _counted(linear)
    torch.testing.assert_close(
        linear(torch.ones(9, 32)), functional.linear(torch.ones(9, 32), linear.weight, linear.bias)
    )
    assert linear(torch.ones(0, 32)).shape == (0, 16)
    # A gradient is wanted: the kernels have none.
    linear(torch.ones(1, 32)).sum().backward()
    assert linear.weight.grad is not None
    with torch.no_grad():
        linear.weight = nn.Parameter(torch.ones(32, 16).T)
        assert linear(torch.ones(1, 32))[0, 0] == 32 + linear.bias[0]
        assert calls == [0]
        linear.weight = nn.Parameter(torch.ones(16, 32))
        assert linear(torch.ones(2, 32)[:, ::1])[0, 0] == 32 + linear.bias[0]
        wide = torch.arange(64.0).reshape(1, 64)
        assert torch.equal(linear(wide[:, ::2]), functional.linear(wide[:, ::2], linear.weight, linear.bias))
    assert calls == [2]


def test_several_threads_multiply_at_once(kernels: library.Library) -> None:
    linear = nn.Linear(512, 256).requires_grad_(requires_grad=False)
    quicken(linear, kernels, always)
    inputs = [torch.randn(1, 512) for _ in range(4)]
    alone = [linear(x) for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            wrong.extend([number] * (not torch.equal(linear(inputs[number]), alone[number])))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- Packed ------------------------------------------------------------------------------------------


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_packed_weights_are_near(kernels: library.Library, quantization: Any, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(1040, 96).to(dtype), torch.randn(1040).to(dtype)
    packed = PackedProjection(weight, bias, quantization, kernels)
    # 8 bits: a row's largest of 96 is about 2.6 deviations, in 127 steps: 2.6 / 127 / sqrt(12) is 0.6%.
    assert _error(packed.unpacked(torch.float32), weight) < {"8bit": 0.008, "4bit": 0.09}[quantization]
    for tokens in (1, 2, 3, 5, 8, 9, 40):
        x = torch.randn(tokens, 96).to(dtype)
        y = packed(x)
        assert (y.shape, y.dtype) == ((tokens, 1040), dtype)
        unpacked = functional.linear(x, packed.unpacked(dtype), bias)
        # Inputs are rounded to 8 bits for few tokens; prompts are not.
        assert _error(y, unpacked) < 0.012
        assert _error(y, functional.linear(x.double(), weight.double(), bias.double())) < 0.1


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_few_tokens_and_prompts_multiply_the_same_weights(kernels: library.Library, quantization: Any) -> None:
    packed = PackedProjection(torch.randn(320, 1024), torch.randn(320), quantization, kernels)
    unpacked = packed.unpacked(torch.float32)
    assert torch.equal(packed.unpacked(torch.float32, 32, 48), unpacked[32:80])
    # Each input alone gives its column; 1 is exact in 8 bits.
    alone = torch.eye(1024)[:8]
    assert packed.bias is not None
    assert _error(packed(alone), unpacked[:, :8].T + packed.bias) < 1e-6
    x = torch.randn(3, 10, 1024)
    assert torch.equal(packed(x), functional.linear(x, unpacked, packed.bias))
    assert torch.equal(packed.unpacked(torch.bfloat16), unpacked.bfloat16())
    assert torch.equal(packed.unpacked(torch.float16), unpacked.half())


def test_room_to_unpack_is_made_once_for_a_prompt() -> None:
    with keeping_scratch():
        large = scratch(8, 16, torch.float32)
        assert scratch(4, 16, torch.bfloat16).data_ptr() == large.data_ptr()
        others: list[int] = []
        thread = threading.Thread(target=lambda: others.append(scratch(8, 16, torch.float32).data_ptr()))
        thread.start()
        thread.join()
        assert others != [large.data_ptr()]
        with keeping_scratch():
            assert scratch(8, 16, torch.float32).data_ptr() == large.data_ptr()
        assert scratch(8, 16, torch.float32).data_ptr() == large.data_ptr()
        assert scratch(8, 17, torch.float32).shape == (8, 17)
    gone = weakref.ref(scratch(8, 16, torch.float32))
    assert gone() is None


@pytest.mark.parametrize("shape", ["normal", "outliers"])
def test_four_bits_lose_no_more_than_nf4(kernels: library.Library, shape: str) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(512, 1024)
    if shape == "outliers":
        weight *= torch.where(torch.rand(weight.shape) < 0.002, 12.0, 1.0)
    weight = weight.bfloat16()
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    theirs = bnb.dequantize_4bit(codes, state).float()
    packed = PackedProjection(weight, None, "4bit", kernels)
    assert _error(packed.unpacked(torch.float32), weight) < _error(theirs, weight)
    x = torch.randn(4, 1024).bfloat16()
    exact = x.double() @ weight.double().T
    assert _error(packed(x), exact) < _error(x.double() @ theirs.double().T, exact)
    assert sum(p.nbytes for p in packed.parameters()) == codes.nbytes + state.absmax.nbytes


def test_rows_of_zeros_and_huge_weights(kernels: library.Library) -> None:
    weight = torch.zeros(16, 32)
    weight[1] = 1e4
    weight[2, 5] = -3.0
    for quantization in ("8bit", "4bit"):
        packed = PackedProjection(weight, None, quantization, kernels)
        y = packed(torch.ones(1, 32))[0]
        assert y[0] == 0
        torch.testing.assert_close(y[1:3], torch.tensor([32e4, -3.0]), rtol=2e-3, atol=1e-3)


def test_a_packed_model_on_the_cpu(kernels: library.Library, checkpoints: Checkpoints) -> None:
    directory = checkpoints("llama")
    for quantization in ("load_in_8bit", "load_in_4bit"):
        loaded = load(ModelConfig(device_map="cpu", **{quantization: True}), directory=directory)
        packed = [module for module in loaded.model.modules() if isinstance(module, PackedProjection)]
        assert len(packed) == 7 * 4
        assert all(isinstance(layer.forward, decoder._Forward) for layer in loaded.model.model.layers)
        tokens = greedy(loaded)
        for layer in loaded.model.model.layers:
            del layer.forward
        unfused = greedy(loaded)
        assert tokens == unfused
        if quantization == "load_in_8bit":
            assert tokens == reference(directory)
        loaded.close()


# --- Layers ------------------------------------------------------------------------------------------


def _tiny(kind: str, dtype: torch.dtype, **settings: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=300, hidden_size=96, intermediate_size=208, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, **settings,
    )  # fmt: skip
    torch.manual_seed(3)
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval().requires_grad_(requires_grad=False)


@torch.inference_mode()
def _logits(model: Any, steps: int = 6) -> torch.Tensor:
    caches = {"past_key_values": DynamicCache(config=model.config)}
    model(torch.tensor([list(range(5, 25))]), use_cache=True, **caches)
    give_room(caches, range(model.config.num_hidden_layers), 22)
    rows = [model(torch.tensor([[7 * step + 3]]), use_cache=True, **caches).logits[0, -1] for step in range(steps)]
    return torch.stack(rows).float()  # (steps, vocab); the room grows at the third


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {}),
        ("Qwen3", {}),
    ],
)
def test_a_fused_layer_gives_the_logits_of_its_own(
    kernels: library.Library, kind: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    model = _tiny(kind, dtype, **settings)
    own = _logits(model)
    assert decoder.agrees(model, model.model.layers[0], kernels)
    assert all(decoder.fuse(layer, kernels) for layer in model.model.layers)
    calls = [0]
    real = kernels.layer

    def counted(*arguments: Any) -> None:
        calls[0] += 1
        real(*arguments)

    for layer in model.model.layers:
        layer.forward._library = type("Counting", (), {"layer": staticmethod(counted)})
    fused = _logits(model)
    assert calls == [6 * 3]
    # In units of the dtype's rounding: products are summed in another order.
    most = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert (fused - own).norm() <= most * own.norm()


def test_a_layer_that_asks_for_something_else_is_left_alone(kernels: library.Library) -> None:
    model = _tiny("Mistral", torch.float32, sliding_window=8)
    assert not decoder.fuse(model.model.layers[0], kernels)
    model = _tiny("Llama", torch.float32, hidden_act="relu")
    assert not decoder.fuse(model.model.layers[0], kernels)
    model = _tiny("Llama", torch.float32)
    # A layer of the known class that computes something else is found out.
    model.model.layers[0].self_attn.register_forward_hook(lambda _m, _a, output: (2 * output[0], *output[1:]))
    assert not decoder.agrees(model, model.model.layers[0], kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_alone(kernels: library.Library, dtype: torch.dtype) -> None:
    query, keys, values = (
        torch.randn(6, 40).to(dtype),
        torch.randn(1, 3, 50, 40).to(dtype),
        torch.randn(1, 3, 50, 40).to(dtype),
    )
    exact = functional.scaled_dot_product_attention(
        query.double().view(1, 6, 1, 40), keys.double(), values.double(), enable_gqa=True
    ).view(6, 40)
    assert _error(kernels.attend(query, keys, values, 1), exact) < {torch.float32: 1e-6}.get(dtype, 5e-3)


def test_a_mask_goes_the_old_way(kernels: library.Library) -> None:
    model = _tiny("Llama", torch.float32)
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask = (ids != 0).long()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for layer in model.model.layers:
        decoder.fuse(layer, kernels)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0), expected
    )


# --- In a loaded model -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_tokens_without_the_kernels(family: str, checkpoints: Checkpoints) -> None:
    directory = checkpoints(family)
    for allowed in (True, False):
        loaded = load(ModelConfig(device_map="cpu", cpu_kernels=allowed), directory=directory)
        assert greedy(loaded) == reference(directory)
        loaded.close()


def test_a_llama_runs_its_layers_in_the_kernels(kernels: library.Library, checkpoints: Checkpoints) -> None:
    loaded = load(ModelConfig(device_map="cpu"), directory=checkpoints("llama"))
    assert all(isinstance(layer.forward, decoder._Forward) for layer in loaded.model.model.layers)
    loaded.close()
    loaded = load(ModelConfig(device_map="cpu", cpu_kernels=False), directory=checkpoints("llama"))
    assert not any(isinstance(layer.forward, decoder._Forward) for layer in loaded.model.model.layers)
    loaded.close()


def test_blocks_that_leave_in_the_middle_of_an_answer(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    placed = {"": 0, "model.layers.0": "cpu", "model.layers.1": "cpu"}
    loaded = load(ModelConfig(device_map=placed), directory=directory)
    stream = stream_generate(loaded, PROMPT, GenerationOptions(max_new_tokens=NEW_TOKENS))
    tokens = [token for _ in range(4) for token in next(stream).token_ids]
    sim.occupy(sim.free(0), 0)
    tokens += [token for chunk in stream for token in chunk.token_ids]
    sim.occupy(0, 0)
    assert tokens == reference(directory)
    assert greedy(loaded) == reference(directory)
    loaded.close()


# --- Building and choosing ---------------------------------------------------------------------------


def test_without_a_compiler_torch_does_it(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find_compiler", lambda: None)
    library._find.cache_clear()
    try:
        assert library.find_library() is None
        assert library.why_none().startswith("there is no C++ compiler")
        loaded = load(ModelConfig(device_map="cpu"), directory=checkpoints("llama"))
        assert greedy(loaded) == reference(checkpoints("llama"))
        loaded.close()
    finally:
        library._find.cache_clear()


def test_a_compiler_that_fails_and_a_damaged_build(
    kernels: library.Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "cache_path", lambda name: tmp_path / name)
    real = library._compile
    monkeypatch.setattr(library, "_compile", lambda compiler, path: library._run(["false"]))
    try:
        library._find.cache_clear()
        assert library.find_library() is None
        assert library.why_none().startswith("the compiler failed: ")
        monkeypatch.setattr(library, "_compile", real)
        key = library._key(find_compiler() or "")
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / f"{key}.so").write_bytes(b"\x7fELF and no more")
        library._find.cache_clear()
        assert library.find_library() is not None
        assert library.why_none() == ""
        assert [path.name for path in (tmp_path / "kernels").iterdir()] == [f"{key}.so"]
    finally:
        library._find.cache_clear()


def test_nothing_is_compiled_where_memory_is_short(
    kernels: library.Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(main_memory, "takeable_bytes", lambda: 300 * 2**20)
    try:
        library._find.cache_clear()
        assert library.find_library() is None
        assert library.why_none().startswith("the compiler wants 403 MB of main memory, and 281 MB is left")
        assert not any(tmp_path.rglob("*.so"))
    finally:
        library._find.cache_clear()


def test_a_choice_is_measured_once_and_kept(kernels: library.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(96, 64)
    asked: list[tuple[tuple[int, ...], int]] = []

    def measured(_self: Choice, alike: list[torch.Tensor], tokens: int) -> bool:
        asked.extend([(tuple(alike[0].shape), tokens)] * (len(alike) == 2 or alike[0].shape == (8, 8)))
        return tokens != 4

    monkeypatch.setattr(Choice, "_is_faster", measured)
    first = Choice(kernels)
    first.measure([weight, torch.ones(96, 64), torch.zeros(8, 8)])
    assert asked == [((96, 64), 1), ((96, 64), 2), ((96, 64), 4), ((96, 64), 8), *(((8, 8), n) for n in (1, 2, 4, 8))]
    second = Choice(kernels)
    second.measure([weight])
    assert len(asked) == 8
    assert [second.prefers_kernels(weight, tokens) for tokens in (1, 2, 3, 4, 5, 8)] == [
        True,
        True,
        False,
        False,
        True,
        True,
    ]
    assert second.prefers_kernels(torch.zeros(3, 3), 1)


def test_a_choice_is_really_measured(kernels: library.Library) -> None:
    choice = Choice(kernels)
    assert choice._is_faster([torch.zeros(256, 128), torch.ones(256, 128)], 1) in (True, False)


def test_a_refusal_of_memory_is_a_memory_error(kernels: library.Library) -> None:
    with pytest.raises(MemoryError):
        library._check(3)
    with pytest.raises(ValueError, match="code 2"):
        library._check(2)


def test_a_whole_model_in_half_precision(kernels: library.Library, checkpoints: Checkpoints) -> None:
    directory = checkpoints("llama")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, local_files_only=True).eval()
    ids = torch.tensor([PROMPT])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    loaded = load(ModelConfig(device_map="cpu", dtype="bfloat16"), directory=directory)
    assert greedy(loaded) == expected[0, len(PROMPT) :].tolist()
    loaded.close()
