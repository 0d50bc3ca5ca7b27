"""What the server does with every HTTP request: its id, its deadline, its body, and the client that may go away."""

import asyncio
import math
import re
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from api.errors import DeadlineError, RequestError

REQUEST_ID_HEADER = "x-request-id"
TIMEOUT_HEADER = "x-request-timeout"
"""The header with the seconds that a client gives its request, from its arrival to the end of the answer."""

BODY_BYTES_MAX = 16 << 20
"""The largest body that is accepted; a prompt of 128k tokens as a list of ids takes about 1 MiB."""

DISCARDED_BYTES_MAX = 8 * BODY_BYTES_MAX
"""How much of a larger body is read: a client gets the reason only when it has sent its body."""

INLINE_BODY_BYTES_MAX = 4096
"""The largest body that is read and tokenised on the loop, in about a millisecond; larger ones would delay streams."""

_REQUEST_ID = re.compile(r"[!-~]{1,128}")

Result = TypeVar("Result")
Parsed = TypeVar("Parsed")


def given_request_id(text: str | None) -> str | None:
    """Returns an id that is fit for a header and a log, None for any other and for none."""
    return text if text is not None and _REQUEST_ID.fullmatch(text) else None


def new_request_id() -> str:
    """Makes an id for a request that has none."""
    return uuid.uuid4().hex


class RequestDeadline:
    """The deadline of a request, or none, by the event loop's clock; made when the request arrives."""

    def __init__(self, timeout_s: float | None) -> None:
        """The deadline passes in `timeout_s` seconds, never where that is None."""
        self._timeout_s = timeout_s
        self._passes = math.inf if timeout_s is None else asyncio.get_running_loop().time() + timeout_s

    @classmethod
    def of(cls, headers: Headers, server_timeout_s: float | None) -> "RequestDeadline":
        """Makes the deadline from the client's header and the server's limit, whichever is sooner.

        Raises RequestError where the header is not a positive number of seconds.
        """
        given = headers.get(TIMEOUT_HEADER)
        timeouts = [timeout for timeout in (server_timeout_s, _seconds(given)) if timeout is not None]
        return cls(min(timeouts, default=None))

    @property
    def left_s(self) -> float | None:
        """The seconds until the deadline, 0 from then on; None where there is none."""
        if self._timeout_s is None:
            return None
        return max(self._passes - asyncio.get_running_loop().time(), 0.0)

    def error(self) -> DeadlineError:
        """The error for a request whose deadline has passed."""
        return DeadlineError(f"The request's {self._timeout_s:g} s are over: it was ended before it was complete.")

    def check(self) -> None:
        """Raises DeadlineError once it has passed."""
        if self.left_s == 0:
            raise self.error()


def _seconds(given: str | None) -> float | None:
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RequestError(f"The header {TIMEOUT_HEADER} must be a positive number of seconds.", TIMEOUT_HEADER)
    return seconds


class ClientDisconnectedError(Exception):
    """The client closed its connection before the answer was complete."""


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, Result], deadline: RequestDeadline) -> Result:
    """Runs `work`, and cancels it and waits for its end if the client goes away or the deadline passes before.

    The request's body must have been read. Raises ClientDisconnectedError, DeadlineError, or like `work`.
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


async def read_and_parse(request: Request, parse: Callable[[bytes], Parsed], threads: Executor) -> Parsed:
    """Reads the body and parses it with `parse`, which runs on a thread where the body is large.

    Raises like `read_body` and `parse`.
    """
    body = await read_body(request)
    if len(body) <= INLINE_BODY_BYTES_MAX:
        return parse(body)
    return await asyncio.get_running_loop().run_in_executor(threads, parse, body)


async def read_body(request: Request) -> bytes:
    """Reads the body, of at most BODY_BYTES_MAX bytes.

    Raises HTTPException with status 413 for a longer one, ClientDisconnectedError if the client goes away first.
    """
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > DISCARDED_BYTES_MAX:
                break
            if size <= BODY_BYTES_MAX:
                parts.append(part)
    except ClientDisconnect:
        raise ClientDisconnectedError from None
    if size > BODY_BYTES_MAX:
        # The connection is closed, as the rest of a body that was not read would pass for the next request.
        raise HTTPException(
            413, f"The body is larger than {BODY_BYTES_MAX} bytes: send less at once.", {"connection": "close"}
        )
    return b"".join(parts)
