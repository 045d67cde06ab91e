"""The chat's commands, settings, conversations and rendering, on a tiny model and on scripted answers."""

from __future__ import annotations

import io
import json
import re
import signal
import stat
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyra_emergence.chunks import Chunk, GenerationOptions, GenerationStats
from lyra_emergence.cli import main
from lyra_emergence.cli.answers import View
from lyra_emergence.cli.behind import LoadFailed, ModelBehind
from lyra_emergence.cli.chat import SLASH_COMMANDS, Chat
from lyra_emergence.cli.commands import suggestions
from lyra_emergence.cli.console import Console
from lyra_emergence.cli.editor import EmptyInterrupt, PlainReader, TypedReader, is_open, unquoted
from lyra_emergence.cli.keeping import Keeping
from lyra_emergence.cli.markdown import BlockSplitter, MarkdownStream
from lyra_emergence.cli.options import Options
from lyra_emergence.cli.placed import placement_text, weight_shares
from lyra_emergence.cli.prepare import prepare
from lyra_emergence.cli.settings import SETTINGS, Settings, change
from lyra_emergence.conversations import ConversationStore, open_store
from lyra_emergence.errors import ConfigError, ConversationError, DoesNotFitError, LyraError
from lyra_emergence.journal import open_journal
from lyra_emergence.load_report import LoadEvent

from .test_chat import Loaded
from .test_cli import ENTRIES, QUESTION, Terminal, console_on, lines
from .tokenizers_for_tests import TURNS, byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lyra_emergence.journal import JournalIndex

    from .simulated_accelerator import SimulatedAccelerator


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")


class Scripted:
    """A ready and open model that answers with the next of its texts, a word at a time."""

    model_id = title = "the script"
    passages = 2

    def __init__(self, answers: list[str], journal: JournalIndex | None = None) -> None:
        from lyra_emergence.speaker import LocalSpeaker

        self.journal = journal
        self.options = GenerationOptions(max_new_tokens=100)
        self.answers = answers
        self.asked: list[GenerationOptions] = []
        self.closed = False
        self.speaker = LocalSpeaker(Loaded(byte_tokenizer(TURNS), 4096), self.stream)

    def stream(self, _loaded: Any, _prompt: list[int], options: GenerationOptions) -> Iterator[Chunk]:
        self.asked.append(options)
        words = self.answers.pop(0).split(" ")
        for word in words:
            yield Chunk(word if word == words[0] else f" {word}", (0,))
        yield Chunk("", (0,), "stop", GenerationStats(40, 11, 0.5, 0.25, reused_tokens=8))

    def summary(self) -> str:
        return "the script: nothing to load"

    def open(self, _on_event: Callable[[LoadEvent], None]) -> Scripted:
        return self

    def placement(self) -> str:
        return "48% GPU / 52% CPU"

    def plan_lines(self, _console: Console) -> Iterator[str]:
        yield "layers 0 cccc"

    def as_data(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def journal(tmp_path: Path) -> JournalIndex:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(ENTRIES))
    return open_journal(path)


@pytest.fixture
def store() -> Iterator[ConversationStore]:
    opened = open_store(print)
    assert opened is not None
    with opened:
        yield opened


def chat_on(script: Scripted, console: Console | None = None, store: ConversationStore | None = None) -> Chat:
    return Chat(script, console or console_on(), lambda: script, keeping=Keeping(store))


def shown(chat: Chat, *typed: str) -> str:
    """What a chat writes to stderr for lines typed into it, spaces made one."""
    assert chat.run(lines(*typed)) == 0
    return " ".join(chat.console.stderr.getvalue().split())


# --- commands ---------------------------------------------------------------------------------------------------------


def test_every_documented_command_is_there() -> None:
    names = {name for command in SLASH_COMMANDS for name in command.names}
    documented = "/help /clear /regen /undo /system /set /sources /plan /stats /save /load /exit"
    assert names >= set(documented.split())


def test_answering_again_samples_and_replaces(store: ConversationStore) -> None:
    script = Scripted(["One.", "Two.", "Three."])
    chat = chat_on(script, store=store)
    assert shown(chat, "First?", "/regen", "/set seed 4", "/set temperature 0.3", "/regen").count("error") == 0
    assert [(o.do_sample, o.temperature, o.seed) for o in script.asked] == [
        (False, 1.0, None),
        (True, 0.7, None),
        (True, 0.3, 5),
    ]
    assert chat.console.stdout.getvalue() == "One.\nTwo.\nThree.\n"
    assert [turn.answer.text for turn in chat.session.turns] == ["Three."]
    assert [turn.answer.text for turn in store.turns(store.latest()[0])] == ["Three."]
    assert not script.options.do_sample


