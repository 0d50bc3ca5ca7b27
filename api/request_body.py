"""Reading a request's body within a bound."""

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from api.disconnect import ClientDisconnectedError

BODY_BYTES_MAX = 16 << 20
"""A prompt of 128k tokens as a list of ids takes about 1 MiB."""

DISCARDED_BYTES_MAX = 8 * BODY_BYTES_MAX
"""A client that sends too much is still read to here: it hears why only when it has sent its body."""


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
