"""What the server does with every HTTP request: its id, its deadline, its body, and the client that may go away."""

import asyncio
import ctypes
import math
import re
import threading
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from api.errors import DeadlineError, OverloadedError, RequestError
from weights.errors import GalaxylineError

REQUEST_ID_HEADER = "x-request-id"
RETRY_AFTER_S = 2
CLIENT_LEFT = 499
"""nginx's status for a client that left before its answer, which no client sees."""

TIMEOUT_HEADER = "x-request-timeout"
"""The header with the seconds that a client gives its request, from its arrival to the end of the answer."""

BODY_BYTES_MAX = 16 << 20
"""The largest body that is accepted; a prompt of 128k tokens as a list of ids takes about 1 MiB."""

DISCARDED_BYTES_MAX = 8 * BODY_BYTES_MAX
"""How much of a larger body is read: a client gets the reason only when it has sent its body."""

INLINE_BODY_BYTES_MAX = 1024
"""The largest body that is read and tokenised on the loop, in a millisecond or a few where it has many short texts.

Larger ones would delay streams."""

LARGE_BODY_BYTES = 1 << 16
"""The size from which bodies are parsed one at a time, so that others need not wait for them."""

LARGE_BODIES_BYTES_MAX = 4 * BODY_BYTES_MAX
"""The most bytes of large bodies that are read, wait or are parsed at once; more get 429."""

PARSING_THREADS = 2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers (malloc.h)."""

FREE_BYTES_MAX = 1 << 20
TRIM_AFTER_S = 1.0
"""The seconds after a large body in which its memory goes back to the system, once for all that come until then."""

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


async def run_while_connected(receive: Receive, work: Awaitable[Result], deadline: RequestDeadline) -> Result:
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


Check = Callable[[], None]
"""What a long parse calls between its parts: it raises where the client is gone, or its time over."""


class Bodies:
    """Reads the bodies of requests and parses them, in bounded memory and without holding each other up.

    A body of up to INLINE_BODY_BYTES_MAX is parsed on the loop, one of LARGE_BODY_BYTES or more on a thread for these
    alone, which takes them in turn, any other on one of PARSING_THREADS. Work whose client leaves is dropped before it
    begins, and ends at its next check where it is under way.
    """

    def __init__(self) -> None:
        keep_little_memory()
        self._threads = ThreadPoolExecutor(PARSING_THREADS, "parsing")
        self._large = ThreadPoolExecutor(1, "parsing-large")
        self._held = 0
        self._lock = threading.Lock()
        self._trimming: asyncio.TimerHandle | None = None

    async def parse(
        self,
        request: Request,
        parse: Callable[[bytes, Check], Parsed],
        deadline: RequestDeadline,
        *,
        inline: bool = True,
    ) -> Parsed:
        """Reads and parses a body, on a thread unless it is small and may be parsed `inline`.

        Raises like `read_body` and `parse`, OverloadedError where too many large bodies are at work, DeadlineError, and
        ClientDisconnectedError if the client goes away first.
        """
        held = HeldBytes(self._change_held)
        try:
            body = await read_body(request, held.add)
        except BaseException:
            held.release()
            raise
        if inline and len(body) <= INLINE_BODY_BYTES_MAX:
            held.release()
            return parse(body, lambda: None)
        is_over = threading.Event()

        def check() -> None:
            if is_over.is_set():
                raise ClientDisconnectedError

        threads = self._large if len(body) >= LARGE_BODY_BYTES else self._threads
        work = threads.submit(_outcome, parse, body, check)
        # Only then are they free again: a thread that was told to end still has them.
        work.add_done_callback(lambda _: held.release())
        del body
        try:
            outcome = await run_while_connected(request.receive, asyncio.wrap_future(work), deadline)
        finally:
            is_over.set()
            if threads is self._large:
                self._trim_soon()
        if isinstance(outcome, GalaxylineError):
            raise outcome
        return outcome

    def close(self) -> None:
        """Drops what has not begun."""
        if self._trimming is not None:
            self._trimming.cancel()
        for threads in (self._threads, self._large):
            threads.shutdown(wait=False, cancel_futures=True)

    def _change_held(self, size: int) -> None:
        with self._lock:
            if self._held + size > LARGE_BODIES_BYTES_MAX:
                raise OverloadedError(
                    f"Large bodies of {self._held} bytes are being read already: try again later.", RETRY_AFTER_S
                )
            self._held += size

    def _trim_soon(self) -> None:
        if self._trimming is None:
            self._trimming = asyncio.get_running_loop().call_later(TRIM_AFTER_S, self._trim)

    def _trim(self) -> None:
        self._trimming = None
        self._large.submit(give_back_memory)


def _outcome(parse: Callable[[bytes, Check], Parsed], body: bytes, check: Check) -> Parsed | GalaxylineError:
    """What `parse` returns, or raises, without the frames that it was raised in: they would keep the body alive."""
    try:
        return parse(body, check)
    except GalaxylineError as error:
        error.__traceback__ = error.__context__ = error.__cause__ = None
        return error


class HeldBytes:
    """The bytes of one body that count towards the bound on large bodies: all of them once it is a large one."""

    def __init__(self, change: Callable[[int], None]) -> None:
        """`change` changes the sum over all bodies, and raises where that would be too large."""
        self._change = change
        self._size = 0
        self._counted = 0

    def add(self, size: int) -> None:
        """Adds a part that has come. Raises OverloadedError."""
        self._size += size
        if self._size >= LARGE_BODY_BYTES:
            self._change(self._size - self._counted)
            self._counted = self._size

    def release(self) -> None:
        """Takes all back."""
        self._change(-self._counted)
        self._size = self._counted = 0


def keep_little_memory() -> None:
    """Bounds what glibc keeps at the end of each thread's heap, which would grow to twice the largest body."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(option, FREE_BYTES_MAX)


def give_back_memory() -> None:
    """Gives the C library's free memory within its heaps back to the system, which glibc does not do by itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


async def read_body(request: Request, count: Callable[[int], None]) -> bytes:
    """Reads the body, of at most BODY_BYTES_MAX bytes; `count` gets the size of each part that is kept.

    Raises HTTPException with status 413 for a longer one, ClientDisconnectedError if the client goes away first, and
    what `count` raises.
    """
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > DISCARDED_BYTES_MAX:
                break
            if size <= BODY_BYTES_MAX:
                count(len(part))
                parts.append(part)
    except ClientDisconnect:
        raise ClientDisconnectedError from None
    if size > BODY_BYTES_MAX:
        # The connection is closed, as the rest of a body that was not read would pass for the next request.
        raise HTTPException(
            413, f"The body is larger than {BODY_BYTES_MAX} bytes: send less at once.", {"connection": "close"}
        )
    return b"".join(parts)
