"""The program, used as a person and a script use it."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import pty
import select
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyra_emergence.cli import main
from lyra_emergence.cli.ask import compose_prompt, read_piped
from lyra_emergence.cli.chat import SLASH_COMMANDS, Chat, line_reader
from lyra_emergence.cli.console import Console, ControlStripper, WordWrapper, strip_controls
from lyra_emergence.cli.editor import EmptyInterrupt, history_path
from lyra_emergence.cli.options import Options
from lyra_emergence.cli.prepare import LocalModel, choose_on_terminal, loaded_model, prepare
from lyra_emergence.cli.progress import LoadProgress
from lyra_emergence.errors import ConfigError
from lyra_emergence.hub import RemoteModel
from lyra_emergence.load_report import LoadEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lyra_emergence.cli.prepare import Prepared
    from lyra_emergence.loading import LoadedModel

    from .simulated_accelerator import SimulatedAccelerator

ROOT = Path(__file__).parents[2]
HINT = "hint: lyra.py --help lists the options\n"
QUESTION = "Where did we plant the lemon tree?"
ENTRIES = [
    {
        "id": "a",
        "timestamp": "2025-03-02T08:00:00",
        "title": "Garden \x1b[31mplans",
        "text": "We planted a lemon tree by the south wall.",
    },
    {"id": "b", "timestamp": "2025-03-05T08:00:00", "title": "Rain", "text": "It rained all day and we read."},
]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current directory, a standard input that is empty, and a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(ENTRIES))
    return path


@pytest.fixture
def model(checkpoints: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> str:
    directory = str(checkpoints("llama"))
    capsys.readouterr()  # transformers shows a bar while it writes the checkpoint
    return directory


def console_on(stdin: str = "", **environ: str) -> Console:
    return Console(stdin=io.StringIO(stdin), stdout=io.StringIO(), stderr=io.StringIO(), environ=environ)


# --- options, commands and errors -------------------------------------------------------------------------------------


def test_help_is_one_screen_of_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 27
    assert lines[0] == "Usage: lyra.py [OPTIONS] [PROMPT]   or   lyra.py COMMAND [OPTIONS]"
    for word in ["--model-config", "--journal", "--rerank", "--max-memory", "--context", "--json", "plan", "config"]:
        assert sum(line.strip().startswith(word) for line in lines) == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lyra 0.")


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (["What did I plant?"], "What did I plant?"),
        (["What", "did", "I", "plant?"], "What did I plant?"),
        (["--", "plan"], "plan"),
        (["plan my garden"], "plan my garden"),
        (["--model", "plan", "hello"], "hello"),
        (["--", "--help"], "--help"),
        (["--model=m", "hello", "--context", "64"], "hello"),
    ],
)
def test_what_is_no_command_is_the_prompt(monkeypatch: pytest.MonkeyPatch, arguments: list[str], prompt: str) -> None:
    asked = []
    monkeypatch.setattr("lyra_emergence.cli.ask.run_ask", lambda text, options, _: asked.append(text) or 0)
    assert main(arguments) == 0
    assert asked == [prompt]


@pytest.mark.parametrize("arguments", [["--context", "64", "plan", "m"], ["plan", "m", "--context", "64"]])
def test_options_stand_before_or_behind_a_command(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    seen = []
    monkeypatch.setattr("lyra_emergence.cli.plan.run_plan", lambda options, *_, **__: seen.append(options) or 0)
    assert main(arguments) == 0
    assert (seen[0].model, seen[0].context) == ("m", 64)


def test_every_option_reaches_the_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"max_memory": {"cpu": "16GB"}, "pipeline_kwargs": {"top_k": 5, "seed": 1}}')
    seen = []
    monkeypatch.setattr("lyra_emergence.cli.ask.run_ask", lambda _, options, __: seen.append(options) or 0)
    text = (
        "--model m --model-config c.json --max-memory 0=6GB --max-memory 1=90% --context 128 --journal j.json --rerank"
    )
    assert main([*text.split(), "--max-new-tokens", "9", "--temperature", "0.5", "--seed", "7", "--json", "hi"]) == 0
    options = seen[0]
    assert (options.journal, options.rerank, options.json) == (Path("j.json"), True, True)
    config = options.resolve().config
    assert (config.model_id, config.context_length) == ("m", 128)
    assert config.max_memory == {"0": "6GB", "1": "90%", "cpu": "16GB"}
    assert config.pipeline_kwargs == {
        "top_k": 5,
        "seed": 7,
        "max_new_tokens": 9,
        "do_sample": True,
        "temperature": 0.5,
    }


def test_temperature_0_is_greedy() -> None:
    assert Options(temperature=0.0).resolve().config.pipeline_kwargs == {"do_sample": False}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--qqq"], f"error: No such option: --qqq\n{HINT}"),
        (["hi", "--model"], f"error: Option '--model' requires an argument.\n{HINT}"),
        (
            ["plan", "a", "b"],
            "error: Got unexpected extra argument(s) (b)\nhint: lyra.py plan --help lists the options\n",
        ),
        ([], 'error: there is no prompt: standard input is empty\nhint: write: lyra.py "What did I plant?"\n'),
    ],
)
def test_bad_usage_is_exit_2(capsys: pytest.CaptureFixture[str], arguments: list[str], error: str) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == error


@pytest.mark.parametrize("arguments", [["--context", "zero", "hi"], ["--context", "0", "hi"], ["--seed", "x", "hi"]])
def test_a_value_of_the_wrong_kind_is_exit_2_and_names_its_option(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: Invalid value for '{arguments[0]}': ")
    assert err.endswith(HINT)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--max-memory", "6GB", "hi"], "'6GB' is not a device and its limit; write '0=6GB,cpu=16GB'"),
        (["--max-memory", "0=6Gb", "hi"], "'6Gb' is bits; write '6GB'"),
        (["--model-config", "none.json", "hi"], "none.json: no such file"),
    ],
)
def test_a_bad_configuration_is_exit_2_and_says_where(
    capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert problem in err
    assert "Traceback" not in err


def test_json_without_a_prompt_is_bad_usage_at_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main(["--json"]) == 2
    assert capsys.readouterr().err == (
        'error: --json prints one answer, but there is no prompt\nhint: write: lyra.py --json "..."\n'
    )


def test_a_missing_journal_is_an_error_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    assert main(["--model", model, "--journal", "gone.json", "hi"]) == 1
    assert capsys.readouterr().err == (
        "error: there is no journal at gone.json\nhint: check --journal; data/journal/sample.json shows the form\n"
    )


def test_an_unexpected_error_shows_its_traceback_only_when_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise KeyError("lost")

    monkeypatch.setattr("lyra_emergence.cli.plan.run_plan", fail)
    assert main(["plan"]) == 1
    assert capsys.readouterr().err == (
        "error: unexpected KeyError: 'lost'\n"
        "hint: run it again with --verbose to see where, and report it with that output\n"
    )
    assert main(["plan", "--verbose"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("error: unexpected KeyError: 'lost'\n")


def test_ctrl_c_is_exit_130_without_a_word(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("lyra_emergence.cli.plan.run_plan", interrupted)
    assert main(["plan"]) == 130
    assert capsys.readouterr().err == "\n"


def test_a_reader_that_leaves_in_the_middle_is_no_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object, **__: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("lyra_emergence.cli.plan.run_plan", closed)
    assert main(["plan"]) == 0
    assert capsys.readouterr() == ("", "")


def test_config_is_mounted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "validate"]) == 0
    assert capsys.readouterr().out == "ok: no file, all defaults\n"
    assert main(["config", "schma"]) == 2


# --- one answer -------------------------------------------------------------------------------------------------------


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    assert main(list(arguments)) == 0
    return capsys.readouterr()


def test_stdout_has_the_answer_and_nothing_else(capsys: pytest.CaptureFixture[str], model: str, journal: Path) -> None:
    out, err = ask(capsys, QUESTION, "--model", model, "--journal", str(journal), "--max-new-tokens", "8")
    text, _ = ask(capsys, "--json", QUESTION, "--model", model, "--journal", str(journal), "--max-new-tokens", "8")
    answer = json.loads(text)
    assert out == f"{answer['answer']}\n"
    assert err.splitlines()[0].startswith(f"note: loaded {model}: 789 kB of weights, on cpu, context 256")
    assert answer["model"] == {"id": model, "stands_in": False}
    assert answer["journal"] == str(journal)
    assert answer["stats"]["new_tokens"] <= 8
    assert answer["plan"]["rung"] == answer["load"]["rung"] == "cpu"
    assert [source["entry_id"] for source in answer["sources"]] == ["a"]
    assert "\x1b" not in text


def test_without_a_journal_the_model_answers_alone(
    capsys: pytest.CaptureFixture[str], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lyra_emergence.cli.prepare.SAMPLE_JOURNAL", Path("nowhere.json"))
    out, err = ask(capsys, "--json", "Hello", "--model", model, "--max-new-tokens", "4")
    answer = json.loads(out)
    assert (answer["journal"], answer["sources"]) == (None, [])
    assert "journal" not in err


def test_the_sample_journal_of_the_current_folder_is_used_and_named(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path, journal: Path
) -> None:
    sample = tmp_path / "data" / "journal" / "sample.json"
    sample.parent.mkdir(parents=True)
    journal.rename(sample)
    _, err = ask(capsys, "Hello", "--model", model, "--max-new-tokens", "4")
    assert "note: journal data/journal/sample.json, 2 entries\n" in err


def test_more_tokens_than_the_context_has_are_said_once(capsys: pytest.CaptureFixture[str], model: str) -> None:
    _, err = ask(capsys, "Hello", "--model", model, "--max-new-tokens", "4000")
    assert err.count("warning: max_new_tokens 4000 is more than the context of 256 tokens") == 1
    assert err.count("max_new_tokens") == 1


def test_piped_text_goes_before_the_prompt() -> None:
    assert compose_prompt("What is missing?\n", " eggs, flour\n") == "eggs, flour\n\nWhat is missing?"
    assert compose_prompt(None, "only piped\n") == "only piped"
    with pytest.raises(ConfigError, match=r"^there is no prompt: standard input is empty$"):
        compose_prompt(" ", "\n")


def test_an_endless_pipe_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lyra_emergence.cli.ask.MAX_INPUT_BYTES", 2**20)
    with pytest.raises(ConfigError, match=r"^standard input is larger than 1 MiB$"):
        read_piped(console_on("x" * (2**20 + 1)))
    assert read_piped(console_on("x" * 2**20)) == "x" * 2**20


def test_an_answer_ends_quietly_when_nobody_reads_it(tmp_path: Path) -> None:
    command = f"{sys.executable} -m lyra_emergence.cli config schema; echo status $? >&2"
    done = subprocess.run(
        ["bash", "-c", f"({command}) | head -c 1"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "{"
    assert done.stderr == "status 0\n"


def test_the_program_as_a_script_runs_it(model: str, tmp_path: Path, journal: Path) -> None:
    command = [sys.executable, str(ROOT / "lyra.py"), "--model", model, "--journal", str(journal), "--json"]
    command += ["--max-new-tokens", "8"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, input=QUESTION, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sources"][0]["title"] == "Garden plans"
    assert done.stderr.splitlines()[0].startswith("note: loaded ")


# --- loading ----------------------------------------------------------------------------------------------------------


def test_each_fallback_is_one_line() -> None:
    console = console_on()
    with LoadProgress(console) as progress:
        progress(LoadEvent("map", "tiny is open"))
        progress(LoadEvent("promote", "model.layers.0 is on cuda:0", 10, 20))
        progress(LoadEvent("rung-failed", "full: out of memory at model.layers.1"))
        progress(LoadEvent("demote", "2 blocks go back to the checkpoint's map"))
        progress(LoadEvent("ready", "ready on rung 'fallback' in 0.1 s"))
    assert console.stderr.getvalue() == (
        "warning: full: out of memory at model.layers.1; 2 blocks go back to the checkpoint's map\n"
    )


def test_a_failure_with_nothing_behind_it_is_still_told() -> None:
    console = console_on()
    with LoadProgress(console) as progress:
        progress(LoadEvent("rung-failed", "full: out of memory at model.layers.1"))
    assert console.stderr.getvalue() == "warning: full: out of memory at model.layers.1\n"


def test_verbose_tells_every_step() -> None:
    console = Console(verbose=True, stdin=io.StringIO(), stdout=io.StringIO(), stderr=io.StringIO(), environ={})
    with LoadProgress(console) as progress:
        progress(LoadEvent("map", "tiny is open"))
    assert console.stderr.getvalue().startswith("debug: ")
    assert console.stderr.getvalue().endswith(" s  map: tiny is open\n")


def test_a_person_is_asked_before_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lyra_emergence.cli.prepare.free_disk", lambda: 12_300_000_000)
    console = Console(stdin=io.StringIO("what\nd\n"), stdout=io.StringIO(), stderr=io.StringIO(), environ={})
    remote = RemoteModel("some/model", "abc", ("model.safetensors",), 5_560_000_000)
    assert choose_on_terminal(remote, Path("config.json"), console) == "download"
    assert console.stderr.getvalue() == (
        "some/model (config.json names it) is not on this machine.\n"
        "  d  download it now: 5.56 GB in 1 file\n"
        "     free on that disk: 12.3 GB\n"
        "  b  use the small bundled model this time\n"
        "Which? [b] Answer d or b.\n"
        "Which? [b] "
    )
    console = Console(stdin=io.StringIO(""), stdout=io.StringIO(), stderr=io.StringIO(), environ={})
    assert choose_on_terminal(remote, None, console) == "bundled"


# --- the chat ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prepared, LoadedModel]]:
    from .families import build_checkpoint

    directory = build_checkpoint("llama", tmp_path_factory.mktemp("chat") / "llama")
    console = console_on()
    prepared = prepare(Options(model=str(directory), max_new_tokens=12), console)
    with loaded_model(prepared, console) as model:
        yield prepared, model


def talk(loaded: tuple[Prepared, LoadedModel], journal: Path, pieces: list[str] | None = None) -> tuple[Chat, Console]:
    """Return a chat whose answers are `pieces`, or the model's own, and its console."""
    from dataclasses import replace

    from lyra_emergence.chat import ChatSession
    from lyra_emergence.generation import Chunk, GenerationOptions, GenerationStats
    from lyra_emergence.journal import open_journal

    def stream(*_: object) -> Iterator[Chunk]:
        for piece in pieces or []:
            if piece == "<ctrl-c>":
                signal.raise_signal(signal.SIGINT)
                continue
            yield Chunk(piece, (0,))
        yield Chunk("", (0,), "stop", GenerationStats(1, len(pieces or []), 0.1, 0.1))

    prepared, model = loaded
    index = open_journal(journal)
    console = console_on()
    options = GenerationOptions(max_new_tokens=12)
    session = ChatSession(model, index, options=options, stream=None if pieces is None else stream)
    opened = LocalModel(model, "the model")
    return Chat(replace(prepared, journal=index), console, lambda: opened, session=session), console