def test_there_is_nothing_to_answer_again_take_back_or_save() -> None:
    assert shown(chat_on(Scripted([])), "/regen", "/undo", "/save", "/load") == (
        "error: there is no question to answer again hint: type a question There is nothing to take back. "
        "There is nothing to save yet. No conversation is kept yet."
    )


def test_undo_says_what_it_took_back(store: ConversationStore) -> None:
    chat = chat_on(Scripted(["One."]), store=store)
    assert shown(chat, "First \x1b[31mquestion?", "/undo") == "Taken back: First question?"
    assert chat.session.turns == ()
    assert store.latest() == []


def test_the_system_message() -> None:
    script = Scripted(["One."])
    chat = chat_on(script)
    assert shown(chat, "/system", "/system Answer briefly.", "Why?", "/system off") == (
        "There is no system message. System message: Answer briefly. There is no system message."
    )


def test_settings_are_listed_changed_and_refused() -> None:
    chat = chat_on(Scripted([]))
    text = shown(chat, "/set", "/set temperature 0.5", "/set top_k -1", "/set tempratur 1", "/set seed x")
    for name in SETTINGS:
        assert name in text
    assert "temperature 0.5 0 for the likeliest words" in text
    assert "error: top_k cannot be '-1' hint: it is how many likely words to draw from, 0 for all" in text
    assert "error: there is no setting tempratur hint: did you mean temperature?" in text
    assert "error: seed cannot be 'x'" in text


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0", "0"),
        ("temperature", "0.25", "0.25"),
        ("max_new_tokens", "17", "17"),
        ("top_p", "0.9", "0.9"),
        ("top_k", "40", "40"),
        ("repetition_penalty", "1.2", "1.2"),
        ("max_repeats", "3", "3"),
        ("seed", "7", "7"),
        ("seed", "off", "off"),
        ("passages", "6", "6"),
        ("markdown", "off", "off"),
    ],
)
def test_each_setting_takes_its_values(name: str, text: str, value: str) -> None:
    changed = change(Settings(GenerationOptions(), 4, View()), name, text)
    assert SETTINGS[name].show(changed) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("temperature", text) for text in ("-1", "nan", "inf", "101", "")),
        *(("top_p", text) for text in ("0", "1.5", "nan")),
        *(("max_new_tokens", text) for text in ("0", "1.5", "9" * 30)),
        *(("repetition_penalty", text) for text in ("0", "-2")),
        *(("passages", text) for text in ("-1", "51")),
        ("markdown", "maybe"),
    ],
)
def test_no_setting_takes_another_one(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} cannot be "):
        change(Settings(GenerationOptions(), 4, View()), name, text)


def test_stats(store: ConversationStore) -> None:
    chat = chat_on(Scripted(["One."]), store=store)
    before = shown(chat, "/stats")
    assert "context 4096 tokens conversation" in before
    text = shown(chat, "First?", "/stats").removeprefix(before)
    identifier = store.latest()[0].id
    assert text.strip() == (
        "model the script: nothing to load placement 48% GPU / 52% CPU turns 1 "
        "context 51 of 4096 tokens used by the last answer prompt 40 tokens, 8 of them kept from before "
        "first token after 0.50 s answer 11 tokens, 40 a second "
        f"conversation {identifier}, continued by --conversation {identifier}"
    )


def test_saving_and_loading_files(tmp_path: Path, journal: JournalIndex, store: ConversationStore) -> None:
    chat = chat_on(Scripted(["By the south wall [1].", "Yes."], journal), store=store)
    text = shown(
        chat, QUESTION, "/system Be brief.", "/save talk.json", "/save talk.json", "/save talk.md", "/save no/x"
    )
    assert "Saved to talk.json, readable by you only. error: talk.json is there already" in text
    assert "error: no/x cannot be written: no such file or directory" in text
    assert stat.S_IMODE((tmp_path / "talk.json").stat().st_mode) == 0o600
    assert (tmp_path / "talk.md").read_text() == (
        f"## {QUESTION}\n\nBy the south wall [1].\n\n- [1] 2025-03-02 · Garden plans\n"
    )
    saved = chat.session.turns
    other = chat_on(Scripted(["Yes."]), store=store)
    assert "Loaded 1 turn from talk.json." in shown(other, "/load talk.json", "Certain?")
    assert other.session.turns[0] == saved[0]
    assert other.session.system == "Be brief."
    assert [turn.question for turn in store.turns(store.latest()[0])] == [QUESTION, "Certain?"]
    shown(other, "/undo", "/undo")
    assert [one.title for one in store.latest(5)] == [QUESTION]


