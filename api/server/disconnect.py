"""Work that nobody waits for any more is given up."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from api.server.request_deadline import RequestDeadline

Result = TypeVar("Result")


class ClientDisconnectedError(Exception):
    """The client closed its connection before the answer was complete."""


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, Result], deadline: RequestDeadline) -> Result:
    """The result of `work`, which is cancelled, and has ended on return, if the client goes away or time is up first.

    The request's body must have been read. Raises ClientDisconnectedError, DeadlineError, or what `work` raises.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, timeout=deadline.left_s, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if watching.done():
            raise ClientDisconnectedError
        raise deadline.error()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