def lines(*typed: str | BaseException) -> Callable[[], str]:
    """Return a reader that gives `typed`, then Ctrl-D."""
    waiting = iter([*typed, EOFError()])

    def read() -> str:
        line = next(waiting)
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def test_an_answer_is_followed_by_the_sources_it_cites(loaded: tuple[Prepared, LoadedModel], journal: Path) -> None:
    chat, console = talk(loaded, journal, ["By the ", "south wall [1]."])
    assert chat.run(lines(QUESTION)) == 0
    assert console.stdout.getvalue() == "By the south wall [1].\n\n[1] 2025-03-02 · Garden plans\n"


def test_control_sequences_of_a_model_never_reach_the_terminal(
    loaded: tuple[Prepared, LoadedModel], journal: Path
) -> None:
    chat, console = talk(loaded, journal, ["safe \x1b", "[2J\x1b]0;own", "ed\x07 text\r\x9b1m"])
    chat.run(lines(QUESTION))
    assert console.stdout.getvalue() == "safe  text\n"


def test_a_citation_of_nothing_is_said(loaded: tuple[Prepared, LoadedModel], journal: Path) -> None:
    chat, console = talk(loaded, journal, ["It was so [7]."])
    chat.run(lines(QUESTION))
    assert "warning: the answer cites [7], which the journal search did not find\n" in console.stderr.getvalue()


