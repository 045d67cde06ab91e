"""What counts as out of memory and what never does, and what Lyra's own errors carry."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from lyra_emergence import errors
from lyra_emergence.errors import (
    ConfigError,
    DoesNotFitError,
    GenerationError,
    LyraError,
    MissingExtraError,
    is_out_of_memory,
    lacks_reason,
    without_frames,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .simulated_accelerator import SimulatedAccelerator

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.79 GiB of which 12.00 MiB is "
    "free. Of the allocated memory 6.51 GiB is allocated by PyTorch, and 148.64 MiB is reserved by PyTorch but "
    "unallocated. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True"
)
LOST = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions."
)


def with_code(error: BaseException, code: int) -> BaseException:
    error.error_code = code  # type: ignore[attr-defined]  # as torch sets it
    return error


OUT_OF_MEMORY = {
    "caching allocator": torch.OutOfMemoryError(CUDA),
    "caching allocator, old name": torch.cuda.OutOfMemoryError(CUDA),
    "Python": MemoryError(),
    "numpy": MemoryError("Unable to allocate 7.28 TiB for an array with shape (1000000, 1000000)"),
    "CPU, Linux": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "CPU, Windows": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to allocate "
        "26843545600 bytes."
    ),
    "MPS": RuntimeError(
        "MPS backend out of memory (MPS allocated: 17.92 GB, other allocations: 128.00 KB, max allowed: 18.13 GB). "
        "Tried to allocate 500.00 MB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit "
        "for memory allocations (may cause system failure)."
    ),
    "MPS, one buffer": RuntimeError("Invalid buffer size: 24.00 GB"),
    "CUDA error code": torch.AcceleratorError("CUDA error: out of memory" + LOST),
    "CUDA error code, by number": with_code(torch.AcceleratorError("the driver is short of memory"), 2),
    "CUDA error code, before torch 2.8": RuntimeError("CUDA error: out of memory" + LOST),
    "CUDA driver": RuntimeError("CUDA driver error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuSOLVER": RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    "HIP": torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"),
    "HIP, bare": RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB (GPU 0; 7.98 GiB total capacity)"),
    "HIP error code": RuntimeError("HIP error: out of memory"),
    "hipBLAS": RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    "XPU": RuntimeError("XPU out of memory. Tried to allocate 1024.00 MiB (GPU 0; 15.11 GiB total capacity)"),
    "XPU, SYCL": RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    "XPU, host": RuntimeError("Native API returns: 38 (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)"),
    "XPU, resources": RuntimeError("level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"),
    "C++": RuntimeError("std::bad_alloc"),
    "oneDNN": RuntimeError("could not create a primitive"),
    "cuFFT": RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    "cuDNN outside of the allocator": RuntimeError(
        "cuDNN SDPA execution failed with error code CUDNN_STATUS_EXECUTION_FAILED_CUDA_DRIVER: err 2\nCUDA ran out "
        "of memory outside PyTorch's allocator. If this workload uses many dynamic shapes, cuDNN may need more memory"
    ),
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "Triton, HIP": RuntimeError("Triton Error [HIP]: out of memory"),
    "allocator, limit of the process": torch.OutOfMemoryError(
        "CUDA out of memory. Allocation was preemptively rejected because it would exceed per_process_memory_fraction "
        "limit. Requested size: 2.00 GiB"
    ),
    "MPS without a limit": RuntimeError(
        "MPS backend out of memory (MPS allocated: 17.92 GB, other allocations: 128.00 KB). Tried to allocate 500.00 "
        "MB on private pool."
    ),
    "safetensors": MemoryError("Cannot allocate memory (os error 12)"),
    "mapping a file": RuntimeError("unable to mmap 5559367680 bytes from file </m>: Cannot allocate memory (12)"),
    "the kernel": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "Lyra's own": DoesNotFitError("too large", needed=2, available=1),
}

OTHER = {
    "device-side assert": torch.AcceleratorError("CUDA error: device-side assert triggered" + LOST),
    "device-side assert, before torch 2.8": RuntimeError("CUDA error: device-side assert triggered" + LOST),
    "illegal access": torch.AcceleratorError("CUDA error: an illegal memory access was encountered" + LOST),
    "illegal access, by number": with_code(torch.AcceleratorError("CUDA error: an illegal memory access"), 700),
    "misaligned address": torch.AcceleratorError("CUDA error: misaligned address"),
    "launch failure": RuntimeError("CUDA error: unspecified launch failure"),
    "launch resources": RuntimeError("CUDA error: too many resources requested for launch"),
    "initialization": RuntimeError("CUDA error: initialization error"),
    "uncorrectable ECC": RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    "device ordinal": RuntimeError("CUDA error: invalid device ordinal" + LOST),
    "device ordinal, MPS": RuntimeError("Invalid device argument mps:1: did you call init?"),
    "no GPU": RuntimeError("No CUDA GPUs are available"),
    "no driver": RuntimeError(
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"
    ),
    "old driver": RuntimeError(
        "The NVIDIA driver on your system is too old (found version 11040). CUDA driver version is insufficient for "
        "CUDA runtime version"
    ),
    "driver version": RuntimeError("CUDA error: CUDA driver version is insufficient for CUDA runtime version"),
    "no kernel": RuntimeError("CUDA error: no kernel image is available for execution on the device" + LOST),
    "peer access": RuntimeError("CUDA error: peer access is not supported between these two devices"),
    "busy GPU": RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"),
    "no reason": SystemError("<method 'get' of 'dict' objects> returned NULL without setting an exception"),
    "not compiled": AssertionError("Torch not compiled with CUDA enabled"),
    "no accelerator": RuntimeError("Cannot access accelerator device when none is available."),
    "cuBLAS not initialized": RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate()`"),
    "cuBLAS not supported": RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"),
    "cuDNN not initialized": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    "cuDNN execution": RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    "SYCL device": RuntimeError("level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)"),
    "oneDNN lacks a kernel": RuntimeError(
        "could not create a primitive descriptor for the matmul primitive. Run workload with environment variable "
        "ONEDNN_VERBOSE=all to get additional diagnostic information."
    ),
    "oneDNN memory object": RuntimeError("could not create a memory"),
    "Triton's shared memory": RuntimeError(
        "out of resource: shared memory, Required: 262144, Hardware limit: 232448. Reducing block sizes or "
        "`num_stages` may help."
    ),
    "Triton, illegal access": RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    "threads": RuntimeError("can't start new thread"),
    "safetensors": OSError("header too large: out of memory"),
    "two devices": RuntimeError("Expected all tensors to be on the same device, but found at least two"),
    "shapes": RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x10 and 20x5)"),
    "dtypes": RuntimeError("expected m1 and m2 to have the same dtype, but got: float != c10::BFloat16"),
    "not implemented": NotImplementedError("Could not run 'aten::empty.memory_format' with arguments from 'CUDA'"),
    "meta": NotImplementedError("Cannot copy out of meta tensor; no data!"),
    "memory format": RuntimeError("Unsupported memory format. Supports only ChannelsLast, Preserve, Contiguous"),
    "negative size": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:103] ((ptrdiff_t)nbytes) >= 0. alloc_cpu() seems to have been called with "
        "negative number: 18446744073709551615"
    ),
    "overflow": RuntimeError("Storage size calculation overflowed with sizes=[9223372036854775807, 4]"),
    "negative dimension": RuntimeError("Trying to create tensor with negative dimension -1: [-1]"),
    "mapping a missing file": RuntimeError("unable to mmap 12 bytes from file </m>: No such device (19)"),
    "mapping, no file": RuntimeError("unable to open file </m> in read-only mode: No such file or directory (2)"),
    "state dict": RuntimeError("Error(s) in loading state_dict for Linear:\n\tsize mismatch for weight"),
    "index": IndexError("index out of range in self"),
    "key": KeyError("out of memory"),
    "type": TypeError("from_pretrained() got an unexpected keyword argument 'load_in_8bit'"),
    "value": ValueError("CUDA out of memory is what I call a good title"),
    "user text": RuntimeError("the entry 'Out of memory lane' has no date"),
    "user text, short": RuntimeError("out of memory"),
    "memory in a name": AttributeError("module 'torch.cuda' has no attribute 'memory_allocated'"),
    "missing file": FileNotFoundError(errno.ENOENT, "No such file or directory", "out of memory.json"),
    "full disk": OSError(errno.ENOSPC, "No space left on device"),
    "hub": OSError("microsoft/phi-2 is not a local folder; the hub is out of memory"),
    "permission": PermissionError(errno.EACCES, "Permission denied"),
    "recursion": RecursionError("maximum recursion depth exceeded"),
    "stopped": StopIteration(),
    "Ctrl-C": KeyboardInterrupt(),
    "exit": SystemExit(1),
    "import": ImportError("libcudart.so.12: cannot open shared object file"),
    "unicode": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    "Lyra's configuration": ConfigError("in 'max_memory.0': '6Gb' is bits; write '6GB'"),
    "Lyra's request": GenerationError("the prompt has 4000 tokens, the context 2048"),
}

CONVERSION = (
    "We encountered some issues during automatic conversion of the weights. For details look at the `CONVERSION` "
    "entries of the above report!"
)
PIPELINE = (
    "Could not load model /m with any of the following classes: (<class 'transformers.AutoModelForCausalLM'>,). See "
    "the original errors:\n\nwhile loading with AutoModelForCausalLM, an error is thrown:\n"
    'Traceback (most recent call last):\n  File "base.py", line 250, in load_model\n'
    "    raise torch.OutOfMemoryError('CUDA out of memory')\n{}\n\n"
)


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
def test_out_of_memory(name: str) -> None:
    assert is_out_of_memory(OUT_OF_MEMORY[name])


@pytest.mark.parametrize("name", OTHER)
def test_everything_else_is_not_out_of_memory(name: str) -> None:
    assert not is_out_of_memory(OTHER[name])


def test_the_tables_are_not_thin() -> None:
    assert len(OTHER) >= 40
    assert len({str(error) for error in OUT_OF_MEMORY.values()}) >= 25


# --- Chains ----------------------------------------------------------------------------------------


def raised(first: BaseException, second: BaseException, *, how: str) -> BaseException:
    try:
        try:
            raise first
        except type(first) as error:
            if how == "from":
                raise second from error
            if how == "from none":
                raise second from None
            raise second  # noqa: B904 - the implicit context is what is tested
    except type(second) as error:
        return error


@pytest.mark.parametrize(("how", "expected"), [("from", True), ("during", True), ("from none", False)])
def test_a_cause_counts_as_far_as_python_shows_it(how: str, expected: bool) -> None:
    error = raised(torch.OutOfMemoryError(CUDA), ValueError("loading failed"), how=how)
    assert is_out_of_memory(error) is expected
    assert is_out_of_memory(raised(error, KeyError("weights"), how="from")) is expected


def test_ctrl_c_while_memory_is_out_is_ctrl_c() -> None:
    assert not is_out_of_memory(raised(MemoryError(), KeyboardInterrupt(), how="during"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OTHER["no reason"], True),
        (SystemError("error return without exception set"), True),
        (SystemError("<built-in f> returned a result with an exception set"), False),
        (RuntimeError("returned NULL without setting an exception"), False),
        (MemoryError(), False),
    ],
)
def test_only_a_failure_that_python_found_no_reason_for_lacks_one(error: BaseException, expected: bool) -> None:
    assert lacks_reason(error) is expected


def test_a_lost_device_is_not_out_of_memory_whatever_led_to_it() -> None:
    lost = OTHER["device-side assert"]
    assert not is_out_of_memory(raised(torch.OutOfMemoryError(CUDA), lost, how="during"))


def test_a_chain_in_a_circle_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)


def test_without_frames_drops_what_the_frames_hold() -> None:
    error = raised(MemoryError(), ValueError("x"), how="during")
    assert error.__traceback__ is not None
    assert without_frames(error) is error
    assert error.__traceback__ is None
    assert error.__context__ is not None
    assert error.__context__.__traceback__ is None
    assert is_out_of_memory(error)


# --- Where transformers hides it -------------------------------------------------------------------


@pytest.mark.parametrize("last", [f"torch.OutOfMemoryError: {CUDA}", "MemoryError", f"RuntimeError: {CUDA}"])
def test_a_pipelines_text_tells(last: str) -> None:
    assert is_out_of_memory(ValueError(PIPELINE.format(last)))


@pytest.mark.parametrize(
    "last",
    [
        "ValueError: Unrecognized configuration class",
        "torch.AcceleratorError: CUDA error: device-side assert triggered",
        "OSError: CUDA out of memory is no file of this folder",
        "    RuntimeError: CUDA out of memory",
        f"RuntimeError: {CONVERSION}",
    ],
)
def test_a_pipelines_text_without_it_is_not_out_of_memory(last: str) -> None:
    assert not is_out_of_memory(ValueError(PIPELINE.format(last)))


def test_a_conversion_without_details_is_not_out_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError(CONVERSION))


def convert(text: object) -> BaseException:
    """What transformers raises for a failed conversion with these details."""
    from transformers.utils.loading_report import log_state_dict_report

    info = SimpleNamespace(
        error_msgs=[], create_loading_report=lambda _: "", conversion_errors={"model.layers.0.mlp.experts": text}
    )
    with pytest.raises(RuntimeError, match=re.escape(CONVERSION)) as caught:
        log_state_dict_report(torch.nn.Linear(1, 1), "m", ignore_mismatched_sizes=False, loading_info=info)
    return caught.value


def test_a_conversions_details_tell() -> None:
    frames = 'Traceback (most recent call last):\n  File "x.py", line 1, in convert\n    {}\n'
    for said in (f"torch.OutOfMemoryError: {CUDA}\n{CUDA}\nError: Concatenate on tensors", f"Concatenate: {CUDA}"):
        assert is_out_of_memory(convert(frames.format("torch.cat(tensors)") + said))
    for other in ("RuntimeError: Sizes of tensors must match", "Concatenate: Sizes of tensors must match"):
        assert not is_out_of_memory(convert(frames.format("raise MemoryError") + other))


def test_merging_experts_on_a_full_device(checkpoints: Callable[[str], Path], sim: SimulatedAccelerator) -> None:
    from transformers import AutoModelForCausalLM

    directory, said = checkpoints("mixtral"), []
    # Of 98: the warm-up, a copy, and then merges, between the copies of other threads.
    for nth in (1, 40, *range(68, 98, 3)):
        sim.fail_at(nth)
        with pytest.raises(RuntimeError) as caught:
            AutoModelForCausalLM.from_pretrained(directory, device_map={"": "sim:0"})
        assert is_out_of_memory(caught.value), caught.value
        said.append(str(caught.value))
        without_frames(caught.value)
        sim.fail_at(0)
    assert CONVERSION in said


def test_a_pipeline_by_id_on_a_full_device(checkpoints: Callable[[str], Path], sim: SimulatedAccelerator) -> None:
    from transformers import pipeline

    sim.set_cap(100_000)
    with pytest.raises(ValueError, match=r"^Could not load model") as caught:
        pipeline("text-generation", model=str(checkpoints("mixtral")), device_map={"": "sim:0"})
    assert is_out_of_memory(caught.value)
    without_frames(caught.value)


def test_real_errors_of_the_simulated_device(sim: SimulatedAccelerator) -> None:
    sim.set_cap(1000)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(1001, dtype=torch.uint8, device="sim:0")
    assert is_out_of_memory(caught.value)


def test_a_real_error_of_the_cpu() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(-1)
    assert not is_out_of_memory(caught.value)


# --- Lyra's own errors -----------------------------------------------------------------------------


def test_exit_codes() -> None:
    codes = {name: getattr(errors, name).exit_code for name in errors.__all__ if name.endswith("Error")}
    assert codes == {
        "AbandonedError": 1,
        "CheckpointError": 1,
        "ConfigError": 2,
        "ConversationError": 1,
        "DoesNotFitError": 3,
        "EndpointError": 1,
        "GenerationError": 1,
        "JournalError": 1,
        "LyraError": 1,
        "MissingExtraError": 1,
        "ModelUnavailableError": 1,
        "RequestError": 1,
    }


def test_the_tree_is_drawn_as_it_is() -> None:
    drawn = {line.split("── ")[1].split()[0] for line in (errors.__doc__ or "").splitlines() if "── " in line}
    assert drawn == {error.__name__ for error in LyraError.__subclasses__()}


def test_what_errors_say() -> None:
    config = ConfigError("config.json has 2 problems:", problems=("a", "b"), hint="write c")
    assert (str(config), config.hint) == ("config.json has 2 problems:\n  a\n  b", "write c")
    assert isinstance(config, ValueError)
    extra = MissingExtraError("'load_in_4bit'", extra="quant")
    assert str(extra) == "'load_in_4bit' needs the extra 'quant', which is not installed"
    assert extra.hint == "run: pip install 'lyra-emergence[quant]'   (in a checkout: uv sync --extra quant)"
    assert isinstance(extra, ImportError)
    assert isinstance(OUT_OF_MEMORY["Lyra's own"], MemoryError)


def test_out_of_memory_is_judged_without_torch() -> None:
    script = (
        "import sys; from lyra_emergence.errors import is_out_of_memory as oom\n"
        "assert oom(MemoryError()) and not oom(ValueError('x')) and not oom(RuntimeError('x'))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_onednn_out_of_memory_as_it_really_looks() -> None:
    """A kernel whose code finds no memory: the text, and what works afterwards in the same thread."""
    script = """
import resource, torch
from pathlib import Path
from lyra_emergence.errors import is_out_of_memory, lacks_reason, lost_onednn
from lyra_emergence.runtime.memory import stop_using_onednn
torch.set_num_threads(1)
weight = torch.ones(2048, 2048, dtype=torch.bfloat16)
def run(rows): return torch.nn.functional.linear(torch.ones(rows, 2048, dtype=torch.bfloat16), weight)
run(64)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), -1))
try:
    run(108)
except RuntimeError as error:
    failure = error
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
if lost_onednn(failure):
    stop_using_onednn()
assert is_out_of_memory(failure), failure
assert run(116)[0, 0] == 2048
query = torch.ones(1, 4, 300, 64, dtype=torch.bfloat16)
torch.nn.functional.scaled_dot_product_attention(query, query, query)
print(failure)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("address space is limited on Linux")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Machines without kernels for bfloat16 in oneDNN run out in torch's own allocator.
    assert done.stdout.startswith(("could not create a primitive", "[enforce fail at alloc_cpu.cpp"))
