"""Errors as Anthropic's clients know them, in answers and in streams."""

from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from api.openai.bodies import ErrorBody, WriteError, encode, named_event, refusal
from weights.errors import GalaxylineError

MESSAGES_PATH = "/v1/messages"

ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    431: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}
"""The names of error types by HTTP status, where they are not those of all 4xx and 5xx."""


class AnthropicErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """An error: `type` follows from the HTTP status."""

    type: str
    message: str


class AnthropicError(msgspec.Struct, frozen=True, kw_only=True, tag="error"):
    """The body of every answer that is not 2xx, and of an error within a stream."""

    error: AnthropicErrorDetail


def anthropic_error(body: ErrorBody) -> AnthropicError:
    """The same error in Anthropic's form."""
    status = body.error.code
    kind = ANTHROPIC_TYPES.get(status) or ("invalid_request_error" if status < 500 else "api_error")
    return AnthropicError(error=AnthropicErrorDetail(type=kind, message=body.error.message))


def anthropic_refusal(error: GalaxylineError, headers: Mapping[str, str]) -> Response:
    """The HTTP answer for one of the project's errors, with these headers."""
    return refusal(error, headers, _written)


def anthropic_error_event(body: ErrorBody) -> bytes:
    """The event of an error that ends a stream."""
    return named_event(anthropic_error(body))


def error_writer(path: str) -> WriteError:
    """What writes the errors of a path's clients."""
    return _written if path == MESSAGES_PATH or path.startswith(f"{MESSAGES_PATH}/") else encode


def _written(body: ErrorBody) -> bytes:
    return encode(anthropic_error(body))
