"""Bodies of requests: small ones do not wait for large ones, large ones are few at once, and end with their client."""

import asyncio
import threading
from collections.abc import Callable

import pytest
from starlette.requests import Request
from starlette.types import Message

from api.errors import DeadlineError, OverloadedError
from api.server.request import (
    INLINE_BODY_BYTES_MAX,
    LARGE_BODIES_BYTES_MAX,
    LARGE_BODY_BYTES,
    Bodies,
    Check,
    ClientDisconnectedError,
    RequestDeadline,
)

DEADLINE_S = 20
SMALL = b" " * (INLINE_BODY_BYTES_MAX + 1)
LARGE = b" " * LARGE_BODY_BYTES


class Sent:
    """A request that has been sent, by a client that stays until it leaves."""

    def __init__(self, body: bytes) -> None:
        self.left = asyncio.Event()
        self._messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        self.request = Request({"type": "http", "method": "POST", "headers": []}, self._receive)

    async def _receive(self) -> Message:
        if self._messages:
            return self._messages.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}


class Held:
    """Parsing that lasts until it is released, or told that its client has left."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.released = threading.Event()
        self.ended = threading.Event()

    def __call__(self, body: bytes, check: Check) -> int:
        self.begun.set()
        try:
            while not self.released.wait(0.001):
                check()
        finally:
            self.ended.set()
        return len(body)


def size(body: bytes, _: Check) -> int:
    return len(body)


async def parsed(
    bodies: Bodies, sent: Sent, parse: Callable[[bytes, Check], int], timeout_s: float | None = None
) -> int:
    return await asyncio.wait_for(bodies.parse(sent.request, parse, RequestDeadline(timeout_s)), DEADLINE_S)


async def wait(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, DEADLINE_S)


async def test_smaller_bodies_overtake_large_ones() -> None:
    bodies, held = Bodies(), Held()
    large = [asyncio.create_task(parsed(bodies, Sent(LARGE), held)) for _ in range(3)]
    await wait(held.begun)
    for body in (b"{}", SMALL):
        assert await parsed(bodies, Sent(body), size) == len(body)
    held.released.set()
    assert await asyncio.gather(*large) == [LARGE_BODY_BYTES] * 3
    bodies.close()


async def test_large_bodies_together_are_bounded_and_all_is_given_back() -> None:
    bodies = Bodies()
    quarter = b" " * (LARGE_BODIES_BYTES_MAX // 4)
    for _ in range(2):
        held = Held()
        large = [asyncio.create_task(parsed(bodies, Sent(quarter), held)) for _ in range(4)]
        await wait(held.begun)
        with pytest.raises(OverloadedError):
            await parsed(bodies, Sent(LARGE), size)
        assert await parsed(bodies, Sent(SMALL), size) == len(SMALL)
        held.released.set()
        await asyncio.gather(*large)
    bodies.close()


async def test_a_client_that_leaves_ends_its_work_and_what_has_not_begun_never_does() -> None:
    bodies, running, waiting = Bodies(), Held(), Held()
    first, second = Sent(LARGE), Sent(LARGE)
    tasks = [asyncio.create_task(parsed(bodies, first, running)), asyncio.create_task(parsed(bodies, second, waiting))]
    await wait(running.begun)
    second.left.set()
    with pytest.raises(ClientDisconnectedError):
        await tasks[1]
    first.left.set()
    with pytest.raises(ClientDisconnectedError):
        await tasks[0]
    await wait(running.ended)
    assert await parsed(bodies, Sent(LARGE), size) == LARGE_BODY_BYTES
    assert not waiting.begun.is_set()
    bodies.close()


async def test_parsing_ends_with_the_requests_time() -> None:
    bodies, held = Bodies(), Held()
    with pytest.raises(DeadlineError):
        await parsed(bodies, Sent(SMALL), held, timeout_s=0.05)
    await wait(held.ended)
    bodies.close()
