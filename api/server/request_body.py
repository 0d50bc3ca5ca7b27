"""Reading a request's body within a bound, and what it says without delay to others."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from api.server.disconnect import ClientDisconnectedError

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
