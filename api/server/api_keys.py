"""API keys: the application in front that checks the key of every request."""

from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from api.openai.responses import error_response, status_body
from api.settings.server import ApiKeys

OPEN_PATHS = frozenset({"/health", "/live", "/ready"})
"""The paths that need no key, for orchestrators: their answers have nothing but whether the server works."""

UNAUTHORIZED = "No valid API key came with the request: send the header Authorization: Bearer KEY."


class Authentication:
    """An application in front of another that answers 401 to requests without a valid key, but for OPEN_PATHS."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, or the application's lifespan."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._keys.accepts(_bearer(scope)):
            await self._app(scope, receive, send)
            return
        body = status_body(HTTPStatus.UNAUTHORIZED, UNAUTHORIZED)
        await error_response(body, {"www-authenticate": "Bearer"})(scope, receive, send)


def _bearer(scope: Scope) -> bytes:
    """The key of a request; empty where it has none."""
    header: bytes = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, key = header.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""
