"""`lyra.py plan --check`: carries a plan out and shows predicted beside measured."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from lyra_emergence.cli.models import find_model
from lyra_emergence.cli.options import say_notes
from lyra_emergence.cli.plan_view import band_text
from lyra_emergence.cli.progress import LoadProgress
from lyra_emergence.distributed import find_launch, is_divided
from lyra_emergence.errors import ConfigError, ModelUnavailableError
from lyra_emergence.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lyra_emergence.check import DeviceCheck, PlanCheck
    from lyra_emergence.cli.console import Console
    from lyra_emergence.cli.options import Options
    from lyra_emergence.cli.plan import PlanRequest
    from lyra_emergence.speed import Speed

__all__ = ["run_check"]


def run_check(options: Options, request: PlanRequest, console: Console) -> int:
    """Load the configured model by its plan, run it at its full context, print what was measured; 1 if it is off.

    What Python and torch take is measured first, where it has not been on this machine.

    Raises:
        ConfigError: The plan is for hardware that is not here, or the configuration is wrong.
        DoesNotFitError: No placement fits, or memory ran out.
        ModelUnavailableError: The weights are not on this machine.
    """
    from lyra_emergence.check import check_plan
    from lyra_emergence.checkpoint import read_checkpoint
    from lyra_emergence.cli.plan import measure_machine, speed_of
    from lyra_emergence.machine import probe_machine
    from lyra_emergence.plan import make_plan

    if request.gpus or request.ram is not None:
        raise ConfigError("'--check' runs the model, so it cannot plan for other hardware ('--gpu', '--ram')")
    resolved = options.resolve()
    say_notes(resolved, console)
    choice = find_model(resolved)
    if choice.remote is not None:
        raise ModelUnavailableError(
            f"{choice.config.model_id} is not on this machine, and a check needs its weights",
            hint="leave out --check, or load it once with --model",
        )
    if is_divided(choice.config, find_launch(os.environ)):
        raise ConfigError(
            "'--check' runs the model in one process, and 'distributed' divides it",
            hint="the program says what each rank holds, beside what was planned, whenever it loads",
        )
    for note in choice.notes:
        console.note(note)
    measure_machine(console)
    speed_machine = probe_machine(with_torch=False)
    machine = probe_machine(with_torch=True)
    plan = make_plan(choice.config, read_checkpoint(choice.directory), machine, batch=request.batch)
    for note in plan.notes:
        console.warning(note)
    with LoadProgress(console) as progress:
        check = check_plan(choice.config, choice.directory, plan, on_event=progress)
    speed = speed_of(plan, speed_machine)
    if options.json:
        console.print(json.dumps(check.to_json() | {"speed": asdict(speed) if speed else None}, indent=2))
    else:
        console.print("\n".join(_lines(check, choice.config.model_id, speed)))
    return 0 if check.holds else 1


def _lines(check: PlanCheck, name: str, speed: Speed | None) -> Iterator[str]:
    ran = f"a prompt of {check.prompt_tokens} tokens and {check.new_tokens} after it"
    yield f"{name}: {ran}, on the rung '{check.rung}'"
    if check.rung != check.plan.rung.name:
        yield f"the plan was to load on the rung '{check.plan.rung.name}': memory ran out on the way"
    yield ""
    yield f"{'':10}{'predicted':>12}{'measured':>12}{'spare':>12}"
    for device in check.devices:
        yield _row(device)
    mapped = sum(device.mapped for device in check.devices)
    if mapped:
        size = format_bytes(mapped)
        yield f"beside these, {size} of weights are a map of the file, whose pages the kernel may take back"
    yield ""
    prefill = check.prompt_tokens / check.prefill_seconds
    decode, prompt = f"{check.tokens_per_second:.1f} tokens/s", f"prompt {prefill:.0f} tokens/s"
    if speed is not None:
        decode += f" ({band_text(speed.decode_tokens_per_second)} predicted)"
        prompt += f" ({band_text(speed.prefill_tokens_per_second)} predicted)"
    yield f"{decode}, {prompt}, loaded in {check.load_seconds:.1f} s"


def _row(device: DeviceCheck) -> str:
    if device.measured is None or device.off is None:
        return f"{device.device:10}{format_bytes(device.predicted):>12}{'not counted here':>24}"
    sign = "-" if device.off < 0 else ""
    verdict = "as planned" if device.holds else "more than planned" if device.off < 0 else "less than planned"
    figures = (format_bytes(device.predicted), format_bytes(device.measured), f"{sign}{format_bytes(abs(device.off))}")
    return f"{device.device:10}" + "".join(figure.rjust(12) for figure in figures) + f"  {verdict}"
