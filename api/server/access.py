"""Who reaches the server: the log and the count of every request, and the keys that clients have to bring."""

import asyncio
import time
from collections import Counter
from http import HTTPStatus

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.messages.histogram import Histogram
from api.openai.anthropic.errors import error_writer
from api.openai.bodies import error_response, status_body
from api.server.request import CLIENT_LEFT, REQUEST_ID_HEADER
from api.settings.server import ApiKeys

UNKNOWN = "none"
"""The handler of requests to paths that the server does not have, and of those that it could not read."""

PROBES = frozenset({"/health", "/live", "/ready", "/ping", "/metrics"})
"""The paths that are asked every few seconds: what they refuse is logged at "debug" alone."""

PATH_CHARACTERS_MAX = 200
DURATION_BOUNDS_S = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
LINES_MAX = 10
PERIOD_S = 10.0
"""At most so many lines of one kind are written in this time; then one says how many more there were."""

UNAUTHORIZED = (
    "No valid API key came with the request: send the header Authorization: Bearer KEY, or x-api-key: KEY as "
    "Anthropic's clients do."
)

log = structlog.get_logger()


class BoundedLog:
    """Log lines that anybody can cause: of each kind LINES_MAX are written in PERIOD_S. Belongs to one event loop."""

    def __init__(self) -> None:
        self._written: Counter[str] = Counter()

    def info(self, event: str, kind: str, **fields: object) -> None:
        """Logs `event`, or counts it where enough of this `kind` were written; `kind` is one of few."""
        if kind not in self._written:
            asyncio.get_running_loop().call_later(PERIOD_S, self._close_period, event, kind)
        self._written[kind] += 1
        if self._written[kind] <= LINES_MAX:
            log.info(event, **fields)

    def _close_period(self, event: str, kind: str) -> None:
        left_out = self._written.pop(kind) - LINES_MAX
        if left_out > 0:
            log.info(f"{event}: more of the kind", kind=kind, count=left_out, seconds=PERIOD_S)


class RequestWatch:
    """Counts all requests by method, handler and status, and logs those that get no answer of the wanted kind.

    `requests` has their number, `durations` the seconds from a request's header to the end of its answer.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, str]] = Counter()
        self.durations: dict[tuple[str, str], Histogram] = {}
        self.lines = BoundedLog()

    def answered(self, method: str, handler: str, status: int, seconds: float) -> None:
        """Counts an answer."""
        self.requests[method, handler, str(status)] += 1
        durations = self.durations.setdefault((method, handler), Histogram.of(DURATION_BOUNDS_S))
        durations.observe(seconds)

    def refused(self, status: int, client: str, cause: str) -> None:
        """Counts and logs what could not be read as a request."""
        self.answered(UNKNOWN, UNKNOWN, status, 0.0)
        self.lines.info("request refused", f"{status}", status=status, client=client, cause=cause)


class AccessLog:
    """An application in front of all others that watches each request and its answer.

    It takes the server's root path off the request's, whether a proxy has done so or not.
    """

    def __init__(self, app: ASGIApp, watch: RequestWatch, paths: frozenset[str], root_path: str = "") -> None:
        """`paths` are those without parameters, for requests that end before they find their route."""
        self._app = app
        self._watch = watch
        self._paths = paths
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, or the application's lifespan."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._root_path:
            scope["root_path"] = self._root_path
            if scope["path"].startswith(f"{self._root_path}/"):
                scope["path"] = scope["path"].removeprefix(self._root_path)
        began = time.monotonic()
        start: Message = {"status": HTTPStatus.INTERNAL_SERVER_ERROR}

        async def send_on(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except asyncio.CancelledError:
            start = {"status": CLIENT_LEFT}
            raise
        finally:
            self._note(scope, start, time.monotonic() - began)

    def _note(self, scope: Scope, start: Message, seconds: float) -> None:
        status = int(start["status"])
        path, route = scope["path"], scope.get("route")
        handler = path if route is None and path in self._paths else getattr(route, "path", UNKNOWN)
        self._watch.answered(scope["method"], handler, status, seconds)
        fields = {
            "method": scope["method"],
            "path": path[:PATH_CHARACTERS_MAX],
            "status": status,
            "request_id": _header(start.get("headers", []), REQUEST_ID_HEADER),
            "client": address(scope["client"]),
            "seconds": round(seconds, 4),
        }
        if status >= HTTPStatus.BAD_REQUEST and path not in PROBES:
            self._watch.lines.info("request refused", f"{status}", **fields)
        else:
            log.debug("request answered", **fields)


def address(client: tuple[str, int] | None) -> str:
    """A client's address as it is logged; empty where it has none, as on a unix socket."""
    return f"{client[0]}:{client[1]}" if client else ""


def _header(headers: list[tuple[bytes, bytes]], name: str) -> str | None:
    return next((value.decode("latin-1") for given, value in headers if given.decode("latin-1").lower() == name), None)


class Authentication:
    """An application in front of another that answers 401 to requests without a valid key, where they need one."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, or the application's lifespan."""
        if scope["type"] != "http" or not self._keys.guard(scope["path"]) or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        body = status_body(HTTPStatus.UNAUTHORIZED, UNAUTHORIZED)
        refusal = error_response(body, {"www-authenticate": "Bearer"}, error_writer(scope["path"]))
        await refusal(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        # Clients of Anthropic that know keys of both kinds send both.
        return any([self._keys.accepts(_bearer(scope)), self._keys.accepts(_first(scope, b"x-api-key"))])


def _bearer(scope: Scope) -> bytes:
    """The key of a request in OpenAI's form; empty where it has none."""
    scheme, _, key = _first(scope, b"authorization").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def _first(scope: Scope, name: bytes) -> bytes:
    """A header's first value; empty where it is not there."""
    value: bytes = next((value for given, value in scope["headers"] if given == name), b"")
    return value.strip()