def test_ctrl_c_stops_the_answer_keeps_what_came_and_goes_on(
    loaded: tuple[Prepared, LoadedModel], journal: Path
) -> None:
    chat, console = talk(loaded, journal, ["By the", "<ctrl-c>", " south", " wall [1]."])
    before = signal.getsignal(signal.SIGINT)
    assert chat.run(lines(QUESTION, "/exit")) == 0
    assert console.stdout.getvalue() == "By the south\n"
    assert "(stopped)\n" in console.stderr.getvalue()
    assert chat.session.last.finish_reason == "interrupted"
    assert chat.session.last.text == "By the south"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_a_step_that_hangs(loaded: tuple[Prepared, LoadedModel], journal: Path) -> None:
    chat, console = talk(loaded, journal, ["By", "<ctrl-c>", "<ctrl-c>", " never"])
    assert chat.run(lines(QUESTION)) == 0
    assert "never" not in console.stdout.getvalue()


def test_an_error_of_a_question_does_not_end_the_chat(loaded: tuple[Prepared, LoadedModel], journal: Path) -> None:
    chat, console = talk(loaded, journal)
    assert chat.run(lines("word " * 400, "/exit")) == 0
    assert "error: the question takes " in console.stderr.getvalue()


def test_the_model_itself_answers(loaded: tuple[Prepared, LoadedModel], journal: Path) -> None:
    chat, console = talk(loaded, journal)
    chat.run(lines(QUESTION))
    assert console.stdout.getvalue().strip() != ""
    assert len(chat.session.turns) == 1


