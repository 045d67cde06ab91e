"""What listeners are told, without a network: mailboxes that hold up nobody, the pace, and an end."""

from __future__ import annotations

import asyncio

import pytest

from lyra_emergence.errors import RequestError
from lyra_emergence.server.broadcast import MOST_LISTENERS, Broadcast
from lyra_emergence.server.pace import Pace


def test_a_listener_that_does_not_read_loses_the_oldest() -> None:
    async def run() -> list[bytes]:
        broadcast = Broadcast()
        mailbox = broadcast.join()
        for number in range(100):
            broadcast.send(str(number).encode())
        broadcast.close()
        read = []
        while (event := await mailbox.next(10)) is not None:
            read.append(event)
        return read

    assert asyncio.run(run()) == [str(number).encode() for number in range(36, 100)]


def test_a_listener_waits_for_news_and_for_no_longer_than_it_wants() -> None:
    async def run() -> bytes | None:
        broadcast = Broadcast()
        mailbox, other = broadcast.join(), broadcast.join()
        with pytest.raises(TimeoutError):
            await mailbox.next(0)
        asyncio.get_running_loop().call_later(0.01, broadcast.send, b"news")
        assert await mailbox.next(30) == b"news"
        broadcast.leave(other)
        broadcast.send(b"more")
        assert len(broadcast) == 1
        return await mailbox.next(30)

    assert asyncio.run(run()) == b"more"


def test_there_are_so_many_listeners_and_none_after_the_end() -> None:
    async def run() -> None:
        broadcast = Broadcast()
        mailboxes = [broadcast.join() for _ in range(MOST_LISTENERS)]
        with pytest.raises(RequestError, match=r"^32 listen already, and that is the limit$") as caught:
            broadcast.join()
        assert (caught.value.status, caught.value.code) == (429, "too_many_listeners")
        broadcast.leave(mailboxes[0])
        broadcast.join()
        broadcast.close()
        with pytest.raises(RequestError, match=r"^the server is shutting down$"):
            broadcast.join()

    asyncio.run(run())


def test_the_pace_is_that_of_the_last_seconds() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert pace.tokens_per_second() == 0
    for step in range(11):
        now[0] = step / 10
        pace.add(1)
    assert pace.tokens_per_second() == pytest.approx(10)
    now[0] = 2.0  # nothing for a second
    assert pace.tokens_per_second() == pytest.approx(5)
    now[0] = 9.0
    assert pace.tokens_per_second() == 0
    pace.add(1)
    assert pace.tokens_per_second() == 0