@pytest.mark.parametrize("content", ["[", "{}", "[]", '{"format": "lyra.conversation/1"}', "[" * 100_000, None])
def test_a_file_that_holds_no_conversation_changes_nothing(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    chat = chat_on(Scripted(["One."]))
    assert "error: x.json " in shown(chat, "First?", "/load x.json")
    assert len(chat.session.turns) == 1


def test_loading_a_kept_conversation(store: ConversationStore) -> None:
    shown(chat_on(Scripted(["One.", "Two."]), store=store), "First?", "/clear", "Second?")
    second, first = store.latest(5)
    chat = chat_on(Scripted(["Three."]), store=store)
    text = shown(chat, "/load", f"/load {first.id}", "Third?", "/load nothing")
    assert text == (
        f"{second.id} 1 turn Second? {first.id} 1 turn First? /load ID goes on with one. "
        f"conversation {first.id}, 1 turn so far > First? One. "
        "error: there is no conversation nothing hint: /load in a chat lists the latest"
    )
    assert [turn.question for turn in store.turns(store.find(first.id))] == ["First?", "Third?"]


def test_tab_offers_commands_and_their_arguments(store: ConversationStore) -> None:
    chat = chat_on(Scripted(["One."]), store=store)
    shown(chat, "First?")

    def offered(text: str) -> tuple[int, list[str]]:
        length, found = suggestions(chat, text)
        return length, [word for word, _ in found]

    assert offered("/s") == (2, ["/system", "/set", "/sources", "/stats", "/save"])
    assert offered("/set t") == (1, ["temperature", "top_p", "top_k"])
    assert offered("/set markdown ") == (0, ["on", "off"])
    assert offered("/load 2") == (1, [store.latest()[0].id])
    assert offered("/system o") == (1, ["off"])
    assert offered("hello /s") == (0, [])


# --- what is typed ----------------------------------------------------------------------------------------------------


def test_several_lines_between_quotes() -> None:
    assert [is_open(text) for text in ['"""', '"""a', '"""a\n"""', '""""""', "a"]] == [True, True, False, False, False]
    assert unquoted(' """ a\nb """ ') == "a\nb"
    assert unquoted(' a "" ') == 'a ""'
    console = console_on('"""\nFirst line\nsecond\n"""\nnext\n')
    reader = PlainReader(console)
    assert unquoted(reader.read()) == "First line\nsecond"
    assert reader.read() == "next\n"
    assert console.stderr.getvalue() == "> . . . > "


def typed(keys: str, then: str = "", **kwargs: Any) -> str:
    """What is read when `keys` are typed, and `then` a moment later."""
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as pipe:
        reader = TypedReader(console_on(), keys=pipe, screen=DummyOutput(), **kwargs)
        pipe.send_text(keys)
        later = threading.Timer(1.5, lambda: pipe.send_text(then))
        later.start()
        try:
            return reader.read()
        finally:
            later.cancel()


def test_enter_within_quotes_goes_on() -> None:
    assert typed('"""one\rtwo"""\r') == '"""one\ntwo"""'
    assert typed("one\x1b\rtwo\r") == "one\ntwo"


def test_what_is_pasted_stays_whole() -> None:
    assert typed("\x1b[200~one\r\ntwo\n\x1b[201~\r") == "one\ntwo\n"


def test_tab_completes() -> None:
    chat = chat_on(Scripted([]))
    assert typed("/reg\t", "\r", suggest=lambda text: suggestions(chat, text)) == "/regen"


def test_ctrl_r_searches_the_history(home: Path) -> None:
    from lyra_emergence.cli.editor import history_path

    history_path().write_text("\n# 2025-01-01\n+about the lemon\n\n# 2025-01-02\n+about the rain\n")
    assert typed("\x12lemon\r\r") == "about the lemon"
    assert home in history_path().parents


def test_nothing_is_kept_if_that_is_asked_for(home: Path) -> None:
    assert typed("a secret\r", keep_history=False) == "a secret"
    assert not list(home.rglob("chat_history"))


def test_ctrl_g_opens_the_editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "my editor"
    script.write_text(f"#!{sys.executable}\nimport sys\nopen(sys.argv[1], 'a').write(' and more')\n")
    script.chmod(0o700)
    monkeypatch.setenv("VISUAL", f"'{script}'")
    assert typed("a question\x07", "\r") == "a question and more"


# --- a model behind the prompt ----------------------------------------------------------------------------------------


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


class Slow(Scripted):
    """A model that loads until it is let go, and fails where it has an error."""

    def __init__(self, answers: list[str], error: BaseException | None = None) -> None:
        super().__init__(answers)
        self.go_on = threading.Event()
        self.error = error

    def open(self, on_event: Callable[[LoadEvent], None]) -> Scripted:
        on_event(LoadEvent("promote", "a layer", 10, 20))
        on_event(LoadEvent("rung-failed", "full: out of memory"))
        on_event(LoadEvent("demote", "2 blocks go back"))
        assert self.go_on.wait(30)
        if self.error is not None:
            raise self.error
        return self


def test_the_prompt_is_there_while_the_model_loads_and_the_question_waits() -> None:
    slow = Slow(["One."])
    console = Console(stdin=io.StringIO(), stdout=io.StringIO(), stderr=Terminal(), environ={"NO_COLOR": "1"})
    behind = ModelBehind(slow, console)
    chat = Chat(slow, console, behind.wait, loading=behind)
    chat.welcome()
    assert console.stderr.getvalue().startswith("the script: nothing to load\nno journal")
    behind.start()
    while "10 B of 20 B" not in chat.status_line():
        time.sleep(0.01)
    assert chat.status_line() == "the script · loading the model 10 B of 20 B"
    assert "out of memory" not in console.stderr.getvalue()
    threading.Timer(0.3, slow.go_on.set).start()
    assert chat.run(lines("First?")) == 0
    err = console.stderr.getvalue()
    assert "\rloading the model 10 B of 20 B..." in err
    assert "warning: full: out of memory; 2 blocks go back\n" in err
    assert console.stdout.getvalue() == "One.\n"
    assert chat.status_line() == "the script · 48% GPU / 52% CPU · context 51/4096 · 40 tok/s"


def test_ctrl_c_while_the_question_waits_keeps_the_chat_and_the_load() -> None:
    slow = Slow(["One."])
    console = Console(stdin=io.StringIO(), stdout=io.StringIO(), stderr=Terminal(), environ={"NO_COLOR": "1"})
    behind = ModelBehind(slow, console)
    chat = Chat(slow, console, behind.wait, loading=behind)

    def press() -> None:
        until(lambda: "loading the model" in console.stderr.getvalue())
        signal.raise_signal(signal.SIGINT)
        until(lambda: "(stopped)" in console.stderr.getvalue())
        slow.go_on.set()

    threading.Thread(target=press).start()
    assert chat.run(lines("First?", "Second?")) == 0
    assert "(stopped)" in console.stderr.getvalue()
    assert [turn.question for turn in chat.session.turns] == ["Second?"]


def test_a_model_that_cannot_be_loaded_ends_the_chat_with_its_error() -> None:
    error = DoesNotFitError("too large", needed=2, available=1)
    slow = Slow([], error)
    behind = ModelBehind(slow, console_on())
    slow.go_on.set()
    with pytest.raises(LoadFailed) as caught:
        Chat(slow, console_on(), behind.wait).run(lines("First?"))
    assert caught.value.error is error


def test_a_prompt_is_given_up_when_the_load_fails() -> None:
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    slow = Slow([], LyraError("no such model"))
    behind = ModelBehind(slow, console_on())
    with create_pipe_input() as pipe:
        reader = TypedReader(console_on(), keys=pipe, screen=DummyOutput(), status=lambda: "x")
        reader.on_shown = behind.start
        reader.broken = lambda: behind.error is not None
        behind.on_change = reader.wake
        threading.Timer(0.5, slow.go_on.set).start()
        with pytest.raises(EOFError):
            reader.read()
    assert str(behind.error) == "no such model"


def test_ctrl_c_just_before_a_prompt_and_on_its_way_out_is_no_traceback(
    capfd: pytest.CaptureFixture[str],
) -> None:
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as pipe:
        reader = TypedReader(console_on(), keys=pipe, screen=DummyOutput())
        reader._interrupt()  # what a signal calls, here before the prompt is there
        with pytest.raises(EmptyInterrupt):
            reader.read()
        pipe.send_text("half a question\x03\x03")
        with pytest.raises(KeyboardInterrupt):
            reader.read()
        with pytest.raises(EmptyInterrupt):  # the second key was for the next prompt
            reader.read()
        pipe.send_text("whole\r")
        assert reader.read() == "whole"
    assert "Exception" not in "".join(capfd.readouterr())


# --- the status line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        ({"GPU": 48, "CPU": 52}, "48% GPU / 52% CPU"),
        ({"CPU": 7}, "100% CPU"),
        ({"GPU": 1, "CPU": 1_000_000}, "1% GPU / 99% CPU"),
        ({"GPU": 1, "CPU": 1, "disk": 1}, "34% GPU / 33% CPU / 33% disk"),
        ({}, ""),
    ],
)
def test_placement_in_percents_that_make_100(shares: dict[str, int], text: str) -> None:
    assert placement_text(shares) == text