def test_ctrl_c_twice_at_an_empty_prompt_leaves_with_130(loaded: tuple[Prepared, LoadedModel], journal: Path) -> None:
    chat, console = talk(loaded, journal, [])
    assert chat.run(lines(EmptyInterrupt(), EmptyInterrupt())) == 130
    assert console.stderr.getvalue() == "Press Ctrl-C again or Ctrl-D to leave.\n"


def test_ctrl_c_on_a_line_clears_it_and_does_not_count(loaded: tuple[Prepared, LoadedModel], journal: Path) -> None:
    chat, _ = talk(loaded, journal, [])
    assert chat.run(lines(EmptyInterrupt(), KeyboardInterrupt(), EmptyInterrupt(), "/help", EmptyInterrupt())) == 0


def test_the_commands(loaded: tuple[Prepared, LoadedModel], journal: Path) -> None:
    chat, console = talk(loaded, journal, ["By the south wall [1]."])
    assert chat.run(lines("/sources", QUESTION, "/sources", "/plan", "/clear", "/sorces", "/quit", "not reached")) == 0
    err = console.stderr.getvalue()
    assert err.startswith("No journal entry was given to the model for the last answer.\n")
    assert "[1] 2025-03-02 · Garden plans\n    We planted a lemon tree by the south wall.\n" in err
    assert "layers 0 cccc\n" in err
    assert "error: there is no command /sorces\nhint: did you mean /sources?\n" in err
    assert chat.session.turns == ()


