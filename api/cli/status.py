"""`galaxyline status`: the stages of a running server, as a table that follows them or as JSON."""

import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click
import msgspec

from api.cli.options import DEFAULT_IN_WORDS
from api.cli.parameters import LoggedCommand, begin_work, result_console
from api.errors import EngineError, NoServerError, OptionError
from api.messages.pipeline_view import PipelineView
from api.settings.server import KEY_VARIABLES, KEYS_IN_WORDS

if TYPE_CHECKING:
    from rich.console import Console

ANSWER_TIMEOUT_S = 10.0
"""How long the server may take to answer; it gives its engine half as long."""

REFRESH_S = 1.0

API_PREFIX = "/v1"
"""What clients have at the end of the address that they are given, and `/pipeline` does not lie below."""


@click.command("status", cls=LoggedCommand)
@click.option(
    "--url", default="http://127.0.0.1:8000", show_default=True, help="The server's address; http:// may be left out."
)
@click.option(
    "--api-key",
    envvar=KEY_VARIABLES,
    help=f"A key of the server, where it wants one.{DEFAULT_IN_WORDS.format(KEYS_IN_WORDS)}",
)
@click.option("--once", is_flag=True, help="Print one look and end; so it is where the output is not a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print one look as JSON.")
def status_command(url: str, api_key: str | None, once: bool, as_json: bool) -> None:
    """Show what the stages of a running server do, until Ctrl-C."""
    if as_json:
        click.echo(msgspec.json.encode(read_view(url, api_key)))
        return
    from api.cli.tables import pipeline_text  # noqa: PLC0415 - imports rich

    console = result_console()
    if once or not console.is_terminal:
        console.print(pipeline_text(read_view(url, api_key)))
    else:
        follow(console, lambda: read_view(url, api_key))


def read_view(url: str, api_key: str | None = None) -> PipelineView:
    """Gets the state of the pipelines from the server at `url`, with a key where it wants one.

    Raises OptionError where `url` is not an HTTP address or the key is refused, NoServerError where no galaxyline
    server answers there, and EngineError with the server's sentence where it answers with an error.
    """
    base = base_url(url)
    # A server that is named by its address is not to be reached through a proxy for the web.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(_request(base, api_key), timeout=ANSWER_TIMEOUT_S) as response:
            return msgspec.json.decode(response.read(), type=PipelineView)
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(base, error, api_key) from error
    except msgspec.DecodeError as error:
        raise _other_server(base) from error
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise _no_answer(base, error) from error


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


def _request(base: str, api_key: str | None) -> urllib.request.Request:
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise OptionError("An API key must be printable ASCII: this one cannot be sent.")
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    return urllib.request.Request(f"{base}/pipeline", headers=headers)  # noqa: S310  # base_url has looked


def _refusal(
    base: str, error: urllib.error.HTTPError, api_key: str | None
) -> OptionError | EngineError | NoServerError:
    from api.openai.bodies import ErrorBody  # noqa: PLC0415 - imports starlette

    if error.code == HTTPStatus.UNAUTHORIZED:
        what = "wants a key" if api_key is None else "does not know this key"
        return OptionError(
            f"The server at {base} {what}: give one of its keys with --api-key, or in ${KEY_VARIABLES[0]}."
        )
    try:
        body = msgspec.json.decode(error.read(), type=ErrorBody)
    except msgspec.DecodeError:
        return _other_server(base)
    if error.code == HTTPStatus.NOT_FOUND:
        return _other_server(base)
    return EngineError(f"The server at {base} answers: {body.error.message}")


def _other_server(base: str) -> NoServerError:
    return NoServerError(f"What answers at {base} is not a galaxyline server: give the address of one with --url.")


def _no_answer(base: str, error: Exception) -> NoServerError:
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
        return NoServerError(f"The server at {base} has not answered within {ANSWER_TIMEOUT_S:g} s.")
    return NoServerError(f"No server answers at {base}: start one, or give its address with --url.")


def follow(console: "Console", read: Callable[[], PipelineView], sleep: Callable[[float], None] = time.sleep) -> None:
    """Shows what `read` returns, every second, until Ctrl-C, or until a server that was stopping is gone.

    Raises what `read` raises otherwise.
    """
    from rich.live import Live  # noqa: PLC0415 - --help does without

    from api.cli.tables import pipeline_text  # noqa: PLC0415

    view = read()
    begin_work()
    with Live(pipeline_text(view), console=console, auto_refresh=False) as live:
        try:
            while True:
                sleep(REFRESH_S)
                view = read()
                live.update(pipeline_text(view), refresh=True)
        except KeyboardInterrupt:
            return
        except NoServerError:
            if view.phase != "stopping":
                raise
    console.print("The server has stopped.")
