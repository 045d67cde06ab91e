"""The real program in a real terminal, used as a person uses it: keys sent, panes captured."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .standin_hub import StandInHub
from .standin_server import StandInServer
from .tmux import MISSING, Tmux

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

pytestmark = pytest.mark.skipif(MISSING, reason="tmux is not installed")

ROOT = Path(__file__).parents[2]
LYRA = (sys.executable, str(ROOT / "lyra.py"))
QUESTION = "Who dug up a basil plant?"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")


def lyra(
    directory: Path, *arguments: str, columns: int = 80, rows: int = 24, environ: Mapping[str, str] | None = None
) -> Tmux:
    return Tmux([*LYRA, *arguments], directory, columns=columns, rows=rows, environ=environ)


def server(*pieces: str, fault: str | None = None) -> StandInServer:
    return StandInServer(list(pieces), fault=fault)  # type: ignore[arg-type]


def test_a_conversation_with_the_bundled_model(tmp_path: Path) -> None:
    with lyra(tmp_path, rows=40) as terminal:
        screen = terminal.ready()
        assert "Ask a question. /help lists the commands, Ctrl-D leaves." in screen
        terminal.type(QUESTION, "Enter")
        screen = terminal.wait_for(r"^\[1\] 2025-05-12 · Planting day", 120)  # kernels are compiled the first time
        assert "Biscuit dug up one basil plant and looked proud of it [1]." in screen
        assert re.search(r"the bundled model · 100% CPU · context \d+/1024 · \d+ tok/s", terminal.wait_for("tok/s"))
        terminal.type("/sources", "Enter")
        terminal.wait_for("The tomatoes are out: four Black Krim")
        terminal.type("/st", "Tab")
        terminal.wait_for("^> /stats")
        terminal.type("Enter")
        terminal.wait_for(r"conversation +\d{4}-\d\d-\d\d-[0-9a-f]{4}, continued by --conversation")
        terminal.ready()
        terminal.type("C-d")
        terminal.wait_for("^status 0$")


def test_the_prompt_is_there_before_the_model_and_what_is_typed_waits_for_it(tmp_path: Path) -> None:
    with lyra(tmp_path) as terminal:
        screen = terminal.wait_for("^>")
        assert "100% CPU" not in screen
        terminal.type(QUESTION, "Enter")
        terminal.wait_for("loading the model|^Biscuit", 120)
        terminal.wait_for("^Biscuit dug up one basil plant", 120)
        terminal.wait_for("100% CPU")


def test_ctrl_c_takes_back_a_question_that_waits_for_the_model(tmp_path: Path) -> None:
    with lyra(tmp_path) as terminal:
        terminal.wait_for("^>")
        terminal.type("When is the last frost?", "Enter")
        terminal.wait_for(r"^loading the model|^compiling")
        terminal.type("C-c")
        terminal.wait_for(r"^\(stopped\)")
        terminal.ready()
        terminal.type(QUESTION, "Enter")
        screen = terminal.wait_for("^Biscuit dug up one basil plant", 120)
        assert "^C" not in screen
        assert "[1]" not in screen.partition("(stopped)")[0]


def test_leaving_while_the_model_loads(tmp_path: Path) -> None:
    with lyra(tmp_path) as terminal:
        terminal.ready()
        terminal.type("C-d")
        screen = terminal.wait_for("^status 0$")
        assert "100% CPU" not in screen
        assert "Traceback" not in screen


def test_ctrl_c_at_an_empty_prompt_hints_and_then_leaves_with_130(tmp_path: Path) -> None:
    with server() as stand_in, lyra(tmp_path, "--endpoint", stand_in.url) as terminal:
        terminal.ready()
        terminal.type("half a question", "C-c")
        terminal.ready()
        terminal.type("C-c")
        terminal.wait_for("Press Ctrl-C again or Ctrl-D to leave.")
        terminal.ready()
        terminal.type("C-c")
        terminal.wait_for("^status 130$")


def test_ctrl_c_stops_an_answer_keeps_what_came_and_never_the_program(tmp_path: Path) -> None:
    with server("The heron ", "came", fault="hanging") as stand_in:
        with lyra(tmp_path, "--endpoint", stand_in.url) as terminal:
            terminal.ready()
            terminal.type("Tell me a long story.", "Enter")
            terminal.wait_for("^The heron came$")
            terminal.type("C-c")
            screen = terminal.wait_for(r"\(stopped\)")
            assert "^C" not in screen
            stand_in.fault = None
            stand_in.pieces = ["Noon."]
            terminal.type("And then?", "Enter")
            terminal.wait_for("^Noon.$")
            terminal.ready()
            terminal.type("C-d")
            terminal.wait_for("^status 0$")
        sent = [message["content"] for message in stand_in.asked[1]["messages"]]
        assert sent[:2] == ["Tell me a long story.", "The heron came"]
        assert sent[2].endswith("And then?")


def test_ctrl_c_before_a_word_came(tmp_path: Path) -> None:
    with server(fault="silent") as stand_in, lyra(tmp_path, "--endpoint", stand_in.url) as terminal:
        terminal.ready()
        terminal.type("Are you there?", "Enter")
        while not stand_in.asked:
            time.sleep(0.02)
        terminal.type("C-c")
        terminal.wait_for(r"^\(stopped\)\n\n>")


def test_a_killed_chat_goes_on_where_it_was(tmp_path: Path) -> None:
    with server("The heron ", "came", fault="hanging") as stand_in:
        with lyra(tmp_path, "--endpoint", stand_in.url) as terminal:
            terminal.ready()
            terminal.type("Tell me a long story.", "Enter")
            terminal.wait_for("^The heron came$")
            terminal.type("C-c")
            terminal.wait_for(r"\(stopped\)")
            os.kill(terminal.process("lyra.py"), signal.SIGKILL)
            terminal.wait_for("^status 137$")
        with lyra(tmp_path, "-c", "--endpoint", stand_in.url) as terminal:
            screen = terminal.ready()
            assert re.search(r"conversation \S+, 1 turn so far\n> Tell me a long story.\nThe heron came\n", screen)


def test_an_answer_that_a_kill_cuts_off_is_kept_as_far_as_it_came(tmp_path: Path) -> None:
    with server("The heron ", fault="hanging") as stand_in:
        with lyra(tmp_path, "--endpoint", stand_in.url) as terminal:
            terminal.ready()
            terminal.type("Tell me a long story.", "Enter")
            terminal.wait_for("^The heron")
            os.kill(terminal.process("lyra.py"), signal.SIGKILL)
            terminal.wait_for("^status 137$")
        with lyra(tmp_path, "-c", "--endpoint", stand_in.url) as terminal:
            assert "1 turn so far\n> Tell me a long story.\nThe heron\n" in terminal.ready()


def test_several_lines_and_the_history_of_an_earlier_chat(tmp_path: Path) -> None:
    with server("Yes.") as stand_in:
        with lyra(tmp_path, "--endpoint", stand_in.url) as terminal:
            terminal.ready()
            terminal.type('"""one', "Enter", 'two"""', "Enter")
            terminal.wait_for("^Yes.$")
            terminal.type("a lemon tree", "Enter")
            terminal.wait_for("(?s)^Yes.$.*^Yes.$")
            terminal.ready()
            terminal.type("C-d")
            terminal.wait_for("^status 0$")
        assert stand_in.asked[0]["messages"][-1]["content"].endswith("one\ntwo")
        with lyra(tmp_path, "--endpoint", stand_in.url) as terminal:
            terminal.ready()
            terminal.type("C-r", "lemon")
            terminal.wait_for("a lemon tree")
            terminal.type("Enter", "Enter")
            terminal.wait_for("^Yes.$")
        assert stand_in.asked[-1]["messages"][-1]["content"].endswith("a lemon tree")


def test_the_editor_writes_a_question(tmp_path: Path) -> None:
    editor = tmp_path / "edit"
    editor.write_text("#!/bin/sh\nprintf 'written elsewhere' > \"$1\"\n")
    editor.chmod(0o700)
    with (
        server("Yes.") as stand_in,
        lyra(tmp_path, "--endpoint", stand_in.url, environ={"EDITOR": str(editor), "VISUAL": ""}) as terminal,
    ):
        terminal.ready()
        terminal.type("C-g")
        terminal.wait_for("^> written elsewhere")
        terminal.type("Enter")
        terminal.wait_for("^Yes.$")


MARKDOWN = (
    "# Plans\n\nSow **basil** on:\n\n- Monday, which is the first warm day of all\n- Tuesday\n\n> as `she` said [1]\n"
)


@pytest.mark.parametrize("columns", [80, 40])
def test_markdown_and_help_at_any_width(tmp_path: Path, columns: int) -> None:
    with (
        server(*re.findall(".{1,4}", MARKDOWN, re.DOTALL)) as stand_in,
        lyra(tmp_path, "--endpoint", stand_in.url, columns=columns, rows=60) as terminal,
    ):
        before = terminal.ready()
        terminal.type("When did I plan the garden?", "Enter")
        screen = terminal.wait_for(r"^\[1\] \d{4}-")
        assert "**" not in screen
        assert "•" in screen
        terminal.type("/help", "Enter")
        screen = terminal.wait_for(r"^ +Ctrl-D\s+leave\s*\n>")
        # tmux breaks a line that is too long in the middle of a word; no line that we break ends so.
        words = set(re.findall(r"[a-z-]+", screen))
        assert {"conversation", "otherwise", "questions", "commands", "passages", "placement"} <= words
        assert {"commands", "leaves"} <= set(re.findall("[a-z]+", before))


def test_no_color_where_it_is_not_wanted(tmp_path: Path) -> None:
    color = r"\x1b\[(?:[0-9]+;)*(?:3[0-8]|9[0-7]|4[0-8])[;m]"
    for environ, wanted in [({}, True), ({"NO_COLOR": "1"}, False)]:
        with (
            server(MARKDOWN) as stand_in,
            lyra(tmp_path, "--endpoint", stand_in.url, rows=50, environ=environ) as terminal,
        ):
            terminal.ready()
            terminal.type("When did I plan the garden?", "Enter")
            terminal.wait_for(r"^\[1\] \d{4}-")
            terminal.type("/sytem", "Enter")
            terminal.wait_for("there is no command")
            assert bool(re.search(color, terminal.screen(colors=True))) is wanted


def test_a_terminal_that_knows_ascii_alone(tmp_path: Path) -> None:
    with (
        server("Cafe at **noon** [1], caf\u00e9 at night.") as stand_in,
        lyra(tmp_path, "--endpoint", stand_in.url, rows=50, environ={"LC_ALL": "C"}) as terminal,
    ):
        terminal.ready()
        terminal.type("When did I plan the garden?", "Enter")
        screen = terminal.wait_for(r"^\[1\] \d{4}-\d\d-\d\d - ")
        assert "Cafe at **noon** [1], caf? at night." in screen
        terminal.type("/help", "Enter")
        terminal.wait_for(r"^ +Ctrl-D +leave$")
        assert terminal.screen(history=True).isascii()


def test_wide_signs_keep_to_the_width(tmp_path: Path) -> None:
    text = "\u65e5\u672c\u8a9e " * 20 + "\n\n- \u0645\u0631\u062d\u0628\u0627 [1]\n"
    with (
        server(*re.findall(".{1,5}", text, re.DOTALL)) as stand_in,
        lyra(tmp_path, "--endpoint", stand_in.url, columns=40, rows=40) as terminal,
    ):
        terminal.ready()
        terminal.type("When did I plan the garden?", "Enter")
        screen = terminal.wait_for(r"^\[1\] \d{4}-")
        shown = [line for line in screen.splitlines() if "\u65e5" in line or "\u672c" in line]
        assert len(shown) == 4
        assert all(line.split() == ["\u65e5\u672c\u8a9e"] * len(line.split()) for line in shown)


def test_a_terminal_of_another_script(tmp_path: Path) -> None:
    """Greek, which has no sign for a bullet: Markdown stays as written, and what cannot be shown is a question mark."""
    with (
        server("- \u03ba\u03b1\u03bb\u03ae **noon** \u65e5 [1]") as stand_in,
        lyra(tmp_path, "--endpoint", stand_in.url, rows=40, environ={"PYTHONIOENCODING": "iso-8859-7"}) as terminal,
    ):
        terminal.wait_for("^>")
        terminal.type("When did I plan the garden?", "Enter")
        screen = terminal.wait_for(r"^\[1\] \d{4}-")
        assert "**noon** ? [1]" in screen
        assert "Traceback" not in screen


def test_a_server_that_fails_is_said_and_the_chat_goes_on(tmp_path: Path) -> None:
    with server("Yes.", fault="busy") as stand_in, lyra(tmp_path, "--endpoint", stand_in.url) as terminal:
        terminal.ready()
        terminal.type("Are you there?", "Enter")
        terminal.wait_for("takes no more requests for now: slow")
        stand_in.fault = None
        terminal.type("/regen", "Enter")
        terminal.wait_for("there is no question to answer again")
        terminal.type("And now?", "Enter")
        terminal.wait_for("^Yes.$")


def test_a_model_that_cannot_be_loaded_ends_the_chat(tmp_path: Path) -> None:
    with StandInServer() as stand_in:
        url = stand_in.url
    with lyra(tmp_path, "--endpoint", url) as terminal:
        screen = terminal.wait_for("^status 1$")
        assert "cannot be reached" in screen
        assert "hint: check that the server runs, and the host and port" in screen


def test_a_person_is_asked_before_a_download_and_sees_it_come(
    tmp_path: Path, checkpoints: Callable[[str], Path]
) -> None:
    (tmp_path / "model_config.json").write_text('{"model_id": "owner/tiny", "pipeline_kwargs": {"max_new_tokens": 4}}')
    with StandInHub() as hub:
        hub.add("owner/tiny", checkpoints("llama"))
        with lyra(tmp_path, rows=40, environ=hub.environment(tmp_path / "hf")) as terminal:
            screen = terminal.wait_for(r"^Which\? \[b\]")
            assert re.search(r"^owner/tiny \(.*names it\) is not on this machine\.$", screen, re.MULTILINE)
            assert re.search(r"^  d  download it now: \S+ [kM]B in \d files$", screen, re.MULTILINE)
            assert re.search(r"^     free on that disk: \S+ GB$", screen, re.MULTILINE)
            assert not any("resolve" in path for _, path in hub.requests)
            terminal.type("d", "Enter")
            terminal.ready()
            screen = terminal.screen(history=True)
            assert "note: downloading owner/tiny: " in screen
            terminal.type("Hello?", "Enter")
            terminal.wait_for(r"owner/tiny .* 100% CPU .* context \d+/256", 120)
            terminal.ready()
            terminal.type("C-d")
            terminal.wait_for("^status 0$")


# --- in a shell, without a terminal -----------------------------------------------------------------------------------


def shell(command: str, directory: Path) -> subprocess.CompletedProcess[str]:
    line = command.replace("LYRA", " ".join(LYRA))
    return subprocess.run(["bash", "-c", line], cwd=directory, capture_output=True, text=True, check=False)


def test_piped_text_comes_before_the_prompt_and_stdout_has_the_answer_alone(tmp_path: Path) -> None:
    with server("**Flour** [9].") as stand_in:
        done = shell(f"printf 'eggs\\n' | LYRA --endpoint {stand_in.url} 'What is missing?' > out; cat out", tmp_path)
    assert done.stdout == "**Flour** [9].\n"
    assert "warning: the answer cites [9], which the journal search did not find\n" in done.stderr
    assert stand_in.asked[0]["messages"][-1]["content"].endswith("eggs\n\nWhat is missing?")


def test_an_interrupted_answer_in_a_shell_is_exit_130_and_can_be_continued(tmp_path: Path) -> None:
    with server("The heron ", "came", fault="hanging") as stand_in:
        command = [*LYRA, "--endpoint", stand_in.url, "A story?"]
        with subprocess.Popen(
            command,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as child:
            assert child.stdout is not None
            came = b""
            while len(came) < len("The heron came"):
                came += os.read(child.stdout.fileno(), 100)
            child.send_signal(signal.SIGINT)
            rest, err = child.communicate(timeout=30)
        assert (child.returncode, came + rest) == (130, b"The heron came\n"), err
        stand_in.fault = None
        done = shell(f"LYRA -c --endpoint {stand_in.url} 'And?' < /dev/null", tmp_path)
        assert done.returncode == 0, done.stderr
        sent = [message["content"] for message in stand_in.asked[1]["messages"]]
        assert sent[:2] == ["A story?", "The heron came"]
        assert sent[2].endswith("And?")


def test_a_server_that_breaks_off_is_exit_1_after_what_came(tmp_path: Path) -> None:
    with server("The heron ", "came", fault="cut off") as stand_in:
        done = shell(f"LYRA --endpoint {stand_in.url} 'A story?' < /dev/null", tmp_path)
    assert (done.returncode, done.stdout) == (1, "The heron came\n")
    assert done.stderr.endswith("the answer breaks off\nhint: check that it speaks OpenAI's chat protocol\n")
