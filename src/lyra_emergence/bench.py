"""Measuring a model where its plan puts it: loading, prompt, single tokens and memory, beside what was predicted."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lyra_emergence.placement import CPU, DISK

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from lyra_emergence.config import ModelConfig
    from lyra_emergence.distributed.rank_report import RankReport
    from lyra_emergence.load_report import LoadEvent
    from lyra_emergence.loading import LoadedModel
    from lyra_emergence.plan import Plan
    from lyra_emergence.speed import MachineRates

__all__ = ["Bench", "Spread", "bench", "decode_limit"]

JSON_FORMAT = "lyra.bench/1"


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one figure: the median, and the least and the most of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: list[float]) -> Spread:
        """Return the spread of at least one figure."""
        return cls(statistics.median(figures), min(figures), max(figures))


@dataclass(frozen=True, slots=True)
class Bench:
    """What was measured.

    Attributes:
        plan: What the model was loaded by.
        rung: The rung that it was loaded at.
        kernels: Whether layers on the CPU run in Lyra's own kernels.
        load_seconds: Loading, tokenizer included, with the file in the kernel's cache or not, as it was.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens generated in each round.
        rounds: Rounds that were counted, after one that was not.
        first_token_seconds: From the prompt to the first token.
        prefill_tokens_per_second: Tokens of the prompt in that time.
        decode_tokens_per_second: Tokens after the first.
        device_bytes: The most that tensors took on each accelerator that keeps count of it.
        private_bytes: Private main memory of the process at its end.
        ranks: What each process held once it was loaded, where several share the model.
    """

    plan: Plan
    rung: str
    kernels: bool
    load_seconds: float
    prompt_tokens: int
    new_tokens: int
    rounds: int
    first_token_seconds: Spread
    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread
    device_bytes: Mapping[str, int]
    private_bytes: int
    ranks: tuple[RankReport, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain data; `format` names the version of this form."""
        figures = asdict(self)
        del figures["plan"]
        footprint = self.plan.footprint
        return {
            "format": JSON_FORMAT,
            "model": self.plan.model,
            "dtype": footprint.dtype,
            "quantization": footprint.quantization,
            "context_length": self.plan.context_length,
            **figures,
        }


def bench(
    config: ModelConfig,
    directory: Path,
    plan: Plan,
    *,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    on_event: Callable[[LoadEvent], None] | None = None,
) -> Bench:
    """Load `directory` by `plan`, run rounds of a prompt and tokens after it, and measure. The model is closed again.

    Args:
        config: As for loading.
        directory: The checkpoint's folder.
        plan: What `make_plan` returned for it.
        prompt_tokens: Tokens of the prompt; as many as the context has room for, if that is fewer.
        new_tokens: Tokens of each round, the first one included; at least 2.
        rounds: Rounds that count; one more comes first.
        on_event: Called with every step of loading.

    Raises:
        DoesNotFitError: Memory ran out.
        CheckpointError, MissingExtraError: As `loading.load`.
    """
    from lyra_emergence.framework import private_bytes
    from lyra_emergence.loading import load
    from lyra_emergence.runtime.memory import peak_bytes, reset_peak

    accelerators = [budget.device for budget in plan.request.accelerators]
    loaded = load(config, directory=directory, plan=plan, on_event=on_event)
    try:
        for device in accelerators:
            reset_peak(device)
        prompt_tokens = max(1, min(prompt_tokens, loaded.context_length - new_tokens))
        found = [_round(loaded, prompt_tokens, new_tokens) for _ in range(rounds + 1)][1:]
        peaks = {device: peak_bytes(device) for device in accelerators}
        return Bench(
            plan=plan,
            rung=loaded.report.rung,
            kernels=_uses_kernels(loaded),
            load_seconds=loaded.report.seconds,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            first_token_seconds=Spread.of([prefill for prefill, _ in found]),
            prefill_tokens_per_second=Spread.of([prompt_tokens / prefill for prefill, _ in found]),
            decode_tokens_per_second=Spread.of([(new_tokens - 1) / decode for _, decode in found]),
            device_bytes={device: peak for device, peak in peaks.items() if peak is not None},
            private_bytes=private_bytes(),
            ranks=loaded.report.ranks,
        )
    finally:
        loaded.close()


def _round(loaded: LoadedModel, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Return the seconds of the prompt and of the tokens after the first."""
    from contextlib import closing

    from lyra_emergence.runtime.stepper import Stepper

    vocabulary = int(loaded.model.config.get_text_config().vocab_size)
    prompt = [(7 * at + 11) % vocabulary for at in range(prompt_tokens)]
    with closing(Stepper(loaded, most_tokens=prompt_tokens + new_tokens)) as stepper:
        clock = time.perf_counter()
        token = int(stepper.prefill(prompt).argmax(-1))
        prefill = time.perf_counter() - clock
        clock = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = int(stepper.step(token).argmax(-1))
        return prefill, time.perf_counter() - clock


def _uses_kernels(loaded: LoadedModel) -> bool:
    from lyra_emergence.runtime.cpu import is_sped_up

    return is_sped_up(loaded.model)


def decode_limit(plan: Plan, rates: MachineRates) -> float | None:
    """Return the tokens a second at which the plan's weights can be read, were nothing else to do; None if unknown.

    Each device's bytes at its measured rate, one after the other; a mixture's active experts, of tables one row.
    """
    blocks = {block.name: block for block in plan.footprint.blocks}
    seconds = 0.0
    for placement in plan.placements:
        if placement.kind in {"other", "embedding"}:
            continue
        device = rates.of(CPU if placement.device == DISK else placement.device)
        rate = device.dtypes.get(plan.footprint.dtype) if device is not None else None
        if rate is None or (placement.device == DISK and rates.file_read is None):
            return None
        tied_to = blocks[placement.block].tied_to
        held = max(placement.weights, blocks[tied_to].weights) if tied_to else placement.weights
        read = rates.file_read if placement.device == DISK else rate.read
        assert read is not None  # checked above
        seconds += held * blocks[placement.block].active_share / read.likely
    return 1 / seconds if seconds else None
