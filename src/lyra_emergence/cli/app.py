"""Commands and options, and how an error becomes an exit status."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

from lyra_emergence.cli.cache import cache_app
from lyra_emergence.cli.config import config_app
from lyra_emergence.cli.console import Console, writing_output
from lyra_emergence.cli.journal import journal_app
from lyra_emergence.cli.options import Options
from lyra_emergence.cli.status import FAILED, INTERRUPTED, USAGE
from lyra_emergence.errors import LyraError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["app", "run"]

_PROGRAM_NAMES: Final = frozenset({"lyra.py", "lyra", "lyra.exe"})
_DEFAULT_COMMAND: Final = "chat"
# typer keeps its copy of click private; its public BadParameter leads to the base of all usage errors.
_UsageError: type[Any] = typer.BadParameter.__mro__[1]


def run(argv: Sequence[str] | None = None) -> int:
    """Run the program on `argv` (this process's arguments where None) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _tolerate_any_encoding()
    try:
        return _exit_code(_invoke(arguments))
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("\n")  # the terminal shows ^C where the cursor was
        return INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return 0
    except Exception as error:  # noqa: BLE001 - the last line of defence: no traceback unless it is asked for
        # A parse that fails knows no options yet, so --verbose is looked for by hand.
        return _report(error, Console(verbose="--verbose" in arguments))


def _report(error: Exception, console: Console) -> int:
    """Print an error and return its exit status."""
    if isinstance(error, LyraError):
        console.error(str(error), error.hint)
        return error.exit_code
    if isinstance(error, _UsageError):
        if type(error).__name__ == "NoArgsIsHelpError":
            console.say(error.format_message())
        else:
            console.error(error.format_message(), f"{_usage_of(error)} --help lists the options")
        return USAGE
    return _report_unexpected(error, console)


def _invoke(arguments: list[str]) -> Any:
    command = typer.main.get_command(app)
    return command.main(args=arguments, prog_name=_program_name(), standalone_mode=False)


def _exit_code(result: Any) -> int:
    with writing_output():
        sys.stdout.flush()
    return result if isinstance(result, int) else 0


def _program_name() -> str:
    name = Path(sys.argv[0]).name
    return name if name in _PROGRAM_NAMES else "lyra.py"


def _usage_of(error: Any) -> str:
    context = error.ctx
    if context is None or context.info_name == _DEFAULT_COMMAND:
        return _program_name()
    return str(context.command_path)


def _report_unexpected(error: Exception, console: Console) -> int:
    if console.verbose:
        import traceback

        console.say("".join(traceback.format_exception(error)).rstrip())
    text = str(error) or "no message"
    console.error(
        f"unexpected {type(error).__name__}: {text}",
        "" if console.verbose else "run it again with --verbose to see where, and report it with that output",
    )
    return FAILED


def _tolerate_any_encoding() -> None:
    """Print a question mark for what the terminal's encoding lacks instead of failing in the middle of an answer."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def _forget_stdout() -> None:
    """Let the interpreter's last flush of a closed pipe go nowhere instead of printing an error."""
    try:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
    except (OSError, ValueError):
        return
    os.close(descriptor)


def _write_options(parameters: list[Any], context: Any, formatter: Any) -> None:
    """Write options as one table, a line each."""
    rows = []
    for parameter in parameters:
        record = parameter.get_help_record(context)
        if record is not None and parameter.param_type_name == "option":
            # typer appends the range to the text ("[x>=1]"); an error names it where it matters.
            rows.append((record[0], record[1].partition("  [")[0].replace("Show this", "show this").rstrip(".")))
    with formatter.section("Options"):
        formatter.write_dl(rows)


class _Command(TyperCommand):
    """A command whose help is plain text that fits 80 columns."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, a line each."""
        _write_options(self.get_params(ctx), ctx, formatter)


class _Program(TyperGroup):
    """The whole program: a first word that is a command runs it, any other first word belongs to the chat."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command's name first, wherever among the options it stood."""
        return super().parse_args(ctx, self._routed(args))

    def invoke(self, ctx: Any) -> Any:
        """Run the command; typer would turn Ctrl-C and a closed pipe into exits of its own."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Abort from None
        except BrokenPipeError:
            _forget_stdout()
            return 0

    def _routed(self, args: list[str]) -> list[str]:
        valued = self._options_with_value()
        position = 0
        while position < len(args):
            word = args[position]
            if word in {"--help", "--version"}:
                return [word]
            if word == "--":
                break
            if not word.startswith("-") or word == "-":
                if word in self.commands:
                    return [word, *args[:position], *args[position + 1 :]]
                break
            position += 2 if word in valued else 1
        if "--help" in args[position:] and "--" not in args:
            return ["--help"]
        return [_DEFAULT_COMMAND, *args]

    def _options_with_value(self) -> set[str]:
        return {
            name
            for command in self.commands.values()
            for parameter in command.params
            if parameter.param_type_name == "option" and not getattr(parameter, "is_flag", False)
            for name in parameter.opts
        }

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page of `--help`: how to call it, the chat's options, the commands."""
        name = ctx.command_path
        formatter.write(f"Usage: {name} [OPTIONS] [PROMPT]   or   {name} COMMAND [OPTIONS]\n\n")
        formatter.write((self.help or "").strip() + "\n")
        _write_options([*self.commands[_DEFAULT_COMMAND].params, *self.get_params(ctx)], ctx, formatter)
        with formatter.section("Commands"):
            rows = [(key, command.get_short_help_str(70).rstrip(".")) for key, command in self.commands.items()]
            formatter.write_dl([row for row in rows if row[0] != _DEFAULT_COMMAND])


app = typer.Typer(
    cls=_Program,
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
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", metavar="NAME", help="what to compute in: bfloat16, float16, float32")
]
EightBitOption = Annotated[bool, typer.Option("--8bit", help="layers packed to 8 bits")]
FourBitOption = Annotated[bool, typer.Option("--4bit", help="layers packed to 4 bits")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="debug lines, with each fallback step")]


