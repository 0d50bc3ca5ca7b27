"""The server that a command asks over HTTP: its address, its key, and what its silence or its refusals mean."""

import http.client
import ssl
import urllib.error
import urllib.request
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import urlsplit

import click
import msgspec

from api.cli.options import DEFAULT_IN_WORDS
from api.errors import EngineError, NoServerError, OptionError
from api.settings.server import KEY_VARIABLES, KEYS_IN_WORDS
from weights.errors import GalaxylineError

ANSWER_TIMEOUT_S = 10.0
"""How long the server may take to answer; it gives its engine half as long."""

API_PREFIX = "/v1"
"""What clients have at the end of the address that they are given, and not all paths lie below."""

Answer = TypeVar("Answer")

server_url = click.option(
    "--url", default="http://127.0.0.1:8000", show_default=True, help="The server's address; http:// may be left out."
)
server_key = click.option(
    "--api-key",
    envvar=KEY_VARIABLES,
    help=f"A key of the server, where it wants one.{DEFAULT_IN_WORDS.format(KEYS_IN_WORDS)}",
)


class Server:
    """A server that is asked over HTTP."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Raises OptionError where `url` is not an HTTP address, or the key cannot be sent."""
        self.base = base_url(url)
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise OptionError("An API key must be printable ASCII: this one cannot be sent.")
        self._key = api_key
        # A server that is named by its address is not to be reached through a proxy for the web.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str, kind: type[Answer]) -> Answer:
        """The answer of this `kind` to GET. Raises like `open`, and NoServerError where it is of another one."""
        try:
            with self.open(path) as response:
                return msgspec.json.decode(response.read(), type=kind)
        except msgspec.DecodeError as error:
            raise self._other_server() from error
        except (OSError, http.client.HTTPException) as error:
            raise self._no_answer(error, ANSWER_TIMEOUT_S) from error

    def open(
        self, path: str, body: bytes | None = None, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> http.client.HTTPResponse:
        """The answer to GET, or with a body to POST, which the caller reads and closes. A wait is at most `timeout_s`.

        Raises OptionError where the key is refused, NoServerError where no galaxyline server answers, and EngineError
        with the server's sentence where it answers with an error.
        """
        headers = {} if self._key is None else {"authorization": f"Bearer {self._key}"}
        if body is not None:
            headers["content-type"] = "application/json"
        request = urllib.request.Request(self.base + path, body, headers)  # noqa: S310  # base_url has looked
        try:
            response: http.client.HTTPResponse = self._opener.open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error, is_path_known=body is not None) from error
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise self._no_answer(error, timeout_s) from error
        return response

    def lost(self, error: Exception, timeout_s: float) -> NoServerError:
        """The error for an answer that breaks off."""
        if isinstance(error, TimeoutError):
            return self._no_answer(error, timeout_s)
        return NoServerError(f"The server at {self.base} has ended its answer early: {error or type(error).__name__}.")

    def _refusal(self, error: urllib.error.HTTPError, *, is_path_known: bool) -> GalaxylineError:
        from api.openai.bodies import ErrorBody  # noqa: PLC0415 - imports starlette

        if error.code == HTTPStatus.UNAUTHORIZED:
            what = "wants a key" if self._key is None else "does not know this key"
            return OptionError(
                f"The server at {self.base} {what}: give one of its keys with --api-key, or in ${KEY_VARIABLES[0]}."
            )
        try:
            body = msgspec.json.decode(error.read(), type=ErrorBody)
        except msgspec.DecodeError:
            return self._other_server()
        if error.code == HTTPStatus.NOT_FOUND and not is_path_known:
            return self._other_server()
        return EngineError(f"The server at {self.base} answers: {body.error.message}")

    def _other_server(self) -> NoServerError:
        return NoServerError(
            f"What answers at {self.base} is not a galaxyline server: give the address of one with --url."
        )

    def _no_answer(self, error: Exception, timeout_s: float) -> NoServerError:
        base = self.base
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            return NoServerError(
                f"The certificate of {base} is not trusted ({cause.verify_message}): name the one that signed it in "
                "SSL_CERT_FILE."
            )
        if isinstance(cause, ssl.SSLError):
            return NoServerError(f"What answers at {base} does not speak TLS: write http:// in place of https://.")
        if isinstance(cause, http.client.HTTPException | ConnectionResetError):
            hint = " If it serves HTTPS, write https://." if base.startswith("http:") else ""
            return NoServerError(f"What answers at {base} does not speak HTTP.{hint}")
        if isinstance(cause, TimeoutError):
            return NoServerError(f"The server at {base} has not answered within {timeout_s:g} s.")
        return NoServerError(f"No server answers at {base}: start one, or give its address with --url.")


def base_url(url: str) -> str:
    """The address of a server: http:// where nothing is said, and without the /v1 that clients are given.

    Raises OptionError where it is not an HTTP address.
    """
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        is_http = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_http = False
    if not is_http:
        raise OptionError(f"--url {url!r} is not an HTTP address: write it like http://127.0.0.1:8000.")
    return full.rstrip("/").removesuffix(API_PREFIX).rstrip("/")
