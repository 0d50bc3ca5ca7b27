"""From an error to the body and status a client gets."""

import re
from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import Response

from api.errors import OverloadedError, RequestError, http_status
from api.openai.responses import ErrorBody, ErrorDetail, encode
from weights.errors import GalaxylineError

MESSAGE_CHARACTERS_MAX = 500
RETRY_AFTER_S = 2
"""What a client is told to wait on 503: loading and recovery take seconds to minutes."""

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
"""Names of error types, as vLLM gives them."""

INTERNAL_ERROR = "The server failed on this request; its log says why."

_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])(?:/[^\s/'\"]+)+/?")
_TENSOR_NAME = re.compile(r"\b(?:model|lm_head)\.[\w.]+")


def error_body(error: GalaxylineError) -> ErrorBody:
    """The body for one of our errors; those that are not the client's own say nothing of files and tensors."""
    status = http_status(error)
    message = str(error) if isinstance(error, RequestError) else public_text(str(error))
    return status_body(status, message, error.param if isinstance(error, RequestError) else None)


def refusal(error: GalaxylineError, headers: Mapping[str, str]) -> Response:
    """The HTTP answer for one of our errors, with these headers; one of overload says when to try again."""
    if isinstance(error, OverloadedError):
        headers = {**headers, "retry-after": str(error.retry_after_s)}
    return error_response(error_body(error), headers)


def status_body(status: int, message: str, param: str | None = None) -> ErrorBody:
    """The body for an HTTP status."""
    kind = TYPES.get(status) or HTTPStatus(status).phrase.replace(" ", "") + "Error"
    return ErrorBody(error=ErrorDetail(message=message[:MESSAGE_CHARACTERS_MAX], type=kind, param=param, code=status))


def error_response(body: ErrorBody, headers: Mapping[str, str] | None = None) -> Response:
    """The HTTP answer for a body, with Retry-After where trying again may help."""
    headers = dict(headers or {})
    if body.error.code == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["retry-after"] = str(RETRY_AFTER_S)
    return Response(encode(body), body.error.code, headers, media_type="application/json")


def public_text(text: str) -> str:
    """The first line of `text` with absolute paths cut to their last part and tensors unnamed."""
    line = text.strip().partition("\n")[0]
    line = _ABSOLUTE_PATH.sub(lambda match: match.group().rstrip("/").rpartition("/")[2], line)
    return _TENSOR_NAME.sub("a tensor", line)
