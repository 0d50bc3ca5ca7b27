"""The keys that clients have to bring, and the application in front that asks for one."""

from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from api.openai.responses import error_response, status_body
from api.settings.server import ApiKeys

OPEN_PATHS = frozenset({"/health", "/live", "/ready"})
"""What orchestrators ask needs no key: the answers say nothing but whether the server works."""

UNAUTHORIZED = "No valid API key came with the request: send the header Authorization: Bearer KEY."


class Authentication:
    """An application in front of another: it answers 401 to what comes without a key, but for OPEN_PATHS."""

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
    """The key that a request brings; empty where it brings none."""
    header: bytes = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, key = header.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""
