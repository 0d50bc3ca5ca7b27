"""The options of the server: where it listens, and what protects it: queue limits, deadlines, API keys and TLS."""

import hashlib
import hmac
import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from api.errors import OptionError
from api.settings.chat import ChatOptions
from api.settings.engine import EngineSettings
from api.text.model_source import ModelSource
from api.text.served_model import DEFAULT_MAX_LOGPROBS, MODELS_OWN, NO_ADVICE, WHOLE_VOCABULARY

KEY_VARIABLES = ("GALAXYLINE_API_KEY", "VLLM_API_KEY")
KEYS_IN_WORDS = f"${', then $'.join(KEY_VARIABLES)}"
KEY_FILE_BYTES_MAX = 1 << 20


KeyScope = Literal["all", "v1"]

OPEN_PATHS = frozenset({"/health", "/live", "/ready", "/ping"})
"""The paths that need no key, for orchestrators: their answers have nothing but whether the server works."""

RESET_PATH = "/reset_prefix_cache"
"""The path of an order, which is for whoever has a key, however few paths need one."""


class ApiKeys:
    """A set of keys, kept as SHA-256 digests alone, so that nothing that prints or logs this object shows a key."""

    def __init__(self, keys: Iterable[str], scope: KeyScope = "all") -> None:
        self._digests = [_digest(key.encode()) for key in dict.fromkeys(keys)]
        self._scope = scope

    def __repr__(self) -> str:
        return f"{len(self._digests)} API keys"

    @classmethod
    def read(
        cls,
        given: Iterable[str],
        file: Path | None,
        environment: Mapping[str, str],
        scope: KeyScope = "all",
    ) -> "ApiKeys | None":
        """The keys of the command line and of the file, one a line; without either, the environment's.

        Returns None without keys. Raises OptionError where the file cannot be read or holds no key, or where
        a header cannot carry a key.
        """
        keys = [*given, *([] if file is None else _lines(file))]
        if not keys and file is None:
            keys = [environment[name] for name in KEY_VARIABLES if environment.get(name)][:1]
        if not all(key.isascii() and key.isprintable() and key.strip() == key and key for key in keys):
            raise OptionError("An API key must be printable ASCII without spaces at its ends, and not empty.")
        return cls(keys, scope) if keys else None

    def guard(self, path: str) -> bool:
        """Whether requests to a path need a key."""
        if self._scope == "v1":
            return path in {"/v1", RESET_PATH} or path.startswith("/v1/")
        return path not in OPEN_PATHS

    def accepts(self, key: bytes) -> bool:
        """Whether `key` is one of the keys; takes as long for any key."""
        digest = _digest(key)
        # Compared with all of them, whichever it is, so that the time does not show how far the search went.
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
        raise OptionError(f"--api-key-file {file} is not a text file.") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys or len(content) > KEY_FILE_BYTES_MAX:
        raise OptionError(
            f"--api-key-file {file} must have a key on each line, and at most {KEY_FILE_BYTES_MAX} bytes."
        )
    return keys


DEFAULT_CLIENT_TIMEOUT_S = 30.0
DEFAULT_KEEP_ALIVE_S = 75.0
"""Longer than balancers keep theirs (nginx and AWS: 60 s), as they would send requests into closed ones."""

DEFAULT_QUEUED_REQUESTS_MIN = 256
DEFAULT_QUEUED_REQUESTS_PER_SLOT = 8
DEFAULT_QUEUED_TOKENS = 1 << 20
"""How many tokens of prompts may wait: as a list of ids about 40 MB in the front end, and as much in the engine."""


class QueueLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much may wait while all slots are taken.

    `slots` completions run at once, `requests` more may wait, and the prompts of those that have not begun to answer
    may have `tokens` tokens together.
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


class TlsFiles(msgspec.Struct, frozen=True, kw_only=True):
    """PEM files of the server's certificate and key; with `ca_certs` clients have to bring a certificate too."""

    certfile: Path
    keyfile: Path | None = None
    ca_certs: Path | None = None

    @classmethod
    def of(cls, certfile: Path | None, keyfile: Path | None, ca_certs: Path | None) -> "TlsFiles | None":
        """The files that are given, checked; None without a certificate.

        Raises OptionError where they do not make a server's identity.
        """
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


class CorsOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which pages of other origins a browser lets use the server; none without `allowed_origins`.

    Raises OptionError for a value that begins like a JSON list and is not one of strings.
    """

    allowed_origins: Annotated[
        list[str],
        Meta(
            description="An origin whose pages may use the server from a browser, or * for all; may be given several "
            "times, or as a JSON list.",
            extra={"default": "none"},
        ),
    ] = []
    allowed_methods: Annotated[
        list[str],
        Meta(description="A method that such pages may use, like --allowed-origins.", extra={"default": "all"}),
    ] = []
    allowed_headers: Annotated[
        list[str],
        Meta(description="A header that such pages may send, like --allowed-origins.", extra={"default": "all"}),
    ] = []
    allow_credentials: Annotated[bool, Meta(description="Let such pages send cookies and HTTP credentials.")] = False

    def __post_init__(self) -> None:
        _ = self.middleware_options

    @property
    def middleware_options(self) -> dict[str, Any]:
        """The arguments of Starlette's CORSMiddleware."""
        return {
            "allow_origins": _listed("--allowed-origins", self.allowed_origins),
            "allow_methods": _listed("--allowed-methods", self.allowed_methods) or ["*"],
            "allow_headers": _listed("--allowed-headers", self.allowed_headers) or ["*"],
            "allow_credentials": self.allow_credentials,
        }


