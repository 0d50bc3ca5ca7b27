"""An HTTP request as the server treats it: its id, its deadline, its body, and the client that may go away."""

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

_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def given_request_id(text: str | None) -> str | None:
    """The id, or None where none was given that can stand in a header and a log."""
    return text if text is not None and _REQUEST_ID.fullmatch(text) else None


def new_request_id() -> str:
    """An id for a request that brings none."""
    return uuid.uuid4().hex


TIMEOUT_HEADER = "x-request-timeout"

"""Seconds that a client gives its request, from its arrival to the end of the answer."""


class RequestDeadline:
    """A moment of the event loop's clock, or none; made when the request arrives."""

    def __init__(self, timeout_s: float | None) -> None:
        """It passes in `timeout_s` seconds; None: never."""
        self._timeout_s = timeout_s
        self._passes = math.inf if timeout_s is None else asyncio.get_running_loop().time() + timeout_s

    @classmethod
    def of(cls, headers: Headers, server_timeout_s: float | None) -> "RequestDeadline":
        """The smaller of what the client gives in its header and what the server gives.

        Raises RequestError where the header is no positive number of seconds.
        """
        given = headers.get(TIMEOUT_HEADER)
        timeouts = [timeout for timeout in (server_timeout_s, _seconds(given)) if timeout is not None]
        return cls(min(timeouts, default=None))

    @property
    def left_s(self) -> float | None:
        """Seconds until it passes, 0 from then on; None where it never does."""
        if self._timeout_s is None:
            return None
        return max(self._passes - asyncio.get_running_loop().time(), 0.0)

    def error(self) -> DeadlineError:
        """For a request whose time is up."""
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


BODY_BYTES_MAX = 16 << 20

"""A prompt of 128k tokens as a list of ids takes about 1 MiB."""

INLINE_BODY_BYTES_MAX = 4096

"""Larger bodies are read and tokenised on a thread, so as not to delay streams: this many take about a millisecond."""

DISCARDED_BYTES_MAX = 8 * BODY_BYTES_MAX

"""A client that sends too much is still read to here: it hears why only when it has sent its body."""

Parsed = TypeVar("Parsed")


async def read_and_parse(request: Request, parse: Callable[[bytes], Parsed], threads: Executor) -> Parsed:
    """What `parse` makes of the body; it runs on a thread where the body is large.

    Raises what `read_body` and `parse` raise.
    """
    body = await read_body(request)
    if len(body) <= INLINE_BODY_BYTES_MAX:
        return parse(body)
    return await asyncio.get_running_loop().run_in_executor(threads, parse, body)


async def read_body(request: Request) -> bytes:
    """The body, at most BODY_BYTES_MAX bytes.

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
        # The rest of a body that was not read to its end would be taken for the connection's next request.
        raise HTTPException(
            413, f"The body is larger than {BODY_BYTES_MAX} bytes: send less at once.", {"connection": "close"}
        )
    return b"".join(parts)
