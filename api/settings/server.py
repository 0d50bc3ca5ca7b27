"""The options of the HTTP front end that protect it: queue limits, deadlines, API keys and TLS."""

import functools
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from api.errors import OptionError
from api.server.admission import QueueLimits
from api.server.api_keys import KEY_VARIABLES, ApiKeys
from api.server.client_protocol import DEFAULT_CLIENT_TIMEOUT_S
from api.settings.parameters import COUNT, SECONDS, with_options

FILE = click.Path(dir_okay=False, path_type=Path)


class TlsFiles(msgspec.Struct, frozen=True, kw_only=True):
    """PEM files of the server's certificate and key; with `ca_certs` clients have to bring a certificate of theirs."""

    certfile: Path
    keyfile: Path | None = None
    ca_certs: Path | None = None

    @classmethod
    def of(cls, certfile: Path | None, keyfile: Path | None, ca_certs: Path | None) -> "TlsFiles | None":
        """None without any. Raises OptionError where they do not make a server's identity."""
        if certfile is None:
            if keyfile is not None or ca_certs is not None:
                raise OptionError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile beside them.")
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(certfile, keyfile)
            if ca_certs is not None:
                context.load_verify_locations(ca_certs)
        except OSError as error:
            raise OptionError(f"The files of --ssl-certfile, --ssl-keyfile and --ssl-ca-certs: {error}.") from error
        return cls(certfile=certfile, keyfile=keyfile, ca_certs=ca_certs)

    @property
    def uvicorn_options(self) -> dict[str, Any]:
        """The arguments of uvicorn.Config."""
        verify = ssl.CERT_NONE if self.ca_certs is None else ssl.CERT_REQUIRED
        return {
            "ssl_certfile": self.certfile,
            "ssl_keyfile": self.keyfile,
            "ssl_ca_certs": None if self.ca_certs is None else str(self.ca_certs),
            "ssl_cert_reqs": verify,
        }


class FrontSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The front end's options. Counts are of completions and of tokens; times in seconds. None: see `QueueLimits.of`,
    and no deadline of the server's own."""

    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    request_timeout_s: float | None = None
    client_timeout_s: float = DEFAULT_CLIENT_TIMEOUT_S
    api_keys: ApiKeys | None = None
    tls: TlsFiles | None = None

    def queue_limits(self, slots: int, max_model_len: int) -> QueueLimits:
        """The limits for engines of so many slots together."""
        return QueueLimits.of(slots, max_model_len, self.max_num_queued_reqs, self.max_num_queued_tokens)


_OPTIONS = [
    click.option(
        "--max-num-queued-reqs",
        type=click.IntRange(min=0),
        help="Completions that may wait beside those that run; more get 429.  [default: 8 a slot, 256 at least]",
    ),
    click.option(
        "--max-num-queued-tokens",
        type=COUNT,
        help="Prompt tokens of completions that have not begun; more get 429.  [default: 1048576]",
    ),
    click.option(
        "--request-timeout",
        "request_timeout_s",
        type=SECONDS,
        help="Seconds that a request may take in all; the header X-Request-Timeout may give less.  [default: no limit]",
    ),
    click.option(
        "--client-timeout",
        "client_timeout_s",
        type=SECONDS,
        default=DEFAULT_CLIENT_TIMEOUT_S,
        show_default=True,
        help="Seconds that a client may take to send its request, and to read on where its buffer is full.",
    ),
    click.option(
        "--api-key",
        multiple=True,
        help="A key that clients have to bring; may be given several times. Others of this host see it: better in a "
        f"file or the environment.  [default: ${', then $'.join(KEY_VARIABLES)}]",
    ),
    click.option("--api-key-file", type=FILE, help="A file with a key on each line."),
    click.option("--ssl-certfile", type=FILE, help="The server's certificate, in PEM: serve HTTPS."),
    click.option("--ssl-keyfile", type=FILE, help="Its key, where it is in a file of its own."),
    click.option("--ssl-ca-certs", type=FILE, help="Clients have to bring a certificate that one of these has signed."),
]


def front_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the front end's options to a command, which gets them as `front`, a FrontSettings."""

    @functools.wraps(command)
    def with_settings(
        api_key: tuple[str, ...],
        api_key_file: Path | None,
        ssl_certfile: Path | None,
        ssl_keyfile: Path | None,
        ssl_ca_certs: Path | None,
        **options: Any,
    ) -> None:
        keys = ApiKeys.read(api_key, api_key_file, os.environ)
        for name in KEY_VARIABLES:
            # The engine and the stages have no use for it.
            os.environ.pop(name, None)
        tls = TlsFiles.of(ssl_certfile, ssl_keyfile, ssl_ca_certs)
        own = {name: options.pop(name) for name in FrontSettings.__struct_fields__ if name not in {"api_keys", "tls"}}
        command(front=FrontSettings(api_keys=keys, tls=tls, **own), **options)

    return with_options(with_settings, _OPTIONS)
