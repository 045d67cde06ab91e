"""Answers from a server: against a stand-in on loopback, through the library and through the program."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from lyra_emergence.chat import ChatSession
from lyra_emergence.chunks import GenerationOptions
from lyra_emergence.cli import main
from lyra_emergence.endpoint import Endpoint, Messages, ServedModel, is_loopback
from lyra_emergence.errors import ConfigError, EndpointError
from lyra_emergence.event_stream import events

from .standin_server import StandInServer
from .test_chat import ask, index

if TYPE_CHECKING:
    from .standin_server import Fault

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


def talk(server: StandInServer, **kwargs: object) -> ChatSession:
    return ChatSession(Endpoint(server.url, model="tiny"), index("Heron at noon."), **kwargs)


def test_an_answer_streams_and_cites_the_same_journal() -> None:
    with StandInServer(["", " The heron ", "came [1].\n"]) as server:
        chat = talk(server, system="Be brief.", options=GenerationOptions(max_new_tokens=99, seed=3, stop=("END",)))
        chunks = list(chat.ask("When did the heron come?"))
    assert [chunk.text for chunk in chunks] == ["The heron ", "came [1].\n", ""]
    answer = chunks[-1].answer
    assert answer is not None
    assert answer.text == "The heron came [1]."
    assert [source.entry_id for source in answer.cited] == ["0"]
    assert (answer.stats.prompt_tokens, answer.stats.new_tokens) == (21, 7)
    assert answer.finish_reason == "stop"
    (body,) = server.asked
    assert (body["model"], body["temperature"], body["max_tokens"], body["seed"]) == ("tiny", 0, 99, 3)
    assert (body["stream"], body["stop"]) == (True, ["END"])
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert "[1] 2025-03-01 · Heron\nHeron at noon.\n\nQuestion: When did" in body["messages"][1]["content"]
    assert "authorization" not in server.headers[0]


def test_earlier_turns_go_along() -> None:
    with StandInServer(["Noon [1]."]) as server:
        chat = talk(server)
        ask(chat, "heron?")
        ask(chat, "Certain?")
    roles = [(m["role"], m["content"]) for m in server.asked[1]["messages"]]
    assert roles == [("user", "heron?"), ("assistant", "Noon."), ("user", "Certain?")]


def test_a_server_that_does_not_stream() -> None:
    with StandInServer(["Noon."], streams=False, finish_reason="length") as server:
        answer = ask(talk(server), "heron?")
    assert (answer.text, answer.finish_reason, answer.stats.prompt_tokens) == ("Noon.", "length", 21)


def test_sampling_is_asked_for() -> None:
    with StandInServer() as server:
        ask(talk(server, options=GenerationOptions(do_sample=True, temperature=0.5, top_p=0.9)), "heron?")
    assert (server.asked[0]["temperature"], server.asked[0]["top_p"]) == (0.5, 0.9)


@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        ("unauthorized", "{url} denies access (HTTP 401): Incorrect API key provided: \x1b[31mno", "set LYRA_ENDPOINT"),
        ("missing", "{url} has no such model or path (HTTP 404): Not Found", "name a model with --model"),
        ("busy", "{url} takes no more requests for now: slow down", "wait 17 seconds"),
        ("failing", "{url} failed (HTTP 503): Loading model", "look at the server's own log"),
        ("too long", "{url} refuses (HTTP 400): the request exceeds the available context size", "a prompt too long?"),
        ("elsewhere", "{url} sends us on to http://203.0.113.1/v1", "give that URL"),
        ("no json", "{url} does not answer as expected: it sends something that is no JSON", "check that it speaks"),
        ("no answer", "{url} does not answer as expected: its answers have another form than OpenAI's", "check that"),
        ("endless event", "the server sends an event without an end", "check that it is a chat server"),
    ],
)
def test_each_failure_has_its_message_and_remedy(fault: Fault, message: str, hint: str) -> None:
    with StandInServer(fault=fault) as server:
        chat = talk(server)
        with pytest.raises(EndpointError) as caught:
            list(chat.ask("heron?"))
        assert str(caught.value) == message.format(url=server.url)
        assert caught.value.hint.startswith(hint)
        assert chat.turns == ()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("error in the stream", "{url} refuses: the GPU is gone"),
        ("cut off", "{url} does not answer as expected: the answer breaks off"),
    ],
)
def test_what_came_before_a_failure_is_kept(fault: Fault, message: str) -> None:
    with StandInServer(["The heron", " came"], fault=fault) as server:
        chat = talk(server)
        with pytest.raises(EndpointError) as caught:
            list(chat.ask("heron?"))
        assert str(caught.value) == message.format(url=server.url)
    assert [(turn.answer.text, turn.answer.finish_reason) for turn in chat.turns] == [("The heron came", "interrupted")]


def test_a_server_that_is_not_there() -> None:
    with StandInServer() as server:
        url = server.url
    with pytest.raises(EndpointError) as caught:
        list(ChatSession(Endpoint(url)).ask("heron?"))
    assert str(caught.value).startswith(f"{url} cannot be reached: ")
    assert caught.value.hint == "check that the server runs, and the host and port"


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080/v1"),
        ("127.0.0.1:8080/", "http://127.0.0.1:8080/v1"),
        ("https://host/api/v3/", "https://host/api/v3"),
        ("http://[::1]:1/v1/chat/completions", "http://[::1]:1/v1"),
    ],
)
def test_urls(url: str, base: str) -> None:
    assert Endpoint(url).url == base


@pytest.mark.parametrize("url", ["ftp://host/v1", "http://", "http://host:port/v1", "http://me:secret@host/v1", ""])
def test_what_is_no_url_of_a_server(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^--endpoint: ") as caught:
        Endpoint(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "here"),
    [("http://localhost/v1", True), ("http://127.0.0.9/v1", True), ("http://[::1]/v1", True), ("http://h/v1", False)],
)
def test_what_is_this_machine(url: str, here: bool) -> None:
    assert is_loopback(url) is here


def test_models_and_their_contexts() -> None:
    listed = [{"id": "a", "max_model_len": 512}, {"id": "b", "meta": {"n_ctx": 99}}, {"id": "c", "n_ctx": "no"}]
    with StandInServer(models=listed) as server:
        assert Endpoint(server.url).models() == [ServedModel("a", 512), ServedModel("b", 99), ServedModel("c", None)]
    with StandInServer(fault="no json") as server, pytest.raises(EndpointError, match="lists no models in OpenAI's"):
        Endpoint(server.url).models()


def test_a_prompt_is_fitted_by_an_estimate_of_its_tokens() -> None:
    assert len(Messages(({"role": "user", "content": "x" * 30},))) == 18
    assert len(Messages(({"role": "user", "content": "日本"},))) == 10
    with StandInServer() as server:
        chat = ChatSession(Endpoint(server.url, model="m", context=100), options=GenerationOptions(max_new_tokens=25))
        for _ in range(4):
            answer = ask(chat, "x" * 60)
        assert answer.notes == ("2 earlier turns left out: the context has 100 tokens",)
        with pytest.raises(Exception, match="the question takes"):
            chat.ask("x" * 300)


# --- server-sent events -----------------------------------------------------------------------------------------------


def test_events() -> None:
    stream = b": hi\ndata: one\r\n\r\nevent: x\ndata:two\ndata: three\n\nid: 4\n\ndata: last"
    assert list(events([stream])) == [b"one", b"two\nthree", b"last"]


@given(st.lists(st.binary(max_size=6).map(lambda b: b.replace(b"\r", b"").replace(b"\n", b"")), max_size=6), st.data())
def test_events_do_not_depend_on_how_they_arrive(values: list[bytes], data: st.DataObject) -> None:
    end = data.draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
    stream = b"".join(b"data: " + value + end + end for value in values)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    bounds = [0, *cuts, len(stream)]
    parts = [stream[start:stop] for start, stop in itertools.pairwise(bounds)]
    assert list(events(parts)) == values


# --- the program ------------------------------------------------------------------------------------------------------


def test_one_answer_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYRA_ENDPOINT_KEY", "a-secret")
    with StandInServer(["By noon."], key="a-secret", models=[{"id": "tiny", "max_model_len": 2048}]) as server:
        assert main(["--json", "--endpoint", server.url, "heron?"]) == 0
        out, err = capsys.readouterr()
        data = json.loads(out)
        assert (data["answer"], data["model"]["id"], data["plan"]) == ("By noon.", server.url, None)
        assert data["placement"] == {"text": f"tiny at {server.url}"}
        assert data["endpoint"] == {"url": server.url, "model": "tiny"}
        assert {header["authorization"] for header in server.headers} == {"Bearer a-secret"}
    assert "a-secret" not in out + err
    assert "note: asking tiny at" in err


def test_a_wrong_key_is_said_without_the_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LYRA_ENDPOINT_KEY", "wrong")
    with StandInServer(key="right") as server:
        assert main(["--endpoint", server.url, "heron?"]) == 1
    err = capsys.readouterr().err
    assert err.endswith(
        f"error: {server.url} denies access (HTTP 401): Incorrect API key provided: no\n"
        "hint: check the key in LYRA_ENDPOINT_KEY\n"
    )


def test_several_models_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with StandInServer(models=[{"id": "a"}, {"id": "b"}]) as server:
        assert main(["--endpoint", server.url, "heron?"]) == 1
        assert f"error: {server.url} has 2 models: a, b\nhint: name one with --model\n" in capsys.readouterr().err
        assert main(["--endpoint", server.url, "--model", "b", "heron?"]) == 0
        assert server.asked[0]["model"] == "b"


def test_another_machine_is_named_and_offline_forbids_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What --offline changes in this process is set back behind the test.
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "0"))
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", os.environ.get("TRANSFORMERS_OFFLINE", "0"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
    assert main(["--offline", "--endpoint", "http://192.0.2.1/v1", "heron?"]) == 2
    assert capsys.readouterr().err == (
        "error: --offline forbids to ask http://192.0.2.1/v1\nhint: leave one of the two out\n"
    )


@pytest.mark.parametrize("searches", [False, True])
def test_torch_is_imported_for_a_server_only_to_search_by_meaning(tmp_path: Path, searches: bool) -> None:
    journal = tmp_path / "journal.json"
    entry = {"id": "1", "timestamp": "2025-03-01", "text": "A heron stood at the bend."}
    journal.write_text(json.dumps([entry] * searches))
    code = "import sys; from lyra_emergence.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    with StandInServer(["Yes."]) as server:
        done = subprocess.run(
            [sys.executable, "-c", code, "--endpoint", server.url, "--journal", str(journal), "heron?"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=True,
        )
    assert done.stdout == f"Yes.\n0 {searches}\n", done.stderr
