"""A response of server-sent events that ends its source when the client goes away."""

from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.disconnect import ClientDisconnectedError, run_while_connected


class Source(Protocol):
    """Where events come from: something to be told when no more are wanted."""

    def aclose(self) -> Awaitable[None]:
        """Ends the source; called once nobody iterates over the events."""


class EventStream(Response):
    """Sends every item of `events` at once, and closes `source` however the response ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], source: Source, headers: Mapping[str, str]) -> None:
        self._events = events
        self._source = source
        self.status_code = 200
        self.background = None
        # A proxy such as nginx would otherwise collect events before it passes them on.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application of this response."""
        # The source is closed here, not by the generator of events: one that never began has nothing to clean up.
        async with aclosing(self._source):
            try:
                await run_while_connected(receive, self._send_all(send))
            except ClientDisconnectedError:
                return

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