def test_shares_follow_the_blocks() -> None:
    from types import SimpleNamespace

    plan: Any = SimpleNamespace(
        placements=[
            SimpleNamespace(block=name, device=device, weights=weights)
            for name, device, weights in [("a", "cuda:0", 10), ("b", "cuda:1", 20), ("c", "cpu", 30), ("d", "disk", 40)]
        ]
    )
    assert weight_shares(plan) == {"GPU": 30, "CPU": 30, "disk": 40}
    now = {"a": "cpu", "b": "cuda:1", "c": "cpu", "d": "cpu"}
    assert weight_shares(plan, now) == {"GPU": 20, "CPU": 40, "disk": 40}


def test_a_model_on_two_devices_says_so_and_follows_its_blocks(
    sim: SimulatedAccelerator, checkpoints: Callable[[str], Path]
) -> None:
    console = console_on()
    prepared = prepare(Options(model=str(checkpoints("llama")), max_memory=("0=100%",)), console)
    opened = prepared.open(lambda _: None)
    try:
        assert opened.placement() == "100% GPU"
        opened.loaded.residency.step_down("sim:0", 1)
        assert re.fullmatch(r"\d+% GPU / \d+% CPU", opened.placement())
    finally:
        opened.close()
    assert sim is not None


@pytest.mark.parametrize("width", [20, 40, 80])
def test_the_status_line_fits_and_drops_the_name_first(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    console = Console(stdin=io.StringIO(), stdout=Terminal(), stderr=Terminal(), environ={})
    chat = chat_on(Scripted(["One."]), console)
    chat.run(lines("First?"))
    line = chat.status_line()
    assert len(line) < width
    assert line.endswith("40 tok/s")
    assert ("the script" in line) is (width == 80)


# --- markdown ---------------------------------------------------------------------------------------------------------


def rendered(text: str, width: int = 60, piece: int = 3, **environ: str) -> str:
    """What a terminal without colors shows of an answer at its end."""
    stdout = Terminal()
    console = Console(stdin=io.StringIO(), stdout=stdout, stderr=Terminal(), environ={"NO_COLOR": "1", **environ})
    stream = MarkdownStream(console)
    for start in range(0, len(text), piece):
        stream.feed(text[start : start + piece])
    stream.close()
    return settled(stdout.getvalue())


def settled(written: str) -> str:
    """Play what was written on a screen of lines: cursor up, erase, and text."""
    screen: list[str] = [""]
    row = 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\n|\r|[^\x1b\n\r]+", written):
        if token == "\n":
            row += 1
            if row == len(screen):
                screen.append("")
        elif token == "\r":
            pass
        elif token == "\x1b[2K":
            screen[row] = ""
        elif token.endswith("A"):
            row -= int(token[2:-1])
        elif not token.startswith("\x1b"):
            screen[row] += token
    return "\n".join(line.rstrip() for line in screen).strip("\n")


def test_markdown_is_rendered() -> None:
    text = "# Garden\n\nWe **planted** `basil`\nand peas [1].\n\n- one\n- two\n\n```py\nx = [1]\n\ny\n```\n"
    shown_ = rendered(text)
    assert "**" not in shown_
    assert "`" not in shown_
    assert "We planted basil\nand peas [1]." in shown_
    assert " • one\n • two" in shown_
    assert "x = [1]" in shown_


def test_what_would_hide_something_stays_text() -> None:
    text = "See [the bank](http://evil) and <b>bold</b> and ![x](y).\n\n[1]: Garden plans\n"
    shown_ = rendered(text)
    assert "the bank (http://evil)" in shown_
    assert "<b>bold</b>" in shown_
    assert "[1]: Garden plans" in shown_
    assert "\x1b]8" not in shown_


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_it_does_not_matter_how_an_answer_arrives(piece: int) -> None:
    text = "One.\n\n1. first\n\n   more of it\n2. second\n\nEnd of it all " + "word " * 40
    assert rendered(text, piece=piece) == rendered(text, piece=5)


@given(st.text(alphabet="ab`~\n -#", max_size=80), st.lists(st.integers(0, 80), max_size=5))
def test_splitting_loses_nothing(text: str, cuts: list[int]) -> None:
    splitter = BlockSplitter()
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    blocks = [block for i in range(len(bounds) - 1) for block in splitter.feed(text[bounds[i] : bounds[i + 1]])]
    whole = "".join([*blocks, splitter.rest])
    assert whole.split() == text.split()
    whole_splitter = BlockSplitter()
    assert blocks == whole_splitter.feed(text)


def test_an_answer_longer_than_the_screen_is_whole_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "10")
    text = "\n".join(f"line {number}" for number in range(40))
    assert rendered(text, piece=50) == text


