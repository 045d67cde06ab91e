"""`lyra.py bench`: how fast a model runs here, beside what the plan predicted and what memory allows."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from lyra_emergence.cli.models import find_model
from lyra_emergence.cli.options import say_notes
from lyra_emergence.cli.plan_view import band_text
from lyra_emergence.cli.progress import LoadProgress
from lyra_emergence.errors import ModelUnavailableError
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lyra_emergence.bench import Bench, Spread
    from lyra_emergence.cli.console import Console
    from lyra_emergence.cli.options import Options
    from lyra_emergence.speed import Speed

__all__ = ["run_bench"]

_BUSY_FROM = 1.25
"""Times the measured limit from which what was measured cannot be the machine at rest."""


def run_bench(options: Options, prompt_tokens: int, new_tokens: int, rounds: int, console: Console) -> int:
    """Load the configured model, measure it, print the figures.

    What Python and torch take, and how fast the machine is, is measured first, where it has not been.

    Raises:
        ConfigError: The configuration is wrong.
        DoesNotFitError: No placement fits, or memory ran out.
        ModelUnavailableError: The weights are not on this machine.
    """
    from lyra_emergence.bench import bench, decode_limit
    from lyra_emergence.cli.plan import make_plan_for, measure_machine, speed_of
    from lyra_emergence.machine import probe_machine
    from lyra_emergence.speed import cached_rates

    resolved = options.resolve()
    say_notes(resolved, console)
    choice = find_model(resolved)
    if choice.remote is not None:
        raise ModelUnavailableError(
            f"{choice.config.model_id} is not on this machine, and a measurement needs its weights",
            hint="load it once with --model, or give a folder",
        )
    for note in choice.notes:
        console.note(note)
    measure_machine(console)
    rates = cached_rates(probe_machine(with_torch=False))
    plan = make_plan_for(choice, with_torch=True)
    for note in plan.notes:
        console.warning(note)
    speed = speed_of(plan, probe_machine(with_torch=False))
    with LoadProgress(console) as progress:
        found = bench(
            choice.config,
            choice.directory,
            plan,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            on_event=progress,
        )
    limit = decode_limit(plan, rates) if rates is not None else None
    if options.json:
        more = {"predicted": asdict(speed) if speed else None, "decode_limit_tokens_per_second": limit}
        console.print(json.dumps(found.to_json() | more, indent=2))
    else:
        console.print("\n".join(_lines(found, choice.config.model_id, speed, limit)))
    return 0


def _lines(found: Bench, name: str, speed: Speed | None, limit: float | None) -> Iterator[str]:
    footprint = found.plan.footprint
    form = f"{footprint.dtype}, {footprint.quantization}" if footprint.quantization else footprint.dtype
    kernels = "Lyra's kernels" if found.kernels else "torch's operators"
    yield f"{name}: {form}, on the rung '{found.rung}', {kernels} on the CPU"
    yield f"a prompt of {found.prompt_tokens} tokens, {found.new_tokens} new ones, median of {found.rounds} rounds"
    yield ""
    yield f"{'':14}{'measured':>24}   predicted"
    prefill, decode = (speed.prefill_tokens_per_second, speed.decode_tokens_per_second) if speed else (None, None)
    yield _row("prompt", _rates(found.prefill_tokens_per_second), band_text(prefill) if prefill else "")
    yield _row("single tokens", _rates(found.decode_tokens_per_second), band_text(decode) if decode else "")
    yield _row("first token", _seconds(found.first_token_seconds), "")
    yield _row("load", f"{found.load_seconds:.2f} s", "")
    for use in found.plan.devices:
        if use.device in found.device_bytes:
            planned = format_bytes(use.weights + use.kv_cache + use.activations + use.streaming)
            yield _row(use.device, format_bytes(found.device_bytes[use.device]), planned)
    yield _row("main memory", f"{format_bytes(found.private_bytes)} private", "")
    if limit is not None:
        yield ""
        yield _limit_line(limit, found.decode_tokens_per_second.median / limit)


def _limit_line(limit: float, share: float) -> str:
    allowed = f"reading the weights alone allows {limit:.1f} tokens/s here"
    if share > _BUSY_FROM:
        return f"{allowed}, it was measured; more was reached: it was busy then (lyra.py plan --measure measures anew)"
    return f"{allowed}: {share:.0%} of that was reached"


def _row(label: str, measured: str, predicted: str) -> str:
    return f"{label:14}{measured:>24}   {predicted}".rstrip()


def _rates(spread: Spread) -> str:
    return f"{spread.median:.1f} ({spread.low:.1f}-{spread.high:.1f})/s"


def _seconds(spread: Spread) -> str:
    return f"{spread.median:.3f} s"
