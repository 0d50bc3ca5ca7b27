"""The response of server-sent events, which ends its source when the client goes away."""

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
"""Events after which other tasks get their turn, as events that a slow client let pile up are sent without a wait."""


class Source(Protocol):
    """The source of a response's events, which is closed when no more are wanted."""

    def aclose(self) -> Awaitable[None]:
        """Ends the source; called when the iteration over its events is over."""

    def last_words(self, error: GalaxylineError) -> bytes:
        """The last events of a stream that ends before its source, because of `error`."""


class EventStream(Response):
    """Sends every item of `events` as soon as it comes, and closes `source` however the response ends.

    When its `deadline` passes, it ends with the source's last words.
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
        """Sends the response: its ASGI application."""
        # The source is closed here and not by the generator of events, whose `finally` does not run if it never began.
        async with aclosing(self._source):
            try:
                await run_while_connected(receive, self._send_all(send), self._deadline)
            except ClientDisconnectedError:
                return
            except DeadlineError as error:
                words = self._source.last_words(error)
            else:
                return
        # By now the requests are aborted, so a client that does not read its last event holds nothing up.
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