# --- options ----------------------------------------------------------------------------------------------------------


def test_no_stream_prints_the_same_at_once(journal: JournalIndex) -> None:
    script = Scripted(["By the south wall [1]."], journal)
    console = console_on()
    chat = Chat(script, console, lambda: script, view=View(stream=False))
    chat.run(lines(QUESTION))
    assert console.stdout.getvalue() == "By the south wall [1].\n\n[1] 2025-03-02 · Garden plans\n"


def test_the_end_of_a_run_closes_the_file_of_its_conversations() -> None:
    store = open_store(print)
    assert store is not None
    with pytest.raises(LyraError, match="broken"), Keeping(store):
        raise LyraError("broken")
    with pytest.raises(ConversationError, match="closed database"):
        store.latest()


def test_conversations_continue_from_one_run_to_the_next(
    capsys: pytest.CaptureFixture[str], checkpoints: Callable[[str], Path]
) -> None:
    model = str(checkpoints("llama"))
    capsys.readouterr()

    def ask(*arguments: str) -> dict[str, Any]:
        assert main(["--json", "--model", model, "--max-new-tokens", "4", *arguments]) == 0
        data: dict[str, Any] = json.loads(capsys.readouterr().out)
        return data

    first = ask("Hello one")
    assert first["conversation"] is not None
    second = ask("-c", "Hello two")
    assert second["conversation"] == first["conversation"]
    assert second["stats"]["prompt_tokens"] > first["stats"]["prompt_tokens"]
    assert ask("--no-log", "Hello three")["conversation"] is None
    other = ask("Hello four")["conversation"]
    assert ask("--conversation", first["conversation"], "Hello five")["conversation"] == first["conversation"]
    with open_store(print) or pytest.fail("no store") as store:
        kept = {one.id: [turn.question for turn in store.turns(one)] for one in store.latest(9)}
    assert kept == {first["conversation"]: ["Hello one", "Hello two", "Hello five"], other: ["Hello four"]}
    placement = first["placement"]
    assert (placement["text"], list(placement["weight_bytes"])) == ("100% CPU", ["CPU"])
    assert set(first["timings"]) == {
        "load_seconds",
        "answer_seconds",
        "prefill_seconds",
        "decode_seconds",
        "tokens_per_second",
    }
    assert first["citations"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["-c", "--no-log"], 2, "--no-log keeps no conversation that could be continued"),
        (["-c"], 1, "there is no conversation to continue yet"),
        (["--conversation", "x"], 1, "there is no conversation x"),
    ],
)
def test_a_conversation_that_is_not_there_is_an_error_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, error: str
) -> None:
    assert main([*arguments, "hi"]) == code
    assert capsys.readouterr().err.startswith(f"error: {error}\n")


def test_offline_is_heeded_as_the_variable_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert main(["--offline", "--model", "no/such-model", "hi"]) == 1
    assert "no/such-model is not on this machine, and HF_HUB_OFFLINE forbids" in capsys.readouterr().err


def test_options_default_to_a_kept_streaming_conversation() -> None:
    options = Options()
    assert (options.stream, options.no_log, options.continue_last, options.offline) == (True, False, False, False)
    assert replace(options, no_log=True).no_log
