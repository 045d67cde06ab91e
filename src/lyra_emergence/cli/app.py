"""Commands and options, and how the program ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lyra_emergence.cli.cache import cache_app
from lyra_emergence.cli.config import config_app
from lyra_emergence.cli.console import Console, knows_ascii_alone, writing_output
from lyra_emergence.cli.fleet import BandwidthOption, GpuLinkOption, LinkOption, MachinesOption, TflopsOption  # noqa: TC001
from lyra_emergence.cli.journal import journal_app
from lyra_emergence.cli.options import Options
from lyra_emergence.cli.program import DEFAULT_COMMAND, Command, Program, forget_stdout
from lyra_emergence.cli.reporting import program_name, report
from lyra_emergence.cli.status import INTERRUPTED
from lyra_emergence.distributed.launch import find_launch
from lyra_emergence.errors import LyraError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["app", "run"]


def run(argv: Sequence[str] | None = None) -> int:
    """Run the program on `argv` (this process's arguments where None) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    launch = find_launch(os.environ)
    if launch is None:
        return _run(arguments)
    from lyra_emergence.cli.ranks import run_rank

    try:
        return run_rank(launch, lambda: _run(arguments))
    except LyraError as error:  # the ranks cannot meet
        return report(error, Console())


def _run(arguments: list[str]) -> int:
    _tolerate_any_encoding()
    try:
        return _exit_code(_invoke(arguments))
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("\n")  # the terminal shows ^C where the cursor was
        return INTERRUPTED
    except BrokenPipeError:
        forget_stdout()
        return 0
    except Exception as error:  # noqa: BLE001 - the last line of defence: no traceback unless it is asked for
        # A parse that fails knows no options yet, so --verbose is looked for by hand.
        return report(error, Console(verbose="--verbose" in arguments))


def _invoke(arguments: list[str]) -> Any:
    command = typer.main.get_command(app)
    return command.main(args=arguments, prog_name=program_name(), standalone_mode=False)


def _exit_code(result: Any) -> int:
    with writing_output():
        sys.stdout.flush()
    return result if isinstance(result, int) else 0


def _tolerate_any_encoding() -> None:
    """Print a question mark for what the terminal's encoding lacks instead of failing in the middle of an answer."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            ascii_alone = stream.isatty() and knows_ascii_alone(os.environ)
            reconfigure(encoding="ascii" if ascii_alone else None, errors="replace")


app = typer.Typer(
    cls=Program,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Chat over your journal with a language model placed in this machine's memory.\n"
    "A PROMPT gets one answer; piped text goes before it. `--` says it is no COMMAND.",
)

ModelConfigOption = Annotated[
    Path | None,
    typer.Option("--model-config", metavar="PATH", help="configuration file"),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="ID_OR_PATH", help="the model: a hub id or a folder"),
]
MaxMemoryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--max-memory",
        metavar="0=6GB",
        help="memory limit of a device (0, cpu, ...); repeatable",
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option("--context", metavar="N", min=1, help="tokens of context to make room for"),
]
JournalOption = Annotated[
    Path | None, typer.Option("--journal", metavar="PATH", help="the journal [your own, else the sample]")
]
RerankOption = Annotated[bool, typer.Option("--rerank", help="order the found entries again by a closer look")]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", metavar="NAME", help="what to compute in: bfloat16, float16, float32")
]
EightBitOption = Annotated[bool, typer.Option("--8bit", help="layers packed to 8 bits")]
FourBitOption = Annotated[bool, typer.Option("--4bit", help="layers packed to 4 bits")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="ask no hub, as HF_HUB_OFFLINE=1")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="debug lines, with each fallback step")]


@app.callback()
def program(
    *,
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version and leave")
    ] = False,
) -> None:
    """Hold the program's own options."""


@app.command(DEFAULT_COMMAND, cls=Command)
def chat_command(
    *,
    words: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...")] = None,
    model: ModelOption = None,
    model_config: ModelConfigOption = None,
    max_memory: MaxMemoryOption = None,
    context: ContextOption = None,
    journal: JournalOption = None,
    rerank: RerankOption = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", metavar="N", min=1, help="most tokens of an answer"),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", metavar="T", min=0, help="0 for the likeliest words, 1 and above for surprises"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="start of the random numbers, to repeat an answer")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option("--endpoint", metavar="URL", help="an OpenAI-compatible server answers instead"),
    ] = None,
    continue_last: Annotated[bool, typer.Option("--continue", "-c", help="go on with the last conversation")] = False,
    conversation: Annotated[
        str | None, typer.Option("--conversation", metavar="ID", help="go on with this one")
    ] = None,
    no_log: Annotated[bool, typer.Option("--no-log", help="keep nothing of the conversation")] = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="show an answer when it is whole")] = False,
    offline: OfflineOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="answer, citations, timings and placement as JSON")] = False,
    verbose: VerboseOption = False,
) -> int:
    """Open a chat, or answer one prompt."""
    options = Options(
        model=model,
        model_config=model_config,
        max_memory=tuple(max_memory or ()),
        context=context,
        journal=journal,
        rerank=rerank,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        json=as_json,
        endpoint=endpoint,
        stream=not no_stream,
        continue_last=continue_last,
        conversation=conversation,
        no_log=no_log,
        offline=offline,
    )
    console = Console(verbose=verbose)
    prompt = " ".join(words) if words else None
    if prompt is None and _is_terminal_stdin(console):
        from lyra_emergence.cli.chat import run_chat

        return run_chat(options, console)
    from lyra_emergence.cli.ask import run_ask

    return run_ask(prompt, options, console)


