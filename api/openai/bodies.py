"""The bodies of answers, as OpenAI's clients know them, and of errors.

msgspec encodes them in a microsecond, where a dict takes ten.
"""

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Literal

import msgspec
from starlette.responses import Response

from api.errors import OverloadedError, RequestError, http_status
from weights.errors import GalaxylineError

DONE_EVENT = b"data: [DONE]\n\n"

MESSAGE_CHARACTERS_MAX = 500

RETRY_AFTER_S = 2
"""The Retry-After of a 503: loading and recovery take seconds to minutes."""

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "PayloadTooLargeError",
    429: "RateLimitError",
    431: "HeadersTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}
"""The names of error types by HTTP status, as vLLM has them."""

INTERNAL_ERROR = "The server failed on this request; its log has the cause."
"""The public sentence of an error that has none of its own."""

_ENCODER = msgspec.json.Encoder()


class CompletionTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """The completion tokens by kind."""

    reasoning_tokens: int


class PromptTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """The prompt tokens by where they came from: those that were cached were not computed."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts. Completion tokens are all that were sampled, with the one that a completion stopped at (EOS)."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> "Usage":
        """The counts with their sum; `cached_tokens` are those of the prompt."""
        return cls(
            prompt_tokens=prompt_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            completion_tokens=completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        )

    @property
    def cached_tokens(self) -> int:
        """The prompt tokens that were cached."""
        return self.prompt_tokens_details.cached_tokens

    def with_reasoning(self, tokens: int) -> "Usage":
        """The same counts, and how many of the completion tokens are thought."""
        return msgspec.structs.replace(self, completion_tokens_details=CompletionTokensDetails(reasoning_tokens=tokens))


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "galaxyline"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /tokenize; `token_strs` spells them as the vocabulary does."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizedText(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /detokenize."""

    prompt: str


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /health, /ping, /ready and /live with status 200."""

    status: str


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /load: the number of completions that have not ended."""

    server_load: int


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /version."""

    version: str


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """An error: `type` follows from the HTTP status `code`, and `param` is the request's field at fault."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer that is not 2xx, and of an error within a stream."""

    error: ErrorDetail


WriteError = Callable[[ErrorBody], bytes]
"""Writes an error as the clients of a route know errors."""


def encode(message: msgspec.Struct) -> bytes:
    """Encodes one of the structs above as JSON."""
    return _ENCODER.encode(message)


def event(message: msgspec.Struct) -> bytes:
    """Encodes one server-sent event; clients split the stream at the blank line after it."""
    return b"data: " + _ENCODER.encode(message) + b"\n\n"


def named_event(message: msgspec.Struct) -> bytes:
    """Encodes one server-sent event whose name is the type that the struct's tag says."""
    name = f"{type(message).__struct_config__.tag}"
    return b"event: " + name.encode() + b"\n" + event(message)


def error_body(error: GalaxylineError) -> ErrorBody:
    """The body for one of the project's errors: its public sentence, never its text."""
    param = error.param if isinstance(error, RequestError) else None
    return status_body(http_status(error), error.public or INTERNAL_ERROR, param)


def refusal(error: GalaxylineError, headers: Mapping[str, str], write: WriteError = encode) -> Response:
    """The HTTP answer for one of the project's errors, with these headers; an overload adds when to try again."""
    if isinstance(error, OverloadedError):
        headers = {**headers, "retry-after": str(error.retry_after_s)}
    return error_response(error_body(error), headers, write)


def status_body(status: int, message: str, param: str | None = None) -> ErrorBody:
    """The body for an HTTP status."""
    kind = TYPES.get(status) or HTTPStatus(status).phrase.replace(" ", "") + "Error"
    return ErrorBody(error=ErrorDetail(message=message[:MESSAGE_CHARACTERS_MAX], type=kind, param=param, code=status))


def error_response(body: ErrorBody, headers: Mapping[str, str] | None = None, write: WriteError = encode) -> Response:
    """The HTTP answer for a body, with Retry-After where trying again may help; `write` knows the route's form."""
    headers = dict(headers or {})
    if body.error.code == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["retry-after"] = str(RETRY_AFTER_S)
    return Response(write(body), body.error.code, headers, media_type="application/json")
