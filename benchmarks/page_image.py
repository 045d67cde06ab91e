"""Draws docs/images/page.png and docs/images/page-narrow.png: the page of `lyra.py serve`, as Chromium shows it.

    uv run python -m benchmarks.page_image

Needs Chromium and a C++ compiler: the GPU in the pictures is the tests' simulated accelerator, with room for some of
the bundled model's layers. In the middle of an answer it refuses memory, so that layers leave.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyra_emergence.bundled import BUNDLED_ID, BUNDLED_PASSAGES, bundled_directory
from lyra_emergence.config import ModelConfig
from lyra_emergence.loading import load
from lyra_emergence.server.engine import Engine
from lyra_emergence.server.guard import Limits
from lyra_emergence.server.room import room_of
from src.tests import simulated_accelerator
from src.tests.serving import PacedLock, sample_journal, served
from src.tests.test_serve_browser import SECONDS, started_browser

if TYPE_CHECKING:
    from src.tests.simulated_accelerator import SimulatedAccelerator

IMAGES = Path(__file__).parents[1] / "docs" / "images"
LIMIT = "22MB"
PASS = 70
"""Milliseconds of a pass."""
QUESTIONS = ("Who dug up a basil plant?", "When did I plant garlic?")
LOOKS: dict[str, dict[str, Any]] = {
    "page": {"viewport": {"width": 1180, "height": 760}, "color_scheme": "light"},
    "page-narrow": {"viewport": {"width": 360, "height": 720}, "color_scheme": "dark", "device_scale_factor": 2},
}


def main() -> None:
    """Hold the same conversation in both looks and write what is seen."""
    accelerator = simulated_accelerator.load(devices=1)
    with accelerator.lent():
        for name, look in LOOKS.items():
            _draw(name, look, accelerator)


def _draw(name: str, look: dict[str, Any], accelerator: SimulatedAccelerator) -> None:
    loaded = load(ModelConfig(max_memory={"0": LIMIT}), directory=bundled_directory())
    engine = Engine(loaded, room_of(loaded.plan))
    loaded.step_lock = lock = PacedLock()
    journal = sample_journal()
    with (
        served(loaded, engine, Limits(), journal=journal, passages=BUNDLED_PASSAGES, name=BUNDLED_ID) as url,
        started_browser() as browser,
    ):
        page = browser.new_page(**look)
        page.set_default_timeout(1000 * SECONDS)
        page.goto(url.removesuffix("v1"))
        page.locator(".cell").first.wait_for(state="attached")
        lock.hold()
        _ask(page, QUESTIONS[0])
        _paced(page, lock, 45)
        page.locator(".state", has_text="tokens").wait_for()
        _ask(page, QUESTIONS[1])
        _paced(page, lock, 14)
        accelerator.fail_at(1, persistent=True)
        while not page.locator(".cell[data-moved]").count():
            _paced(page, lock, 1)
        accelerator.reset()
        _paced(page, lock, 20)
        if name == "page-narrow":
            page.locator("summary").click()
        page.screenshot(path=IMAGES / f"{name}.png")
        lock.let_go()
    loaded.close()


def _paced(page: Any, lock: PacedLock, passes: int) -> None:
    """Let so many passes through, as fast as a larger model would make them."""
    for _ in range(passes):
        lock.hold(1)
        page.wait_for_timeout(PASS)


def _ask(page: Any, question: str) -> Any:
    page.keyboard.type(question)
    page.keyboard.press("Enter")
    return page.locator(".turn").last


if __name__ == "__main__":
    main()