def test_help_lists_every_command(loaded: tuple[Prepared, LoadedModel], journal: Path) -> None:
    chat, console = talk(loaded, journal, [])
    chat.run(lines("/help"))
    shown = console.stderr.getvalue()
    assert all(name in shown for command in SLASH_COMMANDS for name in command.names)


def test_the_line_editor_reads_lines_and_keeps_a_private_history(home: Path) -> None:
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as keys:
        read = line_reader(console_on(), keys=keys, screen=DummyOutput()).read
        keys.send_text("first question\r")
        assert read() == "first question"
        keys.send_text("\x1b[A\r")
        assert read() == "first question"
        keys.send_text("half\x03")
        with pytest.raises(KeyboardInterrupt) as caught:
            read()
        assert not isinstance(caught.value, EmptyInterrupt)
        keys.send_text("\x03")
        with pytest.raises(EmptyInterrupt):
            read()
        keys.send_text("\x04")
        with pytest.raises(EOFError):
            read()
    path = history_path()
    assert home in path.parents
    assert "+first question" in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_history_that_others_could_read_is_closed_to_them() -> None:
    history_path().chmod(0o644)
    assert stat.S_IMODE(history_path().stat().st_mode) == 0o600


def test_a_whole_chat_on_a_dumb_terminal(model: str, tmp_path: Path, journal: Path) -> None:
    environ = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "lyra.py"), "--model", model, "--journal", str(journal)]
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execve(command[0], command, environ)
    screen = Screen(terminal)
    try:
        screen.wait_for(b"Ctrl-D leaves.")
        screen.wait_for(b"> ")
        os.write(terminal, b"/help\r")
        screen.wait_for(b"list the commands")
        screen.wait_for(b"> ")
        os.write(terminal, b"Where is the lemon tree?\r")
        screen.wait_for(b"> ")
        os.write(terminal, b"\x04")
        _, status = os.waitpid(child, 0)
        child = 0
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(terminal)


