"""The page without a browser: what is sent, who gets it, and what its routes tell."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

import lyra_emergence.server
from lyra_emergence.bundled import BUNDLED_PASSAGES, bundled_directory
from lyra_emergence.chat import ChatSession
from lyra_emergence.cli import main
from lyra_emergence.config import ModelConfig
from lyra_emergence.generation import GenerationOptions
from lyra_emergence.loading import load
from lyra_emergence.server.engine import Engine
from lyra_emergence.server.guard import Limits
from lyra_emergence.server.page import Page
from lyra_emergence.server.room import Room

from .serving import PacedLock, ServerProcess, sample_journal, served, story, told_events

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lyra_emergence.loading import LoadedModel

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]

ASSETS = Path(lyra_emergence.server.__file__).parent / "assets"
KEY = "a-secret-of-the-tests"
BASIL = "Who dug up a basil plant?"
PASSAGE = "Biscuit dug up one basil plant and looked proud of it."


@pytest.fixture(scope="module")
def loaded() -> Iterator[LoadedModel]:
    model = load(ModelConfig(device_map="cpu", cpu_kernels=False), directory=bundled_directory())
    model.step_lock = PacedLock()
    yield model
    model.close()


@pytest.fixture
def lock(loaded: LoadedModel) -> Iterator[PacedLock]:
    paced = loaded.step_lock
    assert isinstance(paced, PacedLock)
    yield paced
    paced.let_go()


@pytest.fixture
def engine(loaded: LoadedModel) -> Engine:
    return Engine(loaded, Room(loaded.context_length, 2, 1, "a test"), waiting=2)


@pytest.fixture
def http(loaded: LoadedModel, engine: Engine) -> Iterator[httpx.Client]:
    with served(loaded, engine, Limits(), journal=sample_journal()) as url, client(url) as made:
        yield made
    assert engine.join(30)


def client(url: str, **headers: str) -> httpx.Client:
    return httpx.Client(base_url=url.removesuffix("/v1"), headers=headers, timeout=60, trust_env=False)


def ask(http: httpx.Client, question: str, **fields: Any) -> list[tuple[str, Any]]:
    with http.stream("POST", "/lyra/chat", json={"question": question, **fields}) as response:
        assert response.status_code == 200, response.read()
        return list(told_events(response))


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_the_page_is_one_answer_with_a_strict_policy(http: httpx.Client) -> None:
    response = http.get("/")
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; "))
    hashes = {kind: policy.pop(f"{kind}-src") for kind in ("script", "style")}
    assert policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    for kind, named in hashes.items():
        (held,) = re.findall(rf"<{kind}[^>]*>(.*?)</{kind}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(held.encode()).digest()).decode()
        assert named == f"'sha256-{digest}'"
    for name, value in {
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
        "X-Frame-Options": "DENY",
    }.items():
        assert response.headers[name] == value


def test_the_page_names_nothing_outside_itself() -> None:
    html = Page().html.replace("http://www.w3.org/2000/svg", "")  # the name of a language, not an address
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|\bsrc=|srcset", html)
    assert set(re.findall(r'href="([^"]{,5})', html)) == {"data:", "#ques"}


def test_no_text_is_read_as_markup_and_no_style_or_handler_stands_in_it() -> None:
    scripts = "".join(path.read_text() for path in ASSETS.glob("*.js"))
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|\beval\b|Function\(", scripts)
    assert not re.findall(r"\sstyle=|\son[a-z]+=", (ASSETS / "page.html").read_text())
    assert sorted(path.name for path in ASSETS.iterdir()) == [
        "chat.js",
        "events.js",
        "main.js",
        "page.css",
        "page.html",
        "placement.js",
        "text.js",
    ]


def luminance(color: str) -> float:
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_have_the_contrast_of_wcag_aa(scheme: str) -> None:
    """Text 4.5 to 1 on all that it stands on; what has to be told from its ground 3 to 1 (WCAG 2.2, 1.4.3, 1.4.11)."""
    blocks = re.findall(r":root \{(.*?)\}", (ASSETS / "page.css").read_text(), re.DOTALL)
    colors = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", blocks[["light", "dark"].index(scheme)]))
    hues = ("green", "magenta", "cyan", "yellow", "blue", "grey")
    texts = [("ink", ground) for ground in ("paper", "card", "track", "new-card", "bad-card")]
    texts += [(text, ground) for text in ("quiet", "accent") for ground in ("paper", "card")]
    texts += [("quiet", "new-card"), ("quiet", "bad-card"), ("accent", "track"), ("accent", "bad-card")]
    texts += [("bad", "card"), ("bad", "bad-card"), ("on-accent", "accent"), *(("on-hue", hue) for hue in hues)]
    assert {pair: contrast(*map(colors.get, pair)) for pair in texts if contrast(*map(colors.get, pair)) < 4.5} == {}
    shapes = [(hue, ground) for hue in hues for ground in ("card", "track")] + [("grey", "paper")]
    assert {pair: contrast(*map(colors.get, pair)) for pair in shapes if contrast(*map(colors.get, pair)) < 3} == {}


# --- who gets it ------------------------------------------------------------------------------------------------------


def test_the_page_needs_no_key_and_what_it_asks_for_does(loaded: LoadedModel, engine: Engine) -> None:
    with served(loaded, engine, Limits(KEY)) as url, client(url) as http:
        assert http.get("/").status_code == 200
        for path in ("/lyra/placement", "/lyra/events?seconds=0"):
            assert http.get(path).status_code == 401
            assert http.get(path, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        response = http.post("/lyra/chat", json={"question": "Hi"})
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


def test_pages_of_other_sites_get_nothing_of_it(http: httpx.Client) -> None:
    foreign = {"Origin": "http://evil.example"}
    for path in ("/lyra/placement", "/lyra/events?seconds=0"):
        assert http.get(path, headers=foreign).status_code == 403
    assert http.post("/lyra/chat", json={"question": "Hi"}, headers=foreign).status_code == 403
    assert http.get("/", headers={"Host": "rebound.example"}).status_code == 403


# --- the chat ---------------------------------------------------------------------------------------------------------


def test_a_question_is_answered_as_in_the_chat(http: httpx.Client, loaded: LoadedModel) -> None:
    options = GenerationOptions.for_model(loaded)
    session = ChatSession(loaded, sample_journal(), options=options, passages=BUNDLED_PASSAGES)
    turns: list[dict[str, str]] = []
    for question in (BASIL, "And when was it?"):
        list(session.ask(question))
        expected = session.last
        assert expected is not None
        (first, found), *texts, (last, answer) = ask(http, question, turns=turns)
        assert (first, last, {name for name, _ in texts} - {"queued"}) == ("sources", "answer", {"text"})
        assert found["journal"] == "sample.json"
        assert [source["entry"] for source in found["sources"]] == [source.entry_id for source in expected.sources]
        assert [source["passage"] for source in found["sources"]] == [source.passage for source in expected.sources]
        assert "".join(data["text"] for name, data in texts if name == "text").rstrip() == expected.text
        assert answer["text"] == expected.text
        assert answer["citations"] == [source.number for source in expected.cited]
        assert answer["finish_reason"] == expected.finish_reason
        assert expected.stats is not None
        assert answer["usage"]["prompt_tokens"] == expected.stats.prompt_tokens
        assert answer["timings"]["recoveries"] == []
        turns.append({"question": question, "answer": answer["text"]})
    assert turns[0]["answer"] == f"{PASSAGE[:-1]} [1]."


def test_without_a_journal_it_chats_plainly(loaded: LoadedModel, engine: Engine) -> None:
    with served(loaded, engine, Limits()) as url, client(url) as http:
        (_, found), *_, (last, answer) = ask(http, "Hello", max_tokens=3)
        assert (found["journal"], found["sources"], last, answer["citations"]) == (None, [], "answer", [])
        assert answer["usage"]["completion_tokens"] <= 3
        assert http.get("/lyra/placement").json()["journal"] is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"question": "  "}, "the question is empty (type a question)"),
        ({"question": ""}, "'question': string should have at least 1 character"),
        ({"question": "word " * 2000}, "the question takes"),
        ({"question": "x", "model": "tiny"}, "'model' is not a field of such a request"),
        ({"question": "\ud800"}, "'question': input should be a valid string"),
        (
            {"question": "x", "turns": [{"question": "a", "answer": "\udc00"}]},
            "'turns.0.answer': the text holds half of a surrogate pair",
        ),
        ({"question": "x", "turns": [{"question": "a"}]}, "'turns.0.answer': field required"),
    ],
)
def test_questions_that_are_refused(body: dict[str, Any], message: str, http: httpx.Client) -> None:
    response = http.post("/lyra/chat", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(message)
    assert response.json()["error"]["hint"]


def test_who_waits_is_told_how_many_are_ahead(http: httpx.Client, engine: Engine, lock: PacedLock) -> None:
    lock.hold()
    body = {"question": BASIL}
    with http.stream("POST", "/lyra/chat", json=body) as first:
        running = told_events(first)
        assert next(running)[0] == "sources"
        while engine.figures().running == 0:
            threading.Event().wait(0.01)
        with (
            http.stream("POST", "/lyra/chat", json=body) as second,
            http.stream("POST", "/lyra/chat", json=body) as third,
        ):
            waiting, last = told_events(second), told_events(third)
            assert [next(waiting)[0], next(waiting)] == ["sources", ("queued", {"ahead": 0})]
            assert [next(last)[0], next(last)] == ["sources", ("queued", {"ahead": 1})]
            refused = http.post("/lyra/chat", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert int(refused.headers["Retry-After"]) >= 1
            while engine.figures().waiting == 2:  # the first ends, and the second gets no further than its beginning
                lock.hold(1)
                threading.Event().wait(0.01)
            lock.hold()
            assert next(last) == ("queued", {"ahead": 0})
            lock.let_go()
            told = list(last)
            assert [list(running)[-1][1]["text"], list(waiting)[-1][1]["text"]] == [told[-1][1]["text"]] * 2


def test_a_reader_who_leaves_stops_the_answer(http: httpx.Client, engine: Engine, lock: PacedLock) -> None:
    lock.hold(6)
    with http.stream("POST", "/lyra/chat", json={"question": BASIL}) as response:
        told = told_events(response)
        assert [name for name, _ in (next(told), next(told))] == ["sources", "text"]
    lock.let_go()
    while not engine.figures().ended:
        threading.Event().wait(0.01)
    assert engine.figures().ended == {"stopped": 1}


# --- where the model is -----------------------------------------------------------------------------------------------


def test_the_placement_is_the_plans(http: httpx.Client, loaded: LoadedModel) -> None:
    told = http.get("/lyra/placement").json()
    plan = loaded.plan
    assert (told["model"], told["rung"], told["context_length"]) == ("tiny", "cpu", plan.context_length)
    assert [device["device"] for device in told["devices"]] == [use.device for use in plan.devices]
    for device, use in zip(told["devices"], plan.devices, strict=True):
        parts = ("limit", "total", "weights", "kv_cache", "activations", "streaming", "reserved", "used", "unused")
        assert {part: device[part] for part in parts} == {part: getattr(use, part) for part in parts}
        assert 0 < device["free_now"] <= device["total"]
    assert [
        (block["block"], block["device"], block["home"], block["weights"], block["reason"]) for block in told["blocks"]
    ] == [(p.block, p.device, p.device, p.weights, p.reason) for p in plan.placements]
    assert [block["index"] for block in told["blocks"] if block["kind"] == "layer"] == list(range(10))
    assert told["figures"]["room_tokens"] == 2 * plan.context_length
    assert told["memory_events"] == []


def test_the_stream_begins_with_the_picture_and_tells_the_pace(http: httpx.Client, lock: PacedLock) -> None:
    lock.hold(8)
    with http.stream("GET", "/lyra/events") as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        told = told_events(response)
        name, picture = next(told)
        assert (name, picture["figures"]["running"]) == ("placement", 0)
        with http.stream("POST", "/lyra/chat", json={"question": BASIL}) as asking:
            figures = next(data for name, data in told if name == "figures" and data["running"])
            assert figures["reserved_tokens"] > 0
            assert figures["free"]["cpu"] > 0
            lock.let_go()
            assert list(told_events(asking))[-1][0] == "answer"
        assert next(data for name, data in told if name == "figures" and not data["running"])["tokens_per_second"] == 0


def test_a_stream_may_have_an_end(http: httpx.Client) -> None:
    with http.stream("GET", "/lyra/events?seconds=0") as response:
        assert [name for name, _ in told_events(response)] == ["placement"]
    assert http.get("/lyra/events?seconds=-1").status_code == 400


def test_a_server_that_ends_ends_its_streams(loaded: LoadedModel, engine: Engine) -> None:
    """In order: a connection that is cut is an error for its reader."""
    names: list[str] = []
    began = threading.Event()

    def listen(url: str) -> None:
        with client(url) as http, http.stream("GET", "/lyra/events") as response:
            for name, _ in told_events(response):
                names.append(name)
                began.set()
        names.append("the end")

    with served(loaded, engine, Limits()) as url:
        listener = threading.Thread(target=listen, args=(url,))
        listener.start()
        assert began.wait(30)
    listener.join(30)
    assert (names[0], names[-1]) == ("placement", "the end")


def test_memory_that_runs_out_is_told_and_shown(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    loaded = load(ModelConfig(), directory=checkpoints("llama"))
    engine = Engine(loaded, Room(loaded.context_length, 1, 1, "a test"))
    loaded.step_lock = lock = PacedLock()
    with served(loaded, engine, Limits()) as url, client(url) as http:
        before = http.get("/lyra/placement").json()
        assert {block["device"] for block in before["blocks"]} == {"sim:0"}
        assert [device["weights"] for device in before["devices"]] == [use.weights for use in loaded.plan.devices]
        lock.hold(6)
        body = {"prompt": story(4), "max_tokens": 20, "model": "tiny", "stream": True}
        with (
            http.stream("GET", "/lyra/events") as listening,
            http.stream("POST", "/v1/completions", json=body) as answer,
        ):
            told = told_events(listening)
            assert next(told)[0] == "placement"
            sim.fail_at(1, persistent=True, device=0)
            lock.let_go()
            kinds = [data["message"] for name, data in _until_moved(told) if name == "memory"]
            assert kinds[0].startswith("memory ran out on sim:0 after ")
            sim.reset()
            answer.read()
        after = http.get("/lyra/placement").json()
        away = [block for block in after["blocks"] if block["device"] != block["home"]]
        assert away
        assert [block["block"] for block in away] == [
            p.block for p in loaded.plan.placements if p.block in loaded.residency.away
        ]
        assert {(block["device"], block["home"], block["reason"]) for block in away} == {
            ("cpu", "sim:0", "memory ran out on sim:0")
        }
        on_device = sum(block["weights"] for block in after["blocks"] if block["device"] == "sim:0")
        assert {device["device"]: device["weights"] for device in after["devices"]}["sim:0"] == on_device
        assert after["memory_events"][0]["kind"] == "recover"
        # Memory is free again: the next answer brings them back.
        http.post("/v1/completions", json=body | {"stream": False})
        again = http.get("/lyra/placement").json()
        assert [block["device"] for block in again["blocks"]] == [block["device"] for block in before["blocks"]]
        assert again["memory_events"][-1]["kind"] == "promote"
    assert engine.join(30)
    loaded.close()


def test_a_load_that_fell_back_is_told(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    sim.fail_at(8, persistent=True)
    loaded = load(ModelConfig(gpu_layers_fallback=0), directory=checkpoints("llama"))
    sim.reset()
    failed = [attempt.rung for attempt in loaded.report.attempts if attempt.outcome == "out of memory"]
    assert failed
    engine = Engine(loaded, Room(loaded.context_length, 1, 1, "a test"))
    with served(loaded, engine, Limits()) as url, client(url) as http:
        told = http.get("/lyra/placement").json()
    assert told["rung"] == loaded.report.rung != loaded.plan.rung.name
    assert [event["kind"] for event in told["memory_events"]] == ["load"] * len(failed)
    assert told["memory_events"][0]["message"].startswith(f"rung '{failed[0]}' ran out of memory while loading: ")
    assert [block["device"] for block in told["blocks"]] == [block.device for block in loaded.blocks if block.name]
    assert all(block["device"] == block["home"] for block in told["blocks"])
    assert engine.join(30)
    loaded.close()


def _until_moved(told: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for name, data in told:
        yield name, data
        if name == "placement" and any(block["device"] != block["home"] for block in data["blocks"]):
            return


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_names_the_page_and_the_journal(tmp_path: Path) -> None:
    process = ServerProcess(bundled_directory(), tmp_path, "--no-journal", LYRA_SERVE_KEY=KEY)
    try:
        assert f"the page: {process.root}/\n" in process.said
        assert "no journal (--journal PATH names one)\n" in process.said
        with client(process.url, Authorization=f"Bearer {KEY}") as http:
            assert http.get("/").text == Page().html
            assert http.get("/lyra/placement").json()["journal"] is None
            with http.stream("GET", "/lyra/events") as response:
                told = told_events(response)
                assert next(told)[0] == "placement"
                assert process.end() == 0
                assert [name for name, _ in told if name not in {"figures", "placement"}] == []
    finally:
        process.end()


def test_options_that_contradict_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--no-journal", "--journal", "j.json"]) == 2
    assert capsys.readouterr().err == (
        "error: --no-journal and --journal contradict each other\nhint: leave one of them out\n"
    )


@pytest.mark.parametrize("named", [False, True])
def test_other_machines_get_no_journal_that_nobody_named(
    named: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lyra_emergence.cli import serve
    from lyra_emergence.cli.console import Console
    from lyra_emergence.cli.options import Options

    options = Options(journal=tmp_path / "j.json" if named else None)
    errors = io.StringIO()
    told = serve._with_safe_journal(options, Limits(local_names_only=False), Console(stderr=errors))
    assert told.no_journal == (not named)
    said = "note: without a key no journal is served to other machines; --journal names one all the same\n"
    assert " ".join(errors.getvalue().split()) == ("" if named else said.strip())
    assert serve._with_safe_journal(options, Limits(), Console()) == options
    assert serve._with_safe_journal(options, Limits(KEY, local_names_only=False), Console()) == options
