"""The page as people use it: a real Chromium, by keyboard alone, against a real model.

Needs a Chromium of the system (Debian's package, or Google Chrome) and Playwright, which downloads nothing here. One
browser for all tests. Answers are held and let go pass by pass where a test looks into the middle of one.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from lyra_emergence.bundled import bundled_directory
from lyra_emergence.config import ModelConfig
from lyra_emergence.loading import load
from lyra_emergence.server.engine import Engine
from lyra_emergence.server.guard import Limits
from lyra_emergence.server.room import Room
from lyra_emergence.units import format_bytes

from .serving import PacedLock, sample_journal, served

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lyra_emergence.loading import LoadedModel

    from .simulated_accelerator import SimulatedAccelerator

    Page = Any

KEY = "a-secret-of-the-tests"
BASIL = "Who dug up a basil plant?"
ANSWER = "Biscuit dug up one basil plant and looked proud of it [1]."
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SWITCHES = (
    "--no-sandbox",  # root has none to give
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SECONDS = 60
"""How long the slowest step may take on a machine that does much else."""


@contextmanager
def started_browser() -> Iterator[Any]:
    """Start the Chromium that is on this machine.

    Raises:
        FileNotFoundError: There is none.
        ModuleNotFoundError: Playwright is not installed.
    """
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        raise FileNotFoundError("no Chromium is installed: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=SWITCHES)
        yield started
        started.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with ExitStack() as stack:
        try:
            started = stack.enter_context(started_browser())
        except (FileNotFoundError, ModuleNotFoundError) as missing:
            pytest.skip(str(missing))
        yield started


@pytest.fixture(scope="module")
def loaded() -> Iterator[LoadedModel]:
    model = load(ModelConfig(device_map="cpu", cpu_kernels=False), directory=bundled_directory())
    model.step_lock = PacedLock()
    yield model
    model.close()


@pytest.fixture(scope="module")
def url(loaded: LoadedModel) -> Iterator[str]:
    engine = Engine(loaded, Room(loaded.context_length, 2, 1, "a test"), waiting=1)
    with served(loaded, engine, Limits(), journal=sample_journal()) as made:
        yield made.removesuffix("v1")


@pytest.fixture
def lock(loaded: LoadedModel) -> Iterator[PacedLock]:
    paced = loaded.step_lock
    assert isinstance(paced, PacedLock)
    yield paced
    paced.let_go()


@contextmanager
def shown(browser: Any, url: str, *, quiet: bool = True, **look: Any) -> Iterator[Page]:
    """Open the page; at the end there must be nothing in the console, unless `quiet` is false."""
    with browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | look) as context:
        context.set_default_timeout(1000 * SECONDS)
        said: list[str] = []
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if message.type in {"error", "warning"} else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        yield page
        assert said == [] or not quiet


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Page]:
    with shown(browser, url) as opened:
        opened.locator("#link[data-state=live]").wait_for()
        yield opened


def ask(page: Page, question: str) -> Any:
    """Type a question into what has the focus, and send it; return its turn."""
    before = page.locator(".turn").count()
    page.keyboard.type(question)
    page.keyboard.press("Enter")
    turn = page.locator(".turn").nth(before)
    turn.wait_for()
    return turn


def ended(turn: Any) -> None:
    turn.locator(".state", has_text=re.compile("tokens|Stopped")).wait_for()


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.id || document.activeElement.textContent"))


def test_a_question_by_keyboard_streams_and_its_citation_opens_the_passage(page: Page, lock: PacedLock) -> None:
    assert focused(page) == "question"
    assert page.locator("#welcome").inner_text() == "Ask a question about sample.json."
    lock.hold(14)
    turn = ask(page, BASIL)
    assert turn.locator(".asked").inner_text() == BASIL
    answer = turn.locator(".answer")
    answer.get_by_text("Biscuit dug").wait_for()
    assert ANSWER.startswith(answer.inner_text())
    assert answer.inner_text() != ANSWER
    assert page.locator("#stop").is_visible()
    assert not page.locator("#send").is_visible()
    lock.let_go()
    ended(turn)
    assert answer.inner_text() == ANSWER
    assert page.locator("#said").inner_text() == ANSWER
    assert turn.locator(".source").inner_text() == "[1] 2025-05-12 · Planting day"

    page.keyboard.press("Shift+Tab")  # back from the question: the source, then the citation in the text
    assert focused(page) == "[1] 2025-05-12 · Planting day"
    page.keyboard.press("Shift+Tab")
    assert focused(page) == "[1]"
    page.keyboard.press("Enter")
    dialog = page.locator("#passage")
    dialog.wait_for()
    assert dialog.locator("h2").inner_text() == "2025-05-12 · Planting day"
    assert dialog.locator("#passage-place").inner_text() == "2025-05-12-planting-day in sample.json"
    assert dialog.locator("#passage-text").inner_text().startswith("The tomatoes are out: four Black Krim")
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    assert focused(page) == "[1]"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert focused(page) == "question"


def test_escape_stops_and_the_conversation_goes_on(page: Page, lock: PacedLock) -> None:
    lock.hold(12)
    turn = ask(page, BASIL)
    turn.locator(".answer").get_by_text("Biscuit").wait_for()
    page.keyboard.press("Escape")
    ended(turn)
    lock.let_go()
    assert turn.locator(".state").inner_text() == "Stopped"
    assert ANSWER.startswith(turn.locator(".answer").inner_text())
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    assert page.locator("#question").input_value() == "first line\n"
    page.keyboard.press("Control+A")
    with page.expect_request("**/lyra/chat") as sent:
        turn = ask(page, "When did I plant garlic?")
    (earlier,) = sent.value.post_data_json["turns"]
    assert earlier["question"] == BASIL
    assert ANSWER.startswith(earlier["answer"])
    ended(turn)
    assert turn.locator(".answer").inner_text()
    assert turn.locator(".state").inner_text() != "Stopped"
    page.locator("#anew").press("Enter")
    assert page.locator(".turn").count() == 0
    assert focused(page) == "question"


def test_who_waits_sees_it_and_who_is_refused_sees_why(browser: Any, url: str, lock: PacedLock) -> None:
    lock.hold()
    with (
        shown(browser, url) as running,
        shown(browser, url) as waiting,
        shown(browser, url, quiet=False) as refused,  # Chromium itself writes the status to the console
    ):
        first = ask(running, BASIL)
        running.locator("#load", has_text="1 running").wait_for()
        second = ask(waiting, BASIL)
        second.locator(".state", has_text="Waiting for its turn").wait_for()
        third = ask(refused, BASIL)
        error = third.locator(".error")
        error.wait_for()
        told, hint = error.locator("p").all_inner_texts()
        assert told == "Error: 1 requests wait already, and that is the limit"
        assert re.fullmatch(r"ask again later, or start the server with .* \(--queue\); try again in \d+ s", hint)
        lock.let_go()
        ended(first)
        ended(second)
        error.get_by_role("button", name="Ask again").press("Enter")
        again = refused.locator(".turn")
        ended(again)
        assert again.locator(".answer").inner_text() == ANSWER


def test_the_bars_and_the_strip_are_the_plans(page: Page, loaded: LoadedModel) -> None:
    (use,) = loaded.plan.devices
    device = page.locator("#devices > div")
    assert device.locator(".device-head").inner_text().split("\n") == [
        "cpu",
        f"{format_bytes(use.used)} of {format_bytes(use.limit)}",
    ]
    parts = {"weights": use.weights, "KV cache": use.kv_cache, "activations": use.activations, "free": use.unused}
    told = [f"{name} {format_bytes(amount)}" for name, amount in parts.items()]
    assert [" ".join(text.split()) for text in device.locator(".parts li").all_inner_texts()] == told
    assert device.locator(".bar .part").count() == 3
    assert page.locator("#strip .cell").all_inner_texts() == ["E", *map(str, range(10)), "N", "H"]
    assert page.locator("#strip").get_attribute("aria-label") == "cpu: embedding, layers 0-9, norm, head"
    assert page.locator("#gist").inner_text() == "10 on cpu"
    page.locator("summary").press("Enter")
    assert not page.locator("#strip").is_visible()


def test_memory_that_runs_out_is_seen_as_it_happens(browser: Any, sim: SimulatedAccelerator) -> None:
    loaded = load(ModelConfig(), directory=bundled_directory())
    engine = Engine(loaded, Room(loaded.context_length, 1, 1, "a test"))
    loaded.step_lock = lock = PacedLock()
    with (
        served(loaded, engine, Limits(), journal=sample_journal()) as url,
        shown(browser, url.removesuffix("v1")) as page,
    ):
        page.locator(".cell[data-device='sim:0']").nth(12).wait_for()
        assert page.locator(".cell[data-moved]").count() == 0
        lock.hold(10)
        turn = ask(page, BASIL)
        turn.locator(".answer").get_by_text("Biscuit").wait_for()
        sim.fail_at(1, persistent=True, device=0)
        lock.let_go()
        page.locator("#happened [data-kind=recover]", has_text="memory ran out on sim:0").first.wait_for()
        page.locator(".cell[data-moved='sim:0'][data-device=cpu]").first.wait_for()
        sim.reset()
        ended(turn)
        assert turn.locator(".answer").inner_text() == ANSWER
        ended(ask(page, BASIL))
        page.locator("#happened [data-kind=promote]").first.wait_for()
        page.locator(".cell[data-moved]").first.wait_for(state="detached")
    assert engine.join(30)
    loaded.close()


def test_the_key_is_asked_for_once(browser: Any, loaded: LoadedModel) -> None:
    engine = Engine(loaded, Room(loaded.context_length, 1, 1, "a test"))
    with (
        served(loaded, engine, Limits(KEY)) as url,
        shown(browser, url.removesuffix("v1"), quiet=False) as page,  # Chromium writes each 401 to the console
    ):
        door = page.locator("#door")
        door.wait_for()
        page.keyboard.press("Escape")
        page.keyboard.press("Escape")
        door.wait_for()
        page.keyboard.type("another")
        page.keyboard.press("Enter")
        page.locator("#door-told", has_text="That key is wrong.").wait_for()
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        page.locator("#link[data-state=live]").wait_for()
        assert focused(page) == "question"
        page.reload()
        page.locator("#link[data-state=live]").wait_for()
        assert not door.is_visible()
        turn = ask(page, "Hello")
        ended(turn)
    assert engine.join(30)


def test_a_server_that_comes_back_is_found_again(browser: Any, loaded: LoadedModel) -> None:
    def engine() -> Engine:
        return Engine(loaded, Room(loaded.context_length, 1, 1, "a test"))

    with ExitStack() as first:
        url = first.enter_context(served(loaded, engine(), Limits(), name="first"))
        port = int(url.removesuffix("/v1").rpartition(":")[2])
        # Chromium writes to the console that nobody is there.
        with shown(browser, url.removesuffix("v1"), quiet=False) as page:
            page.locator("#model", has_text="first").wait_for()
            first.close()
            page.locator("#link[data-state=away]").wait_for()
            turn = ask(page, "Hello")
            turn.locator(".error", has_text="the server cannot be reached").wait_for()
            with served(loaded, engine(), Limits(), name="second", port=port):
                page.locator("#model", has_text="second").wait_for()
                page.locator("#link[data-state=live]").wait_for()
                turn.get_by_role("button", name="Ask again").press("Enter")
                ended(page.locator(".turn"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_360_pixels_are_enough(scheme: str, browser: Any, url: str) -> None:
    with shown(browser, url, viewport={"width": 360, "height": 640}, color_scheme=scheme) as page:
        page.locator("#link[data-state=live]").wait_for()
        assert not page.locator("#strip").is_visible()  # the conversation has the room
        turn = ask(page, "When did I plant garlic? " + "x" * 200)
        ended(turn)
        page.locator("summary").press("Enter")
        page.locator("#strip").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        wide = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > 360.5)"
        assert page.evaluate(f"{wide}.map(e => e.tagName + '.' + e.className)") == []
        assert page.locator("#question").bounding_box()["y"] < 640
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(247, 247, 245)", "dark": "rgb(19, 22, 25)"}[scheme]


def test_what_a_model_writes_is_never_markup(browser: Any, url: str) -> None:
    """Through the functions that draw answers, with what a model could be led to write."""
    written = (
        "<img src=x onerror=alert(1)> **bold** *it* `a < b` [1] [9]\n\n"
        "- one\n- two\n\n3. three\n\n```\n<script>alert(1)</script>\n```\n# Head\n[1, 2]"
    )
    with shown(browser, url) as page:
        events = [
            (
                "sources",
                {
                    "sources": [
                        {"number": 1, "entry": "<b>e</b>", "date": "d", "title": "<i>t</i>", "passage": "<u>p</u>"}
                    ]
                },
            ),
            ("text", {"text": written}),
        ]
        told = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
        page.route("**/lyra/chat", lambda route: route.fulfill(body=told, content_type="text/event-stream"))
        page.locator("#link[data-state=live]").wait_for()
        turn = ask(page, "<em>Hi</em>")
        turn.locator(".error", has_text="The server ended before the answer did.").wait_for()
        answer = turn.locator(".answer")
        assert answer.locator("img, script, u, i, b").count() == 0
        assert answer.evaluate("e => [...e.children].map(c => c.tagName)") == ["P", "UL", "OL", "PRE", "P", "P"]
        assert answer.locator("p").first.inner_text() == "<img src=x onerror=alert(1)> bold it a < b [1] [9]"
        assert answer.locator("pre").inner_text() == "<script>alert(1)</script>"
        assert answer.locator("strong").all_inner_texts() == ["bold", "Head"]
        assert (answer.locator("em").inner_text(), answer.locator("p code").inner_text()) == ("it", "a < b")
        assert answer.locator("ol").get_attribute("start") == "3"
        assert answer.locator("button").all_inner_texts() == ["[1]"]  # there is no source 9, nor a source 2
        answer.locator("button").press("Enter")
        assert page.locator("#passage-title").inner_text() == "d · <i>t</i>"
        assert page.locator("#passage-text").inner_text() == "<u>p</u>"
