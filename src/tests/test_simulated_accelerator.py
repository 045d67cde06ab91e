"""The device that stands in for a GPU behaves like one where it matters to placing and running models."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import AutoModelForCausalLM

from . import simulated_accelerator
from .families import FAMILIES, PROMPT, STORY, make_tokenizer
from .simulated_accelerator import compilation

if TYPE_CHECKING:
    from collections.abc import Callable

    from .simulated_accelerator import SimulatedAccelerator

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def on(device: str, nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


class TestMemory:
    def test_counts_bytes_exactly_and_gives_them_back_at_once(self, sim: SimulatedAccelerator) -> None:
        tensor = on("sim:1", 1001)
        other = torch.empty(3, 5, dtype=torch.bfloat16, device="sim:1")
        assert (sim.used(0), sim.used(1)) == (0, 1031)
        view = tensor[10:]
        del tensor
        assert sim.used(1) == 1031
        del view, other
        assert (sim.used(1), sim.peak(1), sim.allocations(1)) == (0, 1031, 2)

    def test_beyond_the_cap_torch_s_own_error_says_what_was_asked_and_what_there_is(
        self, sim: SimulatedAccelerator
    ) -> None:
        sim.set_cap(1000)
        kept = on("sim:0", 600)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            on("sim:0", 401)
        assert str(caught.value).startswith(
            "SIM out of memory. Tried to allocate 401 bytes. Device 0 has a total capacity of 1000 bytes of which "
            "400 bytes are free. 600 bytes are in use by this process."
        )
        assert type(caught.value) is torch.cuda.OutOfMemoryError
        assert (sim.refusals(), sim.injected(), sim.peak()) == (1, 0, 600)
        assert on("sim:0", 400).nbytes + kept.nbytes == sim.peak() == 1000
        assert on("sim:1", 2000).nbytes == 2000

    def test_another_process_takes_memory_that_is_neither_free_nor_used(self, sim: SimulatedAccelerator) -> None:
        sim.set_cap(1000)
        sim.occupy(900)
        assert torch.sim.mem_get_info(0) == (100, 1000)
        with pytest.raises(torch.OutOfMemoryError, match=r"100 bytes are free\. 0 bytes are in use"):
            on("sim:0", 101)
        sim.occupy(0)
        assert on("sim:0", 1000).nbytes == 1000

    def test_a_cap_may_fall_below_what_is_in_use(self, sim: SimulatedAccelerator) -> None:
        kept = on("sim:0", 600)
        sim.set_cap(500)
        assert torch.accelerator.get_memory_info(0) == (0, 500)
        with pytest.raises(torch.OutOfMemoryError):
            on("sim:0", 1)
        assert kept.nbytes == 600

    def test_fails_the_nth_allocation_once(self, sim: SimulatedAccelerator) -> None:
        sim.fail_at(2)
        on("sim:0", 1)
        with pytest.raises(torch.OutOfMemoryError, match=r"in use by this process \(injected failure\)\."):
            on("sim:1", 1)
        on("sim:1", 1)
        assert (sim.injected(0), sim.injected(1)) == (0, 1)

    def test_fails_from_the_nth_allocation_on_one_device(self, sim: SimulatedAccelerator) -> None:
        sim.fail_at(2, persistent=True, device=1)
        on("sim:1", 1)
        for _ in range(3):
            on("sim:0", 1)
            with pytest.raises(torch.OutOfMemoryError):
                on("sim:1", 1)
        sim.fail_at(0, device=1)
        on("sim:1", 1)
        assert (sim.allocations(1), sim.refusals(1), sim.injected(1)) == (5, 3, 3)

    def test_an_empty_tensor_allocates_nothing(self, sim: SimulatedAccelerator) -> None:
        sim.fail_at(1)
        assert torch.empty(0, 7, device="sim").shape == (0, 7)
        assert sim.allocations() == 0

    def test_a_failed_operator_leaves_its_arguments_as_they_were(self, sim: SimulatedAccelerator) -> None:
        tensor = torch.arange(4.0, device="sim")
        sim.fail_at(1)
        with pytest.raises(torch.OutOfMemoryError):
            tensor.exp()
        assert tensor.tolist() == [0, 1, 2, 3]
        assert sim.used() == 16

    def test_threads_share_one_exact_account(self, sim: SimulatedAccelerator) -> None:
        sim.set_cap(80 * 100)
        refused = []

        def work() -> None:
            for _ in range(200):
                try:
                    held = [on("sim:0", 100) for _ in range(30)]
                    del held
                except torch.OutOfMemoryError:
                    refused.append(1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gc.collect()
        assert sim.used() == 0
        assert sim.peak() <= 80 * 100
        assert sim.refusals() == len(refused)

    def test_the_host_cannot_reach_the_data_and_fresh_memory_is_not_a_number(self, sim: SimulatedAccelerator) -> None:
        tensor = torch.empty(3, device="sim")
        assert tensor.isnan().all()
        assert tensor.data_ptr() >= 1 << 62  # beyond every address of a process
        with pytest.raises(TypeError, match="can't convert sim:0 device type tensor to numpy"):
            tensor.numpy()

    def test_pinned_memory_is_known_and_is_the_host_s(self, sim: SimulatedAccelerator) -> None:
        pinned = torch.arange(100).pin_memory()
        assert pinned.is_pinned()
        assert pinned[50:].is_pinned()
        assert not torch.arange(100).is_pinned()
        assert (sim.pinned(), sim.used()) == (800, 0)
        assert torch.equal(pinned.to("sim", non_blocking=True).cpu(), pinned)
        with pytest.raises(RuntimeError, match="Only dense CPU tensors can be pinned"):
            torch.empty(1, device="sim", pin_memory=True)
        del pinned
        assert sim.pinned() == 0

    def test_storages_grow_and_shrink_with_their_content(self, sim: SimulatedAccelerator) -> None:
        tensor = torch.arange(4, dtype=torch.uint8, device="sim:1")
        tensor.resize_(6)
        assert (tensor[:4].tolist(), sim.used(1)) == ([0, 1, 2, 3], 6)
        tensor.untyped_storage().resize_(0)
        assert sim.used(1) == 0


class TestDevices:
    def test_torch_and_generic_code_find_it(self, sim: SimulatedAccelerator) -> None:
        sim.set_cap(5000, 1)
        assert torch.accelerator.current_accelerator() == torch.device("sim")
        assert (torch.accelerator.is_available(), torch.accelerator.device_count()) == (True, 2)
        module: Any = torch.get_device_module("sim")
        kept = on("sim:1", 40)
        assert module.mem_get_info(1) == torch.accelerator.get_memory_info(1) == (4960, 5000)
        on("sim:1", 100)
        assert (module.memory_allocated(1), module.max_memory_allocated(1)) == (40, 140)
        module.reset_peak_memory_stats(1)
        assert module.max_memory_allocated(1) == sim.peak(1) == kept.nbytes
        assert module.memory_stats(1)["num_ooms"] == 0
        assert module.get_device_properties(1) == ("Simulated accelerator 1", 5000, 0, 0, 1)
        module.empty_cache()
        module.synchronize()

    def test_the_current_device_is_the_thread_s_own(self, sim: SimulatedAccelerator) -> None:
        torch.sim.set_device(1)
        assert torch.zeros(1, device="sim").device == torch.device("sim:1")
        with torch.sim.device(0):
            assert torch.zeros(1, device="sim").device == torch.device("sim:0")
        seen = []
        thread = threading.Thread(target=lambda: seen.append(torch.sim.current_device()))
        thread.start()
        thread.join()
        assert (seen, torch.sim.current_device()) == ([0], 1)
        with pytest.raises(RuntimeError, match="there is no simulated device 2: there are 2"):
            torch.zeros(1, device="sim:2")

    def test_results_are_on_the_arguments_device_whatever_the_current_one(self, sim: SimulatedAccelerator) -> None:
        there = torch.ones(2, device="sim:1")
        assert torch.sim.current_device() == 0
        for result in (there + 1, there @ there, there.sum(), there.clone(), torch.zeros_like(there), there.topk(1)[0]):
            assert result.device == torch.device("sim:1")
        assert sim.used(0) == 0

    @pytest.mark.parametrize("target", ["cpu", "sim:0", "sim:1"])
    @pytest.mark.parametrize("source", ["cpu", "sim:0", "sim:1"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_copies(self, sim: SimulatedAccelerator, source: str, target: str, dtype: torch.dtype) -> None:
        values = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
        moved = values.to(source).t().to(target, copy=True)
        assert moved.device == torch.device(target)
        assert torch.equal(moved.cpu(), values.t())
        destination = torch.zeros(3, 2, dtype=torch.float32, device=target)
        destination.copy_(values.to(source).t())
        assert torch.equal(destination.cpu(), values.t().float())

    @pytest.mark.parametrize(
        "mix",
        [
            lambda a, b: a + b,
            lambda a, b: b + a,
            lambda a, b: a @ b.t(),
            lambda a, b: b @ a.t(),
            lambda a, b: a.add_(b),
            lambda a, b: torch.cat([a, b]),
            lambda a, b: torch.where(a > 0, a, b),
            lambda a, b: a.masked_fill(b > 0, 0),
            lambda a, b: torch.nn.functional.linear(a, a, b[0]),
            lambda a, b: torch.nn.functional.layer_norm(a, (2,), b[0]),
            lambda a, b: torch.nn.functional.embedding(b.long(), a),
            lambda a, b: torch.add(b, b, out=a),
            lambda a, b: torch.nn.functional.scaled_dot_product_attention(a[None], b[None], a[None]),
            lambda a, b: a.index_select(0, b[0].long()),
        ],
    )
    @pytest.mark.parametrize("other", ["cpu", "sim:1"])
    def test_tensors_of_two_devices_do_not_mix(
        self, sim: SimulatedAccelerator, mix: Callable[[torch.Tensor, torch.Tensor], Any], other: str
    ) -> None:
        here, there = torch.ones(2, 2, device="sim:0"), torch.ones(2, 2, device=other)
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device") as caught:
            mix(here, there)
        assert "sim:0" in str(caught.value)
        assert other in str(caught.value)

    def test_host_scalars_and_host_indices_mix_as_on_cuda(self, sim: SimulatedAccelerator) -> None:
        tensor = torch.arange(4.0, device="sim:1")
        assert (tensor * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
        assert tensor[torch.tensor([3, 0])].tolist() == [3, 0]
        tensor[torch.tensor([True, False, False, False])] = 9
        assert tensor.tolist() == [9, 1, 2, 3]
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            torch.arange(4.0) + torch.tensor(1.0, device="sim:1")

    def test_switched_off_there_is_no_device(self, simulated_devices: SimulatedAccelerator) -> None:
        assert not torch.accelerator.is_available()
        assert torch.accelerator.current_accelerator(check_available=True) is None
        assert torch.accelerator.device_count() == torch.sim.device_count() == 0
        with pytest.raises(RuntimeError, match="switched off: a test asks for it with the `sim` fixture"):
            torch.empty(1, device="sim")

    def test_streams_and_events(self, sim: SimulatedAccelerator) -> None:
        default = torch.sim.default_stream(1)
        stream = torch.sim.Stream(1)
        assert torch.sim.current_stream(1) == default != stream
        with torch.sim.stream(stream):
            assert torch.sim.current_stream(1) == stream
            start, end = (torch.sim.Event(1, enable_timing=True) for _ in range(2))
            start.record(stream)
            tensor = torch.ones(4, device="sim:1")
            end.record(stream)
        tensor.record_stream(stream)
        default.wait_event(end)
        stream.synchronize()
        assert end.query()
        assert start.elapsed_time(end) >= 0


class TestRandomNumbers:
    def test_one_seed_gives_one_sequence_on_each_device(self, sim: SimulatedAccelerator) -> None:
        def draw(device: str) -> tuple[list[float], list[int]]:
            weights = torch.ones(50, device=device)
            return torch.randn(4, device=device).tolist(), torch.multinomial(weights, 4).tolist()

        torch.manual_seed(7)
        first = draw("sim:0"), draw("sim:1")
        torch.manual_seed(7)
        assert (draw("sim:0"), draw("sim:1")) == first
        assert first[0] == first[1]
        assert draw("sim:0") != first[0]

    def test_a_generator_has_a_device_and_a_state(self, sim: SimulatedAccelerator) -> None:
        generator = torch.Generator("sim:1").manual_seed(3)
        assert generator.device == torch.device("sim:1")
        state = generator.get_state()
        drawn = torch.rand(3, device="sim:1", generator=generator)
        generator.set_state(state)
        assert torch.equal(torch.rand(3, device="sim:1", generator=generator), drawn)
        saved = torch.sim.get_rng_state(1)
        drawn = torch.rand(3, device="sim:1")
        torch.sim.set_rng_state(saved, "sim:1")
        assert torch.equal(torch.rand(3, device="sim:1"), drawn)

    def test_drawing_on_the_device_leaves_the_cpu_s_numbers_alone(self, sim: SimulatedAccelerator) -> None:
        state = torch.get_rng_state()
        torch.randn(5, device="sim")
        assert torch.equal(torch.get_rng_state(), state)


class TestOperators:
    @pytest.mark.parametrize(
        "write",
        [
            lambda t: t.t()[0].add_(5),
            lambda t: t.view(2, 6)[1].mul_(-1),
            lambda t: t[1:, ::2].zero_(),
            lambda t: t.split(2, dim=1)[1].fill_(7),
            lambda t: t.unfold(1, 2, 2)[0, 1].fill_(8),
            lambda t: t.diagonal().fill_(3),
            lambda t: t.__setitem__(torch.tensor([0, 2], device=t.device), 4),
            lambda t: t.index_put_((t > 5,), torch.tensor(0, device=t.device), accumulate=False),
            lambda t: t.index_copy_(0, torch.tensor([1], device=t.device), t[:1] * 2),
            lambda t: t.scatter_(1, t[:, :1] % 4, -1),
            lambda t: t.masked_fill_(t % 2 == 0, 1),
            lambda t: torch.add(t[0], t[1], out=t[2]),
            lambda t: torch.sort(t.clone(), dim=1, descending=True, out=(t, torch.empty_like(t))),
            lambda t: torch.cumsum(t, 0, out=t),
            lambda t: t.unsqueeze(0).squeeze().transpose(0, 1).copy_(t.t().flip(0)),
            lambda t: t.data.add_(1),
            lambda t: torch._foreach_add_([t[0], t[1]], 2),
        ],
    )
    def test_writes_through_views_and_in_place_reach_the_base(
        self, sim: SimulatedAccelerator, write: Callable[[torch.Tensor], Any]
    ) -> None:
        expected = torch.arange(12).view(3, 4)
        actual = expected.to("sim:1")
        write(expected)
        write(actual)
        assert torch.equal(actual.cpu(), expected)

    @pytest.mark.parametrize(
        "look",
        [
            lambda t: t.t(),
            lambda t: t.expand(2, 3, 4),
            lambda t: t.unfold(1, 2, 1),
            lambda t: t.view(torch.int32),
            lambda t: t.chunk(2)[0],
            lambda t: t.narrow(1, 1, 2),
            lambda t: t.reshape(-1),
            lambda t: torch.ops.aten._reshape_alias(t, (12,), (1,)),
            lambda t: t.detach(),
        ],
    )
    def test_views_share_memory(self, sim: SimulatedAccelerator, look: Callable[[torch.Tensor], torch.Tensor]) -> None:
        base = torch.arange(12.0, device="sim").view(3, 4)
        before = sim.allocations()
        view = look(base)
        assert sim.allocations() == before
        assert view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
        assert torch.equal(view.cpu(), look(base.cpu()))

    def test_out_tensors_are_resized_on_the_device(self, sim: SimulatedAccelerator) -> None:
        tensor = torch.arange(6.0, device="sim:1")
        out = torch.empty(0, device="sim:1")
        assert torch.mul(tensor, 2, out=out) is out
        assert (out.tolist(), sim.used(1)) == ([0, 2, 4, 6, 8, 10], 48)

    def test_a_parameter_keeps_its_identity_and_its_ties_when_it_moves(self, sim: SimulatedAccelerator) -> None:
        first, second = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
        second.weight = first.weight
        weight = first.weight
        both = torch.nn.Sequential(first, second).to("sim:1")
        assert first.weight is second.weight is weight
        assert sim.used(1) == 64
        both.to("cpu")
        assert (weight.device.type, sim.used(1)) == ("cpu", 0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_kernels_are_the_cpu_s_own(self, sim: SimulatedAccelerator, dtype: torch.dtype) -> None:
        functional = torch.nn.functional

        def run(x: torch.Tensor, conv: torch.nn.Module) -> list[torch.Tensor]:
            q = x.view(1, 4, 6, 8)
            return [
                functional.scaled_dot_product_attention(q, q, q, is_causal=True),
                functional.linear(x, x),
                functional.rms_norm(x, (8,)),
                functional.layer_norm(x, (8,)),
                x.softmax(-1),
                torch.cat([x, x], 1),
                torch.stack(x.unbind()),
                torch.einsum("ij,kj->ik", x, x),
                x.topk(3).indices,
                conv.to(x.device, dtype)(x[None, :8]),
                torch.outer(x[0], x[1]).tril(),
                torch.histc(x.argmax(-1).float() if x.is_cpu else x.argmax(-1).int(), 8, 0, 7),
                torch.eye(3, device=x.device, dtype=dtype),
                torch.arange(3, device=x.device),
            ]

        x, conv = torch.randn(24, 8).to(dtype), torch.nn.Conv1d(8, 8, 3, groups=8)
        for expected, actual in zip(run(x, conv), run(x.to("sim:1"), conv), strict=True):
            assert actual.device == torch.device("sim:1")
            assert torch.equal(actual.cpu().to(expected.dtype), expected)

    @pytest.mark.usefixtures("simulated_devices")  # built by then, in the folder that is named below
    def test_gradients_flow(self, pytestconfig: pytest.Config) -> None:
        # A process of its own: torch's engine serves only the devices that are there when it first runs backward, and
        # another test may have trained a checkpoint before this device was registered.
        script = (
            "import os, sys, pathlib, torch\n"
            "from src.tests import simulated_accelerator\n"
            "with simulated_accelerator.load(pathlib.Path(sys.argv[1])).lent():\n"
            "    weight = torch.ones(3, device='sim:1', requires_grad=True)\n"
            "    (weight * torch.arange(3.0, device='sim:1')).pow(2).sum().backward()\n"
            "    print(weight.grad.tolist(), flush=True)\n"
            # Without the interpreter's own end: now and then torch's engine aborts there, while its thread still runs.
            "os._exit(0)\n"
        )
        assert pytestconfig.cache is not None
        command = [sys.executable, "-c", script, str(pytestconfig.cache.mkdir("simulated_accelerator"))]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        assert done.stdout == "[0.0, 2.0, 8.0]\n"

    def test_inference_mode(self, sim: SimulatedAccelerator) -> None:
        with torch.inference_mode():
            tensor = torch.zeros(3, device="sim")
            tensor[1:].add_(1)
            assert tensor.tolist() == [0, 1, 1]


def place(model: Any, split: list[str]) -> None:
    """The embeddings, head and first layers on `sim:0`, each layer where `split` says, handed over by hooks."""
    base = model.base_model
    layers = base.h if hasattr(base, "h") else base.layers
    model.to("sim:0")
    for layer, device in zip(layers, split, strict=True):
        layer.to(device)
        add_hook_to_module(layer, AlignDevicesHook(execution_device=device, io_same_device=True))


def recite(model: Any, device: str) -> str:
    ids = make_tokenizer()(PROMPT, return_tensors="pt").input_ids.to(device)
    out = model.generate(ids, max_new_tokens=200, do_sample=False)
    return make_tokenizer().decode(out[0].cpu(), skip_special_tokens=True)


class TestModels:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_whole_model_recites_as_on_the_cpu(
        self, sim: SimulatedAccelerator, checkpoints: Callable[[str], Path], family: str
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(checkpoints(family)).eval()
        tensors = {tensor.untyped_storage().data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
        ids = torch.tensor([make_tokenizer()(STORY).input_ids])
        expected = model(ids).logits
        model.to("sim:1")
        assert sim.used(1) == sum(tensor.nbytes for tensor in tensors.values())
        assert torch.equal(model(ids.to("sim:1")).logits.cpu(), expected)
        assert recite(model, "sim:1") == STORY

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_split_model_recites_as_on_the_cpu(
        self, sim: SimulatedAccelerator, checkpoints: Callable[[str], Path], family: str
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(checkpoints(family)).eval()
        place(model, ["sim:0", "cpu", "sim:1", "sim:1"])
        assert recite(model, "sim:0") == STORY
        assert sim.used(1) > 0

    def test_a_model_loads_straight_onto_a_device(
        self, sim: SimulatedAccelerator, checkpoints: Callable[[str], Path]
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoints("llama"), dtype=torch.bfloat16, device_map={"": "sim:1"}
        ).eval()
        assert sim.used(1) >= 2 * model.num_parameters()
        assert recite(model, "sim:1") == STORY

    def test_running_out_in_the_middle_of_an_answer_leaks_nothing(
        self, sim: SimulatedAccelerator, checkpoints: Callable[[str], Path]
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(checkpoints("qwen2")).eval().to("sim")
        weights = sim.used()
        sim.set_cap(weights + 40_000)
        with pytest.raises(torch.OutOfMemoryError):
            recite(model, "sim")
        gc.collect()
        assert sim.used() == weights
        sim.set_cap(weights + 1_000_000)
        assert recite(model, "sim") == STORY

    def test_a_forgotten_hand_over_is_an_error(
        self, sim: SimulatedAccelerator, checkpoints: Callable[[str], Path]
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(checkpoints("llama")).eval().to("sim:0")
        model.model.layers[2].to("cpu")
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            recite(model, "sim:0")


class TestLoading:
    def test_the_number_of_devices_is_fixed_by_the_first_call(self, simulated_devices: SimulatedAccelerator) -> None:
        with pytest.raises(ValueError, match="the backend is registered with 2 devices, not 3"):
            simulated_accelerator.load(devices=3)

    def test_the_handle_knows_its_devices(self, sim: SimulatedAccelerator) -> None:
        with pytest.raises(ValueError, match="there is no simulated device 2: there are 2"):
            sim.used(2)
        with pytest.raises(ValueError, match="the first allocation from now is number 1, not -1"):
            sim.fail_at(-1)

    def test_without_a_compiler_the_reason_is_said(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        with pytest.raises(simulated_accelerator.CompilerMissingError, match="needs a C\\+\\+ compiler"):
            compilation.compile_library(tmp_path)

    def test_a_compiler_s_complaint_is_shown_and_nothing_is_kept(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        sources = tmp_path / "csrc"
        sources.mkdir()
        (sources / "broken.cpp").write_text("int broken() { return nonsense; }")
        monkeypatch.setattr(compilation, "SOURCES", sources)
        with pytest.raises(simulated_accelerator.BuildError, match="nonsense"):
            compilation.compile_library(tmp_path / "cache")
        assert not list((tmp_path / "cache").rglob("*.so"))

    def test_two_processes_that_build_at_once_agree(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        sources = tmp_path / "csrc"
        sources.mkdir()
        (sources / "one.cpp").write_text('extern "C" __attribute__((visibility("default"))) int one() { return 1; }')
        monkeypatch.setattr(compilation, "SOURCES", sources)
        found: list[Path] = []
        threads = [
            threading.Thread(target=lambda: found.append(compilation.compile_library(tmp_path / "cache")))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found)) == 1
        assert ctypes.CDLL(str(found[0])).one() == 1
        assert not list((tmp_path / "cache").rglob("*.o"))

    def test_importing_it_does_not_register_it(self) -> None:
        code = "import src.tests.simulated_accelerator, torch; print(torch._C._get_privateuse1_backend_name())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "privateuseone"
