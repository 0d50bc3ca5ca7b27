"""The keys that clients have to bring, and the application in front that asks for one."""

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import OptionError
from api.openai.responses import error_response, status_body

KEY_VARIABLES = ("GALAXYLINE_API_KEY", "VLLM_API_KEY")
KEY_FILE_BYTES_MAX = 1 << 20

OPEN_PATHS = frozenset({"/health", "/live", "/ready"})
"""What orchestrators ask needs no key: the answers say nothing but whether the server works."""

UNAUTHORIZED = "No valid API key came with the request: send the header Authorization: Bearer KEY."


class ApiKeys:
    """A set of keys, known by their SHA-256 digests alone: nothing that prints or logs this object tells a key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in dict.fromkeys(keys)]

    def __repr__(self) -> str:
        return f"{len(self._digests)} API keys"

    @classmethod
    def read(cls, given: Iterable[str], file: Path | None, environment: Mapping[str, str]) -> "ApiKeys | None":
        """Those of the command line and of the file, one a line; without either, the environment's. None: no keys.

        Raises OptionError where the file cannot be read or holds no key, or a key is none that a header can carry.
        """
        keys = [*given, *([] if file is None else _lines(file))]
        if not keys and file is None:
            keys = [environment[name] for name in KEY_VARIABLES if environment.get(name)][:1]
        if not all(key.isascii() and key.isprintable() and key.strip() == key and key for key in keys):
            raise OptionError("An API key must be printable ASCII without spaces at its ends, and not empty.")
        return cls(keys) if keys else None

    def accepts(self, key: bytes) -> bool:
        """Whether it is one of the keys; takes as long for any key."""
        digest = _digest(key)
        # All of them, whichever it is: the time must not tell how far the search went.
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


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


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _lines(file: Path) -> list[str]:
    try:
        with file.open("rb") as opened:
            content = opened.read(KEY_FILE_BYTES_MAX + 1)
        lines = content.decode().splitlines()
    except OSError as error:
        raise OptionError(f"--api-key-file {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise OptionError(f"--api-key-file {file} is no text.") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys or len(content) > KEY_FILE_BYTES_MAX:
        raise OptionError(
            f"--api-key-file {file} must have a key on each line, and at most {KEY_FILE_BYTES_MAX} bytes."
        )
    return keys
