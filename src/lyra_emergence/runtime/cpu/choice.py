"""Which kernel multiplies a weight with few tokens: measured once for a shape, and kept per machine and torch version.

Measured on the model's own weights, as many of a shape as do not stay in the CPU's caches: a step of one token meets
each weight once, and in main memory. So it takes no memory, and reads from a file what the first token would read.
"""

from __future__ import annotations

import ctypes
import json
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from lyra_emergence.cache_files import cache_path, replace_whole
from lyra_emergence.machine import probe_machine
from lyra_emergence.runtime.cpu.linear import KINDS, matrix_of
from lyra_emergence.speed.cache import fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lyra_emergence.runtime.cpu.library import Library

__all__ = ["Choice"]

JSON_FORMAT = "lyra.kernels/1"
_FILE = "kernels.json"
_TOKENS = (1, 2, 4, 8)
"""Numbers of tokens that are measured; one in between goes by the next larger one."""
_BEYOND_CACHES = 48 * 2**20
_MOST_WEIGHTS = 64
_ROUNDS = 3
_MOST_SECONDS = 1.0
_KEPT = 20

_lock = threading.Lock()


class Choice:
    """What was measured on this machine.

    Args:
        library: The compiled kernels, measured beside torch's.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._machine = f"{fingerprint(probe_machine(with_torch=True))}; {torch.get_num_threads()} threads"
        self._faster: dict[str, bool] = self._read().get(self._machine, {})

    def prefers_kernels(self, weight: torch.Tensor, tokens: int) -> bool:
        """Return whether the compiled kernels are the faster ones for a weight, (outputs, inputs).

        What was not measured is theirs: they read each weight once, in order.
        """
        return self._faster.get(_name(weight, _as_measured(tokens)), True)

    def measure(self, weights: Iterable[torch.Tensor]) -> None:
        """Measure the shapes among `weights` that were not yet, and keep what was found.

        Ends after a second: on a busy machine the rest is left to the next load.
        """
        ends = time.perf_counter() + _MOST_SECONDS
        with _lock:
            cases: dict[str, tuple[list[torch.Tensor], int]] = {}
            for weight in weights:
                for tokens in _TOKENS:
                    cases.setdefault(_name(weight, tokens), ([], tokens))[0].append(weight)
            missing = {name: case for name, case in cases.items() if name not in self._faster}
            for name, (alike, tokens) in missing.items():
                if time.perf_counter() > ends:
                    break
                self._faster[name] = self._is_faster(alike, tokens)
            if missing:
                self._keep()

    def prefers(self, name: str, ours: Callable[[], None], others: Callable[[], None]) -> bool:
        """Return whether `ours` is the faster one, as was measured for `name`, or is now."""
        with _lock:
            if name not in self._faster:
                self._faster[name] = _is_first(ours, others)
                self._keep()
            return self._faster[name]

    @torch.inference_mode()
    def _is_faster(self, alike: list[torch.Tensor], tokens: int) -> bool:
        weight = alike[0]
        met = alike[: max(1, min(_MOST_WEIGHTS, _BEYOND_CACHES // weight.nbytes))]
        matrices = [matrix_of(one, None) for one in met]
        x = torch.full((tokens, weight.shape[1]), 0.01, dtype=weight.dtype)
        y = torch.empty((tokens, weight.shape[0]), dtype=weight.dtype)
        kind, threads = KINDS[x.dtype], torch.get_num_threads()

        def by_torch() -> None:
            for one in met:
                functional.linear(x, one)

        def by_kernels() -> None:
            for matrix in matrices:
                assert matrix is not None  # of a dtype that the kernels take, and whole
                self._library.linear(x.data_ptr(), y.data_ptr(), kind, tokens, ctypes.byref(matrix), threads)

        return _is_first(by_kernels, by_torch)

    def _keep(self) -> None:
        others = {name: found for name, found in self._read().items() if name != self._machine}
        machines = {**dict(list(others.items())[-(_KEPT - 1) :]), self._machine: self._faster}
        replace_whole(cache_path(_FILE), json.dumps({"format": JSON_FORMAT, "machines": machines}, indent=1))

    def _read(self) -> dict[str, dict[str, bool]]:
        with suppress(OSError, ValueError, RecursionError, AttributeError):
            held = json.loads(cache_path(_FILE).read_text(encoding="utf-8"))
            if held.get("format") == JSON_FORMAT and isinstance(held.get("machines"), dict):
                return {name: found for name, found in held["machines"].items() if isinstance(found, dict)}
        return {}


def _is_first(ours: Callable[[], None], others: Callable[[], None]) -> bool:
    """Return whether `ours` takes no longer, by the fastest of some rounds: what else runs only ever adds to them.

    They take turns, so that a machine that is busy for a while is busy for both.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for work, taken in zip((ours, others), times, strict=True):
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
    return min(times[0]) <= min(times[1])


def _as_measured(tokens: int) -> int:
    return next((measured for measured in _TOKENS if measured >= tokens), _TOKENS[-1])


def _name(weight: torch.Tensor, tokens: int) -> str:
    return f"{str(weight.dtype).removeprefix('torch.')} {weight.shape[0]}x{weight.shape[1]}, {tokens} tokens"
