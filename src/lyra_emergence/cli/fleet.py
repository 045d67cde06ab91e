"""`lyra.py plan --machines 4x24GB`: layouts over several machines, on paper, with the commands that would run them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

import typer

from lyra_emergence.errors import ConfigError

if TYPE_CHECKING:
    from lyra_emergence.cli.console import Console
    from lyra_emergence.cli.models import ModelChoice
    from lyra_emergence.cli.options import Options
    from lyra_emergence.cli.plan import PlanRequest
    from lyra_emergence.fleet import FleetModel, Hardware
    from lyra_emergence.packing import Quantization

__all__ = [
    "BandwidthOption",
    "FleetRequest",
    "GpuLinkOption",
    "LinkOption",
    "MachinesOption",
    "TflopsOption",
    "run_fleet",
]

MachinesOption = Annotated[
    list[str] | None,
    typer.Option("--machines", metavar="4x24GB", help="plan for several machines (2x8x80GB: 8 GPUs each)"),
]
LinkOption = Annotated[
    str | None, typer.Option("--link", metavar="10Gbit", help="with --machines: the network between them [10Gbit]")
]
GpuLinkOption = Annotated[
    str | None,
    typer.Option("--gpu-link", metavar="64GB/s", help="with --machines: between GPUs of one [31.5GB/s]"),
]
BandwidthOption = Annotated[
    str | None,
    typer.Option("--bandwidth", metavar="1TB/s", help="with --machines: what a GPU reads of its memory [1TB/s]"),
]
TflopsOption = Annotated[
    float | None,
    typer.Option("--tflops", metavar="N", min=0.001, help="with --machines: what a GPU computes, in TFLOP/s [100]"),
]
_NOT_TOGETHER: Final = ("explain", "what_if", "gpus", "ram", "check", "measure")
_NAMES: Final = {"what_if": "--what-if", "gpus": "--gpu"}


@dataclass(frozen=True, slots=True)
class FleetRequest:
    """What `plan` is asked about several machines, as written; None where nothing was said.

    Attributes:
        machines: "4x24GB", "2x8x80GB".
        link: What two machines exchange.
        gpu_link: What two GPUs of a machine exchange.
        bandwidth: What a GPU reads of its own memory.
        tflops: TFLOP/s of a GPU.
    """

    machines: tuple[str, ...] = ()
    link: str | None = None
    gpu_link: str | None = None
    bandwidth: str | None = None
    tflops: float | None = None

    @property
    def asked(self) -> bool:
        """Whether the plan is one for several machines."""
        return self != FleetRequest()

    def hardware(self) -> Hardware:
        """Return how fast the machines are, with what was not said assumed.

        Raises:
            ConfigError: A rate is none, or no machines are named.
        """
        from lyra_emergence.fleet import Hardware

        if not self.machines:
            raise ConfigError(
                "--link, --gpu-link, --bandwidth and --tflops are about several machines",
                hint="name them: --machines 4x24GB",
            )
        stated = {
            "bandwidth": _rate(self.bandwidth, "--bandwidth"),
            "flops": None if self.tflops is None else self.tflops * 1e12,
            "gpu_link": _rate(self.gpu_link, "--gpu-link"),
            "link": _rate(self.link, "--link"),
        }
        assumed = tuple(name for name, value in stated.items() if value is None)
        return Hardware(**{name: value for name, value in stated.items() if value is not None}, assumed=assumed)


def run_fleet(options: Options, request: PlanRequest, fleet: FleetRequest, console: Console) -> int:
    """Print the layouts of the configured model over machines and return 0.

    Raises:
        ConfigError: The configuration is wrong, an option contradicts `--machines`, or a size or rate is none.
        DoesNotFitError: The machines do not hold the model.
        ModelUnavailableError: A named model can be had neither here nor from the hub.
    """
    from lyra_emergence.cli.fleet_view import render_fleet
    from lyra_emergence.cli.models import find_model
    from lyra_emergence.cli.options import say_notes
    from lyra_emergence.cli.progress import working
    from lyra_emergence.fleet import plan_fleet, read_machines
    from lyra_emergence.fleet.handover import hand_over

    _check_alone(request)
    hardware = fleet.hardware()
    machines = read_machines(fleet.machines)
    resolved = options.resolve()
    say_notes(resolved, console)
    with working(console, "reading the plan"):
        choice = find_model(resolved)
        model = _model(choice, request.batch, console)
    plan = plan_fleet(model, machines, hardware)
    handover = hand_over(model, plan.chosen, machines, trust_remote_code=choice.config.trust_remote_code)
    if options.json:
        console.print(json.dumps(plan.to_json() | {"handover": handover.to_json()}, indent=2))
    else:
        console.print("\n".join(render_fleet(plan, handover, choice.config.model_id, console)))
    return 0


def _model(choice: ModelChoice, batch: int, console: Console) -> FleetModel:
    """Return the model to plan for, in a form that vLLM loads."""
    from lyra_emergence.cli.plan import read_index
    from lyra_emergence.fleet import FleetModel
    from lyra_emergence.footprint import default_context
    from lyra_emergence.plan import measure_footprint

    config = choice.config
    for note in choice.notes:
        console.note(note)
    if config.load_in_8bit:
        console.warning("vLLM packs weights to 4 bits only as it loads them: planned for weights as they are stored")
    index = read_index(choice)
    context = config.context_length or default_context(index)
    packing: Quantization | None = "4bit" if config.load_in_4bit else None
    return FleetModel(index, measure_footprint(config, index, context, batch, packing))


def _check_alone(request: PlanRequest) -> None:
    given = [name for name in _NOT_TOGETHER if getattr(request, name)]
    if given:
        option = _NAMES.get(given[0], f"--{given[0]}")
        raise ConfigError(f"{option} is about one machine, --machines about several", hint=f"leave {option} out")


def _rate(written: str | None, option: str) -> int | None:
    from lyra_emergence.units import parse_rate

    try:
        return None if written is None else parse_rate(written)
    except ValueError as error:
        raise ConfigError(f"in '{option}': {error}") from None
