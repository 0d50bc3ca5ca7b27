"""A response of server-sent events that ends its source when the client goes away."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.errors import DeadlineError
from api.server.request import ClientDisconnectedError, RequestDeadline, run_while_connected
from weights.errors import GalaxylineError

EVENTS_AT_ONCE = 64
"""After so many others get their turn: where a slow client has let events pile up, none of them waits by itself."""


class Source(Protocol):
    """Where events come from: something to be told when no more are wanted."""

    def aclose(self) -> Awaitable[None]:
        """Ends the source; called once nobody iterates over the events."""

    def last_words(self, error: GalaxylineError) -> bytes:
        """What the stream ends with where it has to end before its source."""


class EventStream(Response):
    """Sends every item of `events` at once, and closes `source` however the response ends.

    One whose `deadline` passes ends with the source's last words.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        source: Source,
        headers: Mapping[str, str],
        deadline: RequestDeadline,
    ) -> None:
        self._events = events
        self._source = source
        self._deadline = deadline
        self._is_started = False
        self.status_code = 200
        self.background = None
        # A proxy such as nginx would otherwise collect events before it passes them on.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application of this response."""
        # The source is closed here, not by the generator of events: one that never began has nothing to clean up.
        async with aclosing(self._source):
            try:
                await run_while_connected(receive, self._send_all(send), self._deadline)
            except ClientDisconnectedError:
                return
            except DeadlineError as error:
                words = self._source.last_words(error)
            else:
                return
        # By now the engine has been told: a client that does not read its last event holds nothing up.
        await self._start(send)
        await send({"type": "http.response.body", "body": words, "more_body": False})

    async def _start(self, send: Send) -> None:
        if not self._is_started:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            self._is_started = True

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await self._start(send)
            since_others = 0
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
                since_others += 1
                if since_others == EVENTS_AT_ONCE:
                    since_others = 0
                    await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