class Screen:
    """What a pseudo-terminal shows, read up to one text after the other."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._unread = b""

    def wait_for(self, wanted: bytes, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while wanted not in self._unread:
            ready, _, _ = select.select([self._terminal], [], [], max(0.0, end - time.monotonic()))
            assert ready, self._unread.decode(errors="replace")
            self._unread += os.read(self._terminal, 65536)
        self._unread = self._unread.partition(wanted)[2]


# --- the console ------------------------------------------------------------------------------------------------------

DIRTY = st.lists(
    st.sampled_from(
        [
            "word",
            " ",
            "\n",
            "é",
            "\x1b[31m",
            "\x1b]0;title\x07",
            "\x1bP1q\x1b\\",
            "\x1b(B",
            "\r",
            "\x07",
            "\x9b2J",
            "\x1b",
        ]
    ),
    max_size=12,
).map("".join)


@given(DIRTY, st.lists(st.integers(0, 40), max_size=6))
def test_stripping_does_not_depend_on_how_text_arrives(text: str, cuts: list[int]) -> None:
    stripper = ControlStripper()
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
    streamed = "".join(stripper.feed(piece) for piece in pieces) + stripper.flush()
    assert streamed == strip_controls(text)
    assert not any(ord(character) < 32 and character not in "\n\t" for character in streamed)


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]0;title\x07text", "text"),
        ("a\x9b31mb\x9d0;t\x9cc", "abc"),
        ("one\rtwo\x08\x7f", "onetwo"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("abc\u202edef", "abcdef"),
        ("lone \x1b", "lone "),
    ],
)
def test_what_a_terminal_would_obey_is_removed(dirty: str, clean: str) -> None:
    assert strip_controls(dirty) == clean


def test_a_sequence_without_an_end_holds_back_a_bounded_amount() -> None:
    stripper = ControlStripper()
    shown = "".join(stripper.feed(piece) for piece in ["\x1b]0;", *["x" * 100] * 20])
    assert len(shown) > 1400


@given(st.text(alphabet="ab \n", max_size=200), st.integers(5, 30))
def test_wrapping_keeps_the_words_and_the_width(text: str, width: int) -> None:
    wrapper = WordWrapper(width)
    wrapped = "".join(wrapper.feed(character) for character in text) + wrapper.flush()
    assert wrapped.split() == text.split()
    longest = max((len(word) for word in text.split()), default=0)
    assert all(len(line.strip()) <= max(width, longest) for line in wrapped.split("\n"))


def test_wrapping_counts_wide_characters_as_two_columns() -> None:
    wrapper = WordWrapper(8)
    assert wrapper.feed("日本 日本 日本") + wrapper.flush() == "日本\n日本\n日本"


def test_notes_are_said_once() -> None:
    console = console_on()
    for _ in range(2):
        console.note("the same")
        console.warning("another")
    assert console.stderr.getvalue() == "note: the same\nwarning: another\n"


@pytest.mark.parametrize(
    ("stream", "environ", "colored"),
    [
        (Terminal, {"TERM": "xterm"}, True),
        (Terminal, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Terminal, {"TERM": "xterm", "NO_COLOR": ""}, True),
        (Terminal, {"TERM": "dumb"}, False),
        (io.StringIO, {"TERM": "xterm"}, False),
    ],
)
def test_color_is_for_terminals_whose_user_wants_it(
    stream: type[io.StringIO], environ: dict[str, str], colored: bool
) -> None:
    console = Console(stdin=io.StringIO(), stdout=io.StringIO(), stderr=stream(), environ=environ)
    console.error("wrong")
    assert ("\x1b[" in console.stderr.getvalue()) is colored


def test_long_messages_break_between_words_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = "in 'max_memory.0': '6Gb' is bits; write '6GB'\n  and a second line that is rather long too"
    terminal = Console(stdin=io.StringIO(), stdout=io.StringIO(), stderr=Terminal(), environ={"NO_COLOR": "1"})
    terminal.error(text)
    assert terminal.stderr.getvalue() == (
        "error: in 'max_memory.0': '6Gb' is bits;\n  write '6GB'\n  and a second line that is rather long\n    too\n"
    )
    piped = console_on()
    piped.error(text)
    assert piped.stderr.getvalue() == f"error: {text}\n"


def test_the_program_leaves_logging_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:]
    main(["--version"])
    assert logging.getLogger().handlers == before


def test_a_fallback_is_told_in_a_line_and_the_answer_comes(
    checkpoints: Callable[[str], Path], sim: SimulatedAccelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--model",
        str(checkpoints("llama")),
        "--max-new-tokens",
        "5",
        "--temperature",
        "0",
        "The river was high",
    ]
    assert main(arguments) == 0
    undisturbed = capsys.readouterr().out
    sim.fail_at(30)
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == undisturbed
    told = [line for line in err.splitlines() if "out of memory" in line]
    assert len(told) == 1
    assert "full: out of memory on sim:0 at model.layers." in told[0]
