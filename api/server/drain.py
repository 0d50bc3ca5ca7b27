"""The end of serving: the server goes on listening while the open requests end, and takes no new ones."""

import asyncio
from http import HTTPStatus

import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from api.openai.error_responses import error_response, status_body

REFUSED = frozenset({"/health", "/ready", "/v1/completions"})
"""Paths that are answered with 503 while draining: those that make tokens, and those that say whether they can."""

DRAINING = "The server is draining: it ends the requests it has, and takes no new ones."

log = structlog.get_logger()


class Drain:
    """An application in front of another: it counts the open requests and, once begun, refuses new ones."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._begun = False
        self._open = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def begin(self) -> None:
        """From now on a new request gets 503 with Retry-After, so that its client goes elsewhere."""
        self._begun = True
        if self._open:
            log.info("draining", open_requests=self._open)

    async def wait(self) -> None:
        """Returns when no request is open."""
        await self._empty.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, or the application's lifespan."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._begun and scope["path"] in REFUSED:
            await error_response(status_body(HTTPStatus.SERVICE_UNAVAILABLE, DRAINING))(scope, receive, send)
            return
        self._open += 1
        self._empty.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1
            if not self._open:
                self._empty.set()
