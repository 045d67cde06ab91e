"""A bounded load on the simulated accelerator: 200 requests, 16 at a time, clients that leave, memory that runs out.

Nothing is lost and nothing mixed: each whole answer is the greedy answer of its prompt alone, each broken-off one is
the beginning of it, and at the end nobody runs, nobody waits and no byte is left on the device.
"""

from __future__ import annotations

import asyncio
import json
import random
from typing import TYPE_CHECKING, Any

import httpx

from lyra_emergence.config import ModelConfig
from lyra_emergence.loading import load
from lyra_emergence.server.engine import Engine
from lyra_emergence.server.guard import Limits
from lyra_emergence.server.room import Room

from . import families
from .running import RecordedLock, reference
from .serving import served, story

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .simulated_accelerator import SimulatedAccelerator

    Checkpoints = Callable[[str], Path]

REQUESTS = 200
AT_ONCE = 16
NEW_TOKENS = 16
LEAVING = 4
"""One in so many clients leaves in the middle of its answer."""
INJECTED = 25
"""Times that an allocation is refused, at the most; each a while after the one before."""


def expected(directory: Path) -> dict[str, str]:
    """What each of a dozen prompts is answered with where it is asked alone, by plain transformers."""
    tokenizer = families.make_tokenizer()
    found = {}
    for words in range(2, 38, 3):
        prompt = story(words)
        tokens = reference(directory, NEW_TOKENS, tuple(tokenizer(prompt)["input_ids"]))
        found[prompt] = str(tokenizer.decode(tokens, skip_special_tokens=True))
    assert len(set(found.values())) == len(found)
    return found


async def ask(client: httpx.AsyncClient, prompt: str, number: int) -> tuple[str, str | None]:
    """Ask once; return what came and why it ended, None where this client left."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": NEW_TOKENS, "stream": number % 2 == 0}
    leaves = number % LEAVING == 0
    if not body["stream"]:
        response = await client.post("/completions", json=body)
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        return choice["text"], choice["finish_reason"]
    text, reason = "", None
    async with client.stream("POST", "/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            piece: dict[str, Any] = json.loads(line.removeprefix("data: "))
            assert "error" not in piece, piece
            text += piece["choices"][0]["text"]
            reason = piece["choices"][0]["finish_reason"]
            if leaves and len(text) > 5:
                return text, None
    return text, reason


async def load_it(url: str, prompts: list[str], sim: SimulatedAccelerator) -> tuple[list[tuple[str, str | None]], int]:
    gate = asyncio.Semaphore(AT_ONCE)
    injected = 0
    done = 0

    async def one(client: httpx.AsyncClient, number: int) -> tuple[str, str | None]:
        nonlocal done, injected
        async with gate:
            if number % (REQUESTS // INJECTED) == 3:
                # Once, or from there on until the next request lets memory be free again.
                injected += sum(sim.injected(device) for device in range(sim.devices))
                sim.reset()
                sim.fail_at(40 + number % 7 * 30, persistent=number % 16 == 3)
            answer = await ask(client, prompts[number], number)
            done += 1
            return answer

    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=240, limits=limits, trust_env=False) as client:
        answers = await asyncio.gather(*(one(client, number) for number in range(len(prompts))))
    injected += sum(sim.injected(device) for device in range(sim.devices))
    sim.reset()
    assert done == len(prompts)
    return answers, injected


def test_nothing_is_lost_and_nothing_mixed(checkpoints: Checkpoints, sim: SimulatedAccelerator) -> None:
    directory = checkpoints("llama")
    alone = expected(directory)
    drawn = random.Random(7)
    prompts = [drawn.choice(list(alone)) for _ in range(REQUESTS)]
    loaded = load(ModelConfig(), directory=directory)
    loaded.step_lock = lock = RecordedLock()
    engine = Engine(loaded, Room(loaded.context_length, 3, 4, "a test"), waiting=AT_ONCE)
    with served(loaded, engine, Limits()) as url:
        answers, injected = asyncio.run(load_it(url, prompts, sim))
    left = 0
    for prompt, (text, reason) in zip(prompts, answers, strict=True):
        if reason is None:
            left += 1
            assert text
            assert alone[prompt].startswith(text)
        else:
            assert text == alone[prompt]
    figures = engine.figures()
    assert (figures.running, figures.waiting, figures.reserved) == (0, 0, 0)
    assert sum(figures.ended.values()) == REQUESTS
    assert set(figures.ended) <= {"stop", "length", "stopped"}
    # One who leaves at the very end may leave nothing to stop.
    assert figures.ended.get("stopped", 0) <= left == REQUESTS // LEAVING
    assert injected >= INJECTED // 2
    assert figures.recoveries >= injected // 2
    assert lock.most_overtaken <= 2
    assert engine.join(30)
    loaded.close()
    assert sim.settled() == (0, 0)
    print(f"{injected} refused, {figures.recoveries} recoveries, ended {figures.ended}, {left} clients left")  # noqa: T201