@app.callback()
def program(
    *,
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version and leave")
    ] = False,
) -> None:
    """Hold the program's own options."""


@app.command(_DEFAULT_COMMAND, cls=_Command)
def chat_command(
    *,
    words: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...")] = None,
    model: ModelOption = None,
    model_config: ModelConfigOption = None,
    max_memory: MaxMemoryOption = None,
    context: ContextOption = None,
    journal: Annotated[
        Path | None,
        typer.Option(
            "--journal",
            metavar="PATH",
            help="the journal [your own, else the sample]",
        ),
    ] = None,
    rerank: Annotated[bool, typer.Option("--rerank", help="order the found entries again by a closer look")] = False,
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
    as_json: Annotated[bool, typer.Option("--json", help="print answer, sources, statistics and plan as JSON")] = False,
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
    )
    console = Console(verbose=verbose)
    prompt = " ".join(words) if words else None
    if prompt is None and _is_terminal_stdin(console):
        from lyra_emergence.cli.chat import run_chat

        return run_chat(options, console)
    from lyra_emergence.cli.ask import run_ask

    return run_ask(prompt, options, console)


@app.command("plan", cls=_Command)
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
    as_json: Annotated[bool, typer.Option("--json", help="the plan as JSON")] = False,
    verbose: VerboseOption = False,
) -> int:
    """Show where each layer would go, without loading."""
    from lyra_emergence.cli.plan import PlanRequest, run_plan

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
    return run_plan(options, request, Console(verbose=verbose))


@app.command("bench", cls=_Command)
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


@app.command("doctor", cls=_Command)
def doctor_command(
    *,
    model: ModelOption = None,
    model_config: ModelConfigOption = None,
    journal: Annotated[Path | None, typer.Option("--journal", metavar="PATH", help="the journal to check")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the findings as JSON")] = False,
    verbose: VerboseOption = False,
) -> int:
    """Check this installation, and say what the bundled model is."""
    from lyra_emergence.cli.doctor import run_doctor

    options = Options(model=model, model_config=model_config, journal=journal, json=as_json)
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
