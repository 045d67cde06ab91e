"""Main memory that is refused, one allocation at a time: while loading, while answering, and with threads.

A spread sample; `benchmarks/oom_sweep_cpu.py` sweeps every allocation. Each run happens in a child process with the
shim in front of its allocator, so that a crash or a hang is a finding and not the end of the tests.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from . import allocator_shim
from .allocator_shim import Refusing, preloaded
from .cpu_sweep import ROOT, Case, Sweeper
from .families import build_checkpoint
from .running import PROMPT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]

pytestmark = pytest.mark.timeout(900)
"""Programs start, and kernels may be compiled: on a busy machine that takes minutes."""

MiB = 2**20
WIDE = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 3, "max_position_embeddings": 512}
LONG = (PROMPT * 60)[:300]
SPLIT = {"device_map": {"": "cpu", "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0}}
"""Half of the layers are on the accelerator, which has room enough."""


@pytest.fixture(scope="session")
def shim(request: pytest.FixtureRequest) -> Path:
    cache = request.config.cache
    if cache is None:
        pytest.skip("there is no folder to build the shim in")
    try:
        return allocator_shim.build(cache.mkdir("allocator_shim"))
    except (allocator_shim.UnsupportedError, allocator_shim.CompilerMissingError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def sweeper(shim: Path) -> Iterator[Sweeper]:
    with Sweeper(shim) as sweeper:
        yield sweeper


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose activations for a long prompt, and whose weights, are of megabytes."""
    import torch

    return build_checkpoint("llama", tmp_path_factory.mktemp("wide") / "wide", torch.bfloat16, sizes=WIDE)


def spread(total: int, count: int) -> list[int]:
    """Some allocations at equal distances, the last among them."""
    return sorted({1 + (total - 1) * at // count for at in range(1, count + 1)})


def check(sweeper: Sweeper, case: Case, count: int) -> None:
    # Small pieces of memory are asked for a few times more or less from run to run: the fewest are met by all.
    fewest = min(sweeper.count(case) for _ in range(2))
    total = fewest - fewest // 100
    assert total > 0
    for nth in spread(total, count):
        for persistent in (False, True):
            run = sweeper.run(case, nth, persistent=persistent)
            assert run.as_asked, f"{nth}, {persistent}: {run.outcome}"


PROBE = """
import numpy, torch
from src.tests.allocator_shim import NEVER, Refusing, RefusingAllocator

LARGE_FILE = torch.__path__[0] + "/lib/libtorch_cpu.so"
allocator = RefusingAllocator()
for what, action in {
    Refusing(aligned=10**6): lambda: torch.empty(10**6, dtype=torch.uint8),
    Refusing(heap=10**6): lambda: numpy.empty(10**6, dtype=numpy.uint8),
    Refusing(mapped=10**6): lambda: torch.from_file(LARGE_FILE, size=10**6, dtype=torch.uint8),
}.items():
    allocator.fail_at(0, what)
    kept = action()
    allocator.disarm()
    print(allocator.allocations, allocator.refusals)
    allocator.fail_at(1, what)
    try:
        action()
    except (RuntimeError, MemoryError) as error:
        print(type(error).__name__, str(error)[-150:].splitlines()[0])
    allocator.disarm()
allocator.cap(2 * 10**6, Refusing(aligned=0))
held = torch.empty(10**6, dtype=torch.uint8)
try:
    torch.empty(10**6 + 10**5, dtype=torch.uint8)
except RuntimeError:
    print("beyond the cap")
allocator.disarm()
"""


def test_torch_numpy_and_maps_go_through_the_shim(shim: Path) -> None:
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, cwd=ROOT, env=preloaded(shim), capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0::2][:3] == ["1 0"] * 3
    assert "DefaultCPUAllocator: can't allocate memory" in lines[1]
    assert "Unable to allocate 977. KiB" in lines[3]
    assert "unable to mmap 1000000 bytes" in lines[5]
    assert lines[6] == "beyond the cap"


@pytest.mark.parametrize(
    "refusing",
    [Refusing(aligned=0), Refusing(heap=512), Refusing(mapped=0)],
    ids=["tensors", "heap", "maps"],
)
def test_any_allocation_of_loading_and_answering(
    refusing: Refusing, sweeper: Sweeper, checkpoints: Checkpoints
) -> None:
    check(sweeper, Case(str(checkpoints("llama")), refusing), 5)


def test_large_allocations_that_are_refused_for_good_are_done_without(sweeper: Sweeper, wide: Path) -> None:
    case = Case(str(wide), Refusing(aligned=MiB), prompt=LONG)
    total = sweeper.count(case)
    for nth in spread(total, 5):
        run = sweeper.run(case, nth, persistent=True)
        # Shorter chunks of the prompt stay below a megabyte.
        assert run.outcome == "right", run.outcome


def test_converted_weights_are_let_go_where_nothing_else_helps(sweeper: Sweeper, wide: Path) -> None:
    case = Case(str(wide), Refusing(aligned=0), {"device_map": "cpu", "dtype": "float32"}, LONG)
    # Half a megabyte is too little for a chunk of 64 tokens. Converted, the layers take 21 MB.
    run = sweeper.run(case, 0, persistent=True, cap=MiB // 2)
    assert run.outcome == "right", run.outcome


def test_an_address_space_that_is_full(sweeper: Sweeper, wide: Path) -> None:
    case = Case(str(wide), Refusing(), prompt=LONG)
    for room in (0, 2, 8):
        run = sweeper.run(case, 0, persistent=True, room=room * MiB)
        assert run.as_asked, run.outcome
    assert sweeper.run(case, 0, persistent=True, room=512 * MiB).outcome == "right"


def test_two_answers_from_one_model(sweeper: Sweeper, checkpoints: Checkpoints) -> None:
    check(sweeper, Case(str(checkpoints("llama")), Refusing(aligned=0), mode="shared"), 3)


def test_layers_that_are_read_as_they_run(sweeper: Sweeper, checkpoints: Checkpoints) -> None:
    refusing = Refusing(aligned=0, mapped=0)
    check(sweeper, Case(str(checkpoints("llama")), refusing, {"device_map": {"": "cpu", "model.layers": "disk"}}), 3)


def test_threads_that_load_at_once(sweeper: Sweeper, checkpoints: Checkpoints) -> None:
    others = (str(checkpoints("gpt2")),)
    check(sweeper, Case(str(checkpoints("llama")), Refusing(aligned=0), mode="parallel", others=others), 2)


def test_main_memory_runs_out_beside_an_accelerator(
    shim: Path, checkpoints: Checkpoints, simulated_devices: SimulatedAccelerator, request: pytest.FixtureRequest
) -> None:
    assert request.config.cache is not None
    with Sweeper(shim, sim=request.config.cache.mkdir("simulated_accelerator")) as sweeper:
        check(sweeper, Case(str(checkpoints("llama")), Refusing(aligned=0), SPLIT), 3)
