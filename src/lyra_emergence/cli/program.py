"""The program as typer has it: which words are a command and which a prompt, and what `--help` shows."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["DEFAULT_COMMAND", "Command", "Program", "forget_stdout"]

DEFAULT_COMMAND: Final = "chat"
_FOREMOST: Final = (
    *("--model", "--model-config", "--max-memory", "--context", "--journal", "--rerank"),
    *("--endpoint", "--continue", "--offline", "--json"),
)
"""Options of the chat that the page of `--help` has room for."""


def forget_stdout() -> None:
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


class Command(TyperCommand):
    """A command whose help is plain text that fits 80 columns."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, a line each."""
        _write_options(self.get_params(ctx), ctx, formatter)


class Program(TyperGroup):
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
            forget_stdout()
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
        return [DEFAULT_COMMAND, *args]

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
        chat = self.commands[DEFAULT_COMMAND].params
        foremost = [parameter for parameter in chat if set(_FOREMOST).intersection(parameter.opts)]
        formatter.write(f"Usage: {name} [OPTIONS] [PROMPT]   or   {name} COMMAND [OPTIONS]\n\n")
        formatter.write((self.help or "").strip() + "\n")
        _write_options([*foremost, *(p for p in self.get_params(ctx) if "--help" in p.opts)], ctx, formatter)
        formatter.write(f"  More: {name} {DEFAULT_COMMAND} --help\n")
        with formatter.section("Commands"):
            rows = [(key, command.get_short_help_str(70).rstrip(".")) for key, command in self.commands.items()]
            formatter.write_dl([row for row in rows if row[0] != DEFAULT_COMMAND])