@app.command("plan", cls=Command)
def plan_command(
    *,
    target: Annotated[str | None, typer.Argument(metavar="MODEL_OR_PATH")] = None,
    model: Annotated[str | None, typer.Option("--model", hidden=True)] = None,
    model_config: ModelConfigOption = None,
    max_memory: MaxMemoryOption = None,
    context: ContextOption = None,
    explain: Annotated[
        str | None,
        typer.Option("--explain", metavar="BLOCK", help="why this block is where it is"),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="sequences that run together")] = 1,
    dtype: DtypeOption = None,
    load_in_8bit: EightBitOption = False,
    load_in_4bit: FourBitOption = False,
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", metavar="24GB", help="plan for a GPU of this size, not those here; repeatable"),
    ] = None,
    ram: Annotated[
        str | None, typer.Option("--ram", metavar="64GB", help="plan for this main memory, not what is here")
    ] = None,
    what_if: Annotated[bool, typer.Option("--what-if", help="compare contexts and quantizations")] = False,
    check: Annotated[bool, typer.Option("--check", help="load and run it, and compare with what was planned")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="measure first how fast this machine is and what torch takes")
    ] = False,
    machines: MachinesOption = None,
    link: LinkOption = None,
    gpu_link: GpuLinkOption = None,
    bandwidth: BandwidthOption = None,
    tflops: TflopsOption = None,
    offline: OfflineOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="the plan as JSON")] = False,
    verbose: VerboseOption = False,
) -> int:
    """Show where each layer would go, without loading."""
    from lyra_emergence.cli.fleet import FleetRequest, run_fleet
    from lyra_emergence.cli.plan import PlanRequest, run_plan
    from lyra_emergence.cli.start import go_offline

    if offline:
        go_offline()
    options = Options(
        model=target or model,
        model_config=model_config,
        max_memory=tuple(max_memory or ()),
        context=context,
        json=as_json,
        dtype=dtype,
        load_in_8bit=load_in_8bit,
        load_in_4bit=load_in_4bit,
    )
    request = PlanRequest(explain, what_if, batch, tuple(gpu or ()), ram, check, measure)
    fleet = FleetRequest(tuple(machines or ()), link, gpu_link, bandwidth, tflops)
    console = Console(verbose=verbose)
    return run_fleet(options, request, fleet, console) if fleet.asked else run_plan(options, request, console)


