"""Measuring this machine, in about half a second on the CPU and as much for each accelerator.

Weights are read and multiplied as Lyra's decode does it: `torch.nn.functional.linear` with one row, with all threads
that torch uses. A layer's own cost is the difference between two tiny models of transformers with 4 and 2 layers.
Each figure is the median of several short runs; its band leaves out the lowest and the highest sixth.

Figures hold for the machine as it was. On a busy one they are low and wide, and take two or three seconds: two threads
of torch that spin while they wait for each other, and other programs beside, were twenty times slower than one alone.

Not covered: several sockets with memory of their own, sparse or compiled kernels, what other processes leave of a
GPU's time. Torch's global state (threads, default dtype, random numbers) is left as it was.
"""

from __future__ import annotations

import contextlib
import copy
import time
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyra_emergence.speed.cache import fingerprint
from lyra_emergence.speed.file_probe import measure_file
from lyra_emergence.speed.machine_rates import SHARED_HEADS, Band, DeviceRates, DtypeRates, MachineRates
from lyra_emergence.speed.series import BUDGET, Series, band_of, clocked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from lyra_emergence.machine import Machine

__all__ = ["measure_file", "measure_rates"]

DTYPES = ("float32", "bfloat16", "float16")
_ROUNDS = 3
"""Every figure is measured a little in each round: a moment's disturbance spoils a part of all, not all of one."""
_LONGEST = 0.5
"""Seconds after which a device too busy to be measured more often has been measured often enough."""
_LEAST_BUFFER, _MOST_BUFFER = 96 * 2**20, 512 * 2**20
_TIMES_CACHES = 4
"""How many times the last-level caches the buffer is: at twice, caches still made reading 12% faster than at thirty."""
_WIDTH = 2048
"""Rows and columns of the matrices: the hidden size of a model of one to three billion parameters."""
_MATRIX_BYTES = 2 * _WIDTH * _WIDTH
"""Bytes of a matrix of two-byte elements."""
_CACHED_TOKENS, _CACHED_TOKENS_ON_ACCELERATORS = 512, 8192
_CACHED_LAYERS = 3
_KEY_HEADS, _HEAD_WIDTH = 8, 128
_PREFILL_ROWS, _TRIAL_ROWS = 1024, 16
_LONG_RUN = 0.005
"""Seconds from which a product is long enough to be timed."""
_MOST_STEPS = 1024
"""Tokens that the tiny models have room for; more take a larger room."""
_NO_TIME = 1e-7
"""Seconds that stand for none: a rate is above zero."""
_FEWEST_ROWS, _MOST_ROWS = 17, 400
_LEAST_SHARE = 0.1
"""Share of a tiny model's token that a layer, or what is beside the layers, costs at least."""
_PIECE = 4 * 2**20
_STAGED_BYTES = 32 * 2**20
"""Bytes of a small layer: several pieces, so that reading one and sending another overlap."""