def _listed(flag: str, given: Iterable[str]) -> list[str]:
    """The values of an option, of which each may be a JSON list of several."""
    values: list[str] = []
    for value in given:
        try:
            values += msgspec.json.decode(value, type=list[str]) if value.startswith("[") else [value]
        except msgspec.DecodeError as error:
            raise OptionError(f"{flag} {value!r} is not a JSON list of strings.") from error
    return values


class FrontSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The options that protect the HTTP front end.

    Counts are of completions and of tokens, by default as `QueueLimits.of` has them; times are in seconds. Without
    `request_timeout_s` the server sets no deadline of its own.
    """

    max_num_queued_reqs: (
        Annotated[
            int,
            Meta(
                ge=0,
                description="Completions that may wait beside those that run; more get 429.",
                extra={"default": "8 a slot, 256 at least"},
            ),
        ]
        | None
    ) = None
    max_num_queued_tokens: (
        Annotated[
            int,
            Meta(
                ge=1,
                description="Prompt tokens of completions that have not begun; more get 429.",
                extra={"default": str(DEFAULT_QUEUED_TOKENS)},
            ),
        ]
        | None
    ) = None
    request_timeout_s: (
        Annotated[
            float,
            Meta(
                gt=0,
                description="Seconds that a request may take in all; the header X-Request-Timeout may give less.",
                extra={"default": "no limit"},
            ),
        ]
        | None
    ) = None
    client_timeout_s: Annotated[
        float,
        Meta(
            gt=0,
            description="Seconds that a client may take to send its request, and to read on where its buffer is full.",
        ),
    ] = DEFAULT_CLIENT_TIMEOUT_S
    timeout_keep_alive_s: Annotated[
        float, Meta(gt=0, description="Seconds that a connection without requests is kept open.")
    ] = DEFAULT_KEEP_ALIVE_S
    root_path: (
        Annotated[
            str,
            Meta(
                description="What a proxy puts before all paths, like /models/r1, and takes off again or not.",
                extra={"default": "nothing"},
            ),
        ]
        | None
    ) = None
    cors: CorsOptions = CorsOptions()
    chat: ChatOptions = ChatOptions()
    api_keys: ApiKeys | None = None
    tls: TlsFiles | None = None

    def __post_init__(self) -> None:
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise OptionError(f"--root-path {self.root_path!r} must begin with a slash and not end with one.")

    def queue_limits(self, slots: int, max_model_len: int) -> QueueLimits:
        """The limits for engines of so many slots together."""
        return QueueLimits.of(slots, max_model_len, self.max_num_queued_reqs, self.max_num_queued_tokens)


class KeyOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The API keys that clients may bring; to be made into `ApiKeys` at once, as this object shows them."""

    api_key: Annotated[
        list[str],
        Meta(
            description="A key that clients have to bring; may be given several times. Others of this host see it: "
            "better in a file or the environment.",
            extra={"default": KEYS_IN_WORDS},
        ),
    ] = []
    api_key_file: Annotated[Path | None, Meta(description="A file with a key on each line.")] = None
    api_key_scope: Annotated[
        KeyScope,
        Meta(
            description="What needs a key: all but /health, /ready, /live and /ping, or like vLLM what is below /v1, "
            "and /reset_prefix_cache, so that /metrics, /tokenize and the others are open."
        ),
    ] = "all"

    def read(self, environment: Mapping[str, str]) -> ApiKeys | None:
        """The keys; None where there are none. Raises OptionError like `ApiKeys.read`."""
        return ApiKeys.read(self.api_key, self.api_key_file, environment, self.api_key_scope)


class TlsOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The files that HTTPS needs, in PEM."""

    ssl_certfile: Annotated[Path | None, Meta(description="The server's certificate, in PEM: serve HTTPS.")] = None
    ssl_keyfile: Annotated[
        Path | None, Meta(description="The certificate's key, where it is in a file of its own.")
    ] = None
    ssl_ca_certs: Annotated[
        Path | None, Meta(description="Clients have to bring a certificate that one of these has signed.")
    ] = None


class ServeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `serve`.

    With the engine's seed, requests that bring none get the same one in every run.
    """

    source: ModelSource
    host: Annotated[str, Meta(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="0 takes any free one.")] = 8000
    replicas: Annotated[
        int,
        Meta(
            ge=1,
            description="Pipelines of this kind, independent of each other; a request goes to the one with the fewest.",
            extra={"flags": ("--replicas", "--data-parallel-size", "-dp")},
        ),
    ] = 1
    shutdown_timeout_s: Annotated[
        float, Meta(gt=0, description="Seconds that open requests have to end after SIGINT or SIGTERM.")
    ] = 5.0
    max_logprobs: Annotated[
        int,
        Meta(
            ge=WHOLE_VOCABULARY,
            description="Log-probabilities that a request may ask for at each position; -1: as many as the vocabulary "
            "has tokens.",
        ),
    ] = DEFAULT_MAX_LOGPROBS
    generation_config: Annotated[
        str,
        Meta(
            description=f"Where defaults of requests come from: {MODELS_OWN}: the model's generation_config.json; "
            f"{NO_ADVICE}: vLLM's own; or a directory with such a file."
        ),
    ] = MODELS_OWN
    front: FrontSettings = FrontSettings()
    engine: EngineSettings