@app.command("bench", cls=Command)
def bench_command(
    *,
    target: Annotated[str | None, typer.Argument(metavar="MODEL_OR_PATH")] = None,
    model: Annotated[str | None, typer.Option("--model", hidden=True)] = None,
    model_config: ModelConfigOption = None,
    max_memory: MaxMemoryOption = None,
    context: ContextOption = None,
    prompt: Annotated[int, typer.Option("--prompt", metavar="N", min=1, help="tokens of the prompt")] = 512,
    new: Annotated[int, typer.Option("--new", metavar="N", min=2, help="tokens after it")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="rounds that count")] = 3,
    dtype: DtypeOption = None,
    load_in_8bit: EightBitOption = False,
    load_in_4bit: FourBitOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="the figures as JSON")] = False,
    verbose: VerboseOption = False,
) -> int:
    """Measure a model's speed and memory here."""
    from lyra_emergence.cli.bench import run_bench

    options = Options(
        model=target or model,
        model_config=model_config,
        max_memory=tuple(max_memory or ()),
        context=context,
        json=as_json,
        dtype=dtype,
        load_in_8bit=load_in_8bit,
        load_in_4bit=load_in_4bit,
    )
    return run_bench(options, prompt, new, rounds, Console(verbose=verbose))


@app.command("serve", cls=Command)
def serve_command(
    *,
    model: ModelOption = None,
    model_config: ModelConfigOption = None,
    max_memory: MaxMemoryOption = None,
    context: ContextOption = None,
    journal: JournalOption = None,
    no_journal: Annotated[bool, typer.Option("--no-journal", help="answer on the page without a journal")] = False,
    rerank: RerankOption = False,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="where to listen")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0 for any free one")] = 8000,
    api_key_env: Annotated[
        str | None, typer.Option("--api-key-env", metavar="NAME", help="variable that holds the key [LYRA_SERVE_KEY]")
    ] = None,
    parallel: Annotated[int, typer.Option("--parallel", metavar="N", min=1, max=64, help="answers at once")] = 4,
    queue: Annotated[int, typer.Option("--queue", metavar="N", min=0, help="requests that may wait")] = 64,
    max_body: Annotated[str, typer.Option("--max-body", metavar="SIZE", help="most that a request holds")] = "4MiB",
    grace: Annotated[float, typer.Option("--grace", metavar="S", min=0, help="seconds to end answers in")] = 30.0,
    offline: OfflineOption = False,
    verbose: VerboseOption = False,
) -> int:
    """Serve the model to OpenAI's clients, and a page to chat on."""
    from lyra_emergence.cli.serve import ServeRequest, run_serve

    options = Options(
        model=model,
        model_config=model_config,
        max_memory=tuple(max_memory or ()),
        context=context,
        journal=journal,
        no_journal=no_journal,
        rerank=rerank,
        offline=offline,
    )
    request = ServeRequest(host, port, api_key_env, parallel, queue, max_body, grace)
    return run_serve(options, request, Console(verbose=verbose))


@app.command("doctor", cls=Command)
def doctor_command(
    *,
    model: ModelOption = None,
    model_config: ModelConfigOption = None,
    journal: Annotated[Path | None, typer.Option("--journal", metavar="PATH", help="the journal to check")] = None,
    offline: OfflineOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="the findings as JSON")] = False,
    verbose: VerboseOption = False,
) -> int:
    """Check this installation, and say what the bundled model is."""
    from lyra_emergence.cli.doctor import run_doctor

    options = Options(model=model, model_config=model_config, journal=journal, offline=offline, json=as_json)
    return run_doctor(options, Console(verbose=verbose))


app.add_typer(config_app, name="config")
app.add_typer(cache_app, name="cache")
app.add_typer(journal_app, name="journal")


def _is_terminal_stdin(console: Console) -> bool:
    return console.stdin.isatty()


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version("lyra-emergence")
    except PackageNotFoundError:
        number = "unknown (not installed)"
    with writing_output():
        sys.stdout.write(f"lyra {number}\n")
        sys.stdout.flush()
    raise typer.Exit
