"""The options of the HTTP front end that protect it: queue limits, deadlines, API keys and TLS."""

import functools
import hashlib
import hmac
import os
import ssl
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from api.errors import OptionError
from api.settings.parameters import COUNT, SECONDS, with_options

KEY_VARIABLES = ("GALAXYLINE_API_KEY", "VLLM_API_KEY")
KEY_FILE_BYTES_MAX = 1 << 20


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


DEFAULT_CLIENT_TIMEOUT_S = 30.0

DEFAULT_QUEUED_REQUESTS_MIN = 256
DEFAULT_QUEUED_REQUESTS_PER_SLOT = 8
DEFAULT_QUEUED_TOKENS = 1 << 20
"""A list of so many token ids takes about 40 MB in the front end and as much in the engine."""


class QueueLimits(msgspec.Struct, frozen=True, kw_only=True):
    """`slots` completions run at once, `requests` more may wait, and those that have not begun to answer may have
    `tokens` tokens of prompts together. The limits bind only while all slots are taken.
    """

    slots: int
    requests: int
    tokens: int

    @classmethod
    def of(
        cls, slots: int, max_model_len: int, requests: int | None = None, tokens: int | None = None
    ) -> "QueueLimits":
        """The limits for an engine of so many slots, with defaults for what is None.

        By default 8 completions may wait for each slot, and 256 at least; and a million tokens of prompts, or one
        prompt of the greatest length where that is more.
        """
        return cls(
            slots=slots,
            requests=max(DEFAULT_QUEUED_REQUESTS_MIN, DEFAULT_QUEUED_REQUESTS_PER_SLOT * slots)
            if requests is None
            else requests,
            tokens=max(DEFAULT_QUEUED_TOKENS, max_model_len) if tokens is None else tokens,
        )


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