def measure_rates(machine: Machine | None = None, *, file: Path | None = None) -> MachineRates:
    """Measure this machine.

    Args:
        machine: This machine as `probe_machine` found it, which names the accelerators to measure; asked by default.
        file: A file of some tens of megabytes or more where models lie, to measure reading with. By default a
            temporary one in the user's cache folder, removed again. The kernel is asked to drop the pages it holds of
            what is read first; where it does not (not Linux, a file that another process has mapped, some virtual file
            systems) the rate is that of its page cache, many times the disk's.
    """
    # Imported here so that no figure pays for it.
    from transformers import LlamaForCausalLM  # noqa: F401

    from lyra_emergence.machine import probe_machine
    from lyra_emergence.runtime.memory import give_back, return_freed_memory

    return_freed_memory()  # as loading does: a cache that grows then gets new pages from the kernel at every step
    found = probe_machine(with_torch=True)
    machine = machine or found
    named = {device.name for device in machine.accelerators}
    accelerators: dict[str, DeviceRates] = {}
    for device in (device for device in found.accelerators if device.name in named):
        accelerators[device.name] = _measure_device(device.name, min(_MOST_BUFFER // 2, device.free_bytes // 4))
        give_back()
    room = min(_MOST_BUFFER, found.cpu.free_bytes // 4)
    cpu = _measure_device("cpu", min(room, max(_LEAST_BUFFER, _TIMES_CACHES * _cache_bytes())))
    return MachineRates(fingerprint(machine), cpu, accelerators, measure_file(file))


def _cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return the bytes of all last-level caches; 0 where the kernel does not say."""
    caches: dict[str, int] = {}
    for level in root.glob("cpu[0-9]*/cache/index3"):
        with contextlib.suppress(OSError, ValueError):
            shared, size = (level / "shared_cpu_list").read_text(), (level / "size").read_text().strip()
            caches[shared] = int(size.removesuffix("K")) * 1024
    return sum(caches.values())


def _measure_device(name: str, nbytes: int) -> DeviceRates:
    """Return the rates of a device; without a dtype where there is no room for a probe of `nbytes`."""
    import torch

    with torch.inference_mode():
        try:
            pairs = max(1, nbytes // (2 * _MATRIX_BYTES))  # two matrices of bfloat16 are one of float32
            # Ones in bfloat16 are numbers near one in float32 too.
            buffer = torch.ones(2 * pairs, _WIDTH, _WIDTH, dtype=torch.bfloat16, device=name)
            transfers = _Transfers(buffer.device) if name != "cpu" else None
        except RuntimeError:
            return DeviceRates({})
        models = [_tiny_model(layers) for layers in (2, 4)]
        prepared = {dtype: _prepare(buffer, getattr(torch, dtype), models) for dtype in DTYPES}
        probes = {dtype: probe for dtype, probe in prepared.items() if probe is not None}
        series = [one for probe in (*probes.values(), transfers) if probe is not None for one in probe.series]
        end = time.perf_counter() + _LONGEST
        for one in series * _ROUNDS:
            if time.perf_counter() < end:
                one.take()
        found = {dtype: probe.rates() for dtype, probe in probes.items()}
        return DeviceRates(found, *(transfers.rates() if transfers else ()))


def _prepare(buffer: torch.Tensor, dtype: torch.dtype, models: Sequence[Any]) -> _DtypeProbe | None:
    """Return the probe of the buffer's device, or None where it cannot compute in `dtype` or has no room to."""
    try:
        matrices = buffer.view(-1).view(dtype).view(-1, _WIDTH, _WIDTH)
        return _DtypeProbe(matrices, [copy.deepcopy(model).to(dtype).to(buffer.device) for model in models])
    except (RuntimeError, TypeError):
        return None


class _DtypeProbe:
    """What is run to measure a device in one dtype."""

    def __init__(self, matrices: torch.Tensor, models: Sequence[Any]) -> None:
        device, dtype = matrices.device, matrices.dtype
        on_cpu = device.type == "cpu"
        each = cycle(matrices)
        self._rows = _prefill_rows(matrices) if on_cpu else _PREFILL_ROWS
        self._read_bytes = matrices[0].nbytes if on_cpu else matrices.nbytes
        cache, self._cache_bytes = _cache(device, dtype)
        # On an accelerator one after the other without waiting, as its queue runs them.
        kernels = _Kernels.find(dtype) if on_cpu else None
        read = _product(matrices, 1, each, times=1 if on_cpu else len(matrices))
        self._read = Series(device, *((read,) if kernels is None else (read, kernels.product(each))))
        self._fused: tuple[Series, ...] = kernels.series(models) if kernels is not None else ()
        self._matmul = Series(device, _product(matrices, self._rows, each))
        self._alone, self._shared = (Series(device, _attention(cache, heads)) for heads in (1, SHARED_HEADS))
        self._steps = Series(device, *(_stepper(model, device) for model in models), budget=2 * BUDGET)
        self._kernels = Series(device, *_new_and_known(matrices[0])) if on_cpu else None
        series = (self._read, self._matmul, self._alone, self._shared, self._steps, self._kernels, *self._fused)
        self.series = tuple(one for one in series if one is not None)

    def rates(self) -> DtypeRates:
        """Return what was measured."""
        pairs = self._steps.samples
        kernel = [max(new - known, _NO_TIME) for new, known in (self._kernels.samples if self._kernels else [])]
        token = [max(2 * less - more, less * _LEAST_SHARE) for less, more in pairs]
        fused = self._fused[0].samples if self._fused else ()
        return DtypeRates(
            read=self._read.fastest().under(self._read_bytes),
            matmul=self._matmul.band().under(2 * self._rows * _WIDTH * _WIDTH),
            cache_alone=self._alone.band().under(self._cache_bytes),
            cache_shared=self._shared.band().under(self._cache_bytes),
            layer=band_of(_layers(pairs)),
            token=band_of(token),
            kernel=band_of(kernel or [_NO_TIME]),
            fused_layer=band_of(_layers(fused)) if fused else None,
            fused_cache=self._fused[1].band().under(self._cache_bytes) if fused else None,
        )


def _layers(pairs: Sequence[Sequence[float]]) -> list[float]:
    """Return the seconds of a layer, from those of models of 2 and 4 layers."""
    # The floor keeps figures above zero where noise is larger than they are.
    return [max((more - less) / 2, more * _LEAST_SHARE) for less, more in pairs]


class _Kernels:
    """Lyra's kernels for single tokens on the CPU, measured as decoding uses them."""

    def __init__(self, library: Any, dtype: torch.dtype) -> None:
        self._library = library
        self._dtype = dtype

    @classmethod
    def find(cls, dtype: torch.dtype) -> _Kernels | None:
        """Return them, compiled first where they are not there yet; None where that cannot be done."""
        from lyra_emergence.runtime.cpu.library import find_library

        library = find_library()
        return cls(library, dtype) if library is not None else None

    def product(self, each: Iterator[torch.Tensor]) -> Callable[[], object]:
        """Return a function that multiplies one token with the next matrix."""
        import ctypes

        import torch

        from lyra_emergence.runtime.cpu.linear import KINDS, matrix_of

        x, y = (torch.full((1, _WIDTH), 0.5, dtype=self._dtype) for _ in range(2))
        kind, threads = KINDS[self._dtype], torch.get_num_threads()

        def run() -> None:
            matrix = matrix_of(next(each), None)
            assert matrix is not None  # the probe's matrices are whole and on the CPU
            self._library.linear(x.data_ptr(), y.data_ptr(), kind, 1, ctypes.byref(matrix), threads)

        return run

    def series(self, models: Sequence[Any]) -> tuple[Series, Series]:
        """Return the runs of single tokens through fused layers, and of attention to a cache."""
        import torch

        from lyra_emergence.runtime.cpu.decoder import fuse

        cpu = torch.device("cpu")
        fused = [copy.deepcopy(model) for model in models]
        for model in fused:
            for layer in model.model.layers:
                fuse(layer, self._library)
        steps = Series(cpu, *(_stepper(model, cpu, roomy=True) for model in fused), budget=2 * BUDGET)
        attention = self._attention()
        return steps, Series(cpu, attention)

    def _attention(self) -> Callable[[], object]:
        """Return a function that looks at all of a layer's keys and values."""
        import torch

        cache, _ = _cache(torch.device("cpu"), self._dtype)
        query = torch.ones((SHARED_HEADS * _KEY_HEADS, _HEAD_WIDTH), dtype=self._dtype)
        each = cycle(cache)

        def run() -> None:
            keys, values = next(each)
            self._library.attend(query, keys, values, torch.get_num_threads())

        return run


class _Transfers:
    """What is run to measure the way from main memory to an accelerator."""

    def __init__(self, device: torch.device) -> None:
        import torch

        held = torch.ones(_PIECE, dtype=torch.uint8)
        small = torch.ones(1, 1, _WIDTH)  # (batch, tokens, width)
        self._copy = Series(device, lambda: held.to(device))
        self._there_and_back = Series(device, lambda: small.to(device).to("cpu"))
        self._staged = Series(device, _staged(device))
        self.series = (self._copy, self._there_and_back, self._staged)

    def rates(self) -> tuple[Band, Band, Band]:
        """Return bytes/s to the device, the seconds that a hidden state takes there or back, and staged bytes/s."""
        there = self._there_and_back.band().times(0.5)
        return self._copy.band().under(_PIECE), there, self._staged.band().under(_STAGED_BYTES)


def _staged(device: torch.device) -> Callable[[], object]:
    """Return a function that copies as guests' weights are copied."""
    import torch

    from lyra_emergence.runtime.staging import Staging

    staging = Staging(device, _STAGED_BYTES)
    source = torch.ones(_STAGED_BYTES, dtype=torch.uint8)
    target = source.to(device)
    return lambda: staging.copy([(source, target)])


def _product(
    matrices: torch.Tensor, rows: int, each: Iterator[torch.Tensor], *, times: int = 1
) -> Callable[[], object]:
    """Return a function that multiplies `rows` tokens with the next matrix, `times` over."""
    from torch.nn.functional import linear

    tokens = matrices.new_full((1, rows, _WIDTH), 0.5)  # (batch, tokens, width)

    def run() -> None:
        for _ in range(times):
            linear(tokens, next(each))

    return run


_rows_to_come = cycle(range(_FEWEST_ROWS, _MOST_ROWS))


def _new_and_known(matrix: torch.Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a function that multiplies a number of rows that did not come for long, and one that does so again."""
    from torch.nn.functional import linear

    rows = _FEWEST_ROWS

    def new() -> None:
        nonlocal rows
        rows = next(_rows_to_come)
        known()

    def known() -> None:
        linear(matrix.new_full((1, rows, _WIDTH), 0.5), matrix)

    return new, known


def _prefill_rows(matrices: torch.Tensor) -> int:
    """Return the rows of a product that is long enough: few in float16 on a CPU without instructions for it."""
    run = _product(matrices, _TRIAL_ROWS, cycle(matrices))
    seconds = min(clocked(run, matrices.device) for _ in range(2))
    return min(_PREFILL_ROWS, max(2 * _TRIAL_ROWS, int(_TRIAL_ROWS * _LONG_RUN / seconds)))


_Cache = list[list["torch.Tensor"]]


def _cache(device: torch.device, dtype: torch.dtype) -> tuple[_Cache, int]:
    """Return keys and values of a few layers, and the bytes of one layer's."""
    import torch

    tokens = _CACHED_TOKENS if device.type == "cpu" else _CACHED_TOKENS_ON_ACCELERATORS
    shape = (1, _KEY_HEADS, tokens, _HEAD_WIDTH)  # (batch, heads, tokens, width)
    layers = [[torch.ones(shape, dtype=dtype, device=device) for _ in range(2)] for _ in range(_CACHED_LAYERS)]
    return layers, sum(held.nbytes for held in layers[0])


def _attention(cache: _Cache, heads: int) -> Callable[[], object]:
    """Return a function that adds a token to a layer's keys and values and looks at all, with `heads` times as many."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    new = cache[0][0][:, :, :1].clone()  # (batch, heads, tokens, width)
    query = new.repeat(1, heads, 1, 1)
    each = cycle([list(layer) for layer in cache])

    def run() -> None:
        # The cache grows by concatenation: all of it is written once more, to memory that is new each time.
        layer = next(each)
        keys, values = layer[:] = [torch.cat([held, new], -2) for held in layer]
        scaled_dot_product_attention(query, keys, values, enable_gqa=heads > 1)

    return run


def _tiny_model(layers: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    with torch.random.fork_rng(devices=[]):
        return LlamaForCausalLM(config).eval()


def _stepper(model: Any, device: torch.device, *, roomy: bool = False) -> Callable[[], object]:
    """Return a function that runs one token through a model and waits for its logits."""
    import torch

    from lyra_emergence.runtime.kv_cache import give_room

    cache: dict[str, Any] = {}

    def step() -> int:
        token = torch.tensor([[1]], device=device)  # (batch, tokens)
        output = model(input_ids=token, use_cache=True, logits_to_keep=1, **cache)
        if roomy and not cache:
            give_room({"": output.past_key_values}, range(len(model.model.layers)), _MOST_STEPS)
        cache["past_key_values"] = output.past_key_values
        return int(output.logits[:, -1].float().argmax(-1))

    return step
