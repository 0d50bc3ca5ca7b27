"""The description of the routes in GET /openapi.json, made from the types that read bodies and write answers."""

import html
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import HTMLResponse, Response

from api.openai.anthropic.answer import AnthropicMessage, TokenCount
from api.openai.anthropic.errors import AnthropicError
from api.openai.bodies import (
    DetokenizedText,
    ErrorBody,
    Load,
    ModelCard,
    ModelList,
    Status,
    Tokens,
    Version,
)
from api.openai.chat_answer import ChatCompletion, ChatCompletionChunk
from api.openai.completions import Completion
from api.openai.responses.answer import ResponseObject
from api.server.request import REQUEST_ID_HEADER, TIMEOUT_HEADER

REF = "#/components/schemas/{}"

ANSWERS = (
    AnthropicError,
    AnthropicMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    DetokenizedText,
    ErrorBody,
    Load,
    ModelCard,
    ModelList,
    ResponseObject,
    Status,
    TokenCount,
    Tokens,
    Version,
)

ERRORS = {
    400: "A field is wrong, or does not fit the model.",
    401: "The request has no valid API key.",
    404: "This server has no such model.",
    408: "The request was not complete in time.",
    413: "The body is too large.",
    429: "Too many requests wait.",
    431: "The header is too large.",
    500: "The server failed; its log has the cause.",
    503: "The model is loading, or no token can be made.",
    504: "The request's time was over before its answer was complete.",
}
BODY_ERRORS = (400, 404, 408, 413, 431)
EVERYWHERE = (401, 500)

KEYS = {
    "API key": {"type": "http", "scheme": "bearer"},
    "API key of Anthropic's clients": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
"""The security schemes: each is enough."""

_RETRY_AFTER = {"retry-after": {"description": "Seconds.", "schema": {"type": "integer"}}}
_REQUEST_ID = {REQUEST_ID_HEADER: {"description": "The request's id.", "schema": {"type": "string"}}}

Description = dict[str, Any]
"""A part of an OpenAPI document."""


class DescribedApp(FastAPI):
    """A FastAPI application whose OpenAPI document has the schemas that its routes refer to.

    Where `guards` is set, the document says which of the paths need a key.
    """

    bodies: Sequence[type[BaseModel]] = ()
    answers: Sequence[type[msgspec.Struct]] = ANSWERS
    guards: Callable[[str], bool] | None = None

    def openapi(self) -> Description:
        """The OpenAPI document, made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            components = document.setdefault("components", {})
            schemas = components.setdefault("schemas", {})
            template = REF.format("{model}")
            _, bodies = models_json_schema([(kind, "validation") for kind in self.bodies], ref_template=template)
            schemas.update(bodies.get("$defs", {}))
            _, answers = msgspec.json.schema_components(self.answers, ref_template=REF.format("{name}"))
            schemas.update(answers)
            if self.guards is not None:
                components["securitySchemes"] = KEYS
                for path, operations in document["paths"].items():
                    for operation in operations.values():
                        operation["security"] = [{name: []} for name in KEYS] if self.guards(path) else []
        return super().openapi()


def add_route(
    app: FastAPI,
    path: str,
    handler: Callable[..., Awaitable[Response]],
    answers: dict[int | str, Description],
    summary: str,
    *,
    method: str = "GET",
    more: Description | None = None,
) -> None:
    """Adds a route, described by a sentence for users and `more` of its OpenAPI operation; with GET, HEAD too."""
    shared: dict[str, Any] = {"response_model": None, "response_class": Response}
    name = "_".join(re.findall(r"\w+", path.partition(":")[0]))
    app.add_api_route(
        path,
        handler,
        methods=[method],
        responses=answers,
        summary=summary,
        # Where it is left out, the handler's docstring is shown, which is for developers.
        description=summary,
        operation_id=f"{method.lower()}_{name}",
        openapi_extra=more,
        **shared,
    )
    if method == "GET":
        app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False, **shared)


def add_docs_page(app: FastAPI) -> None:
    """Adds /docs: the routes as a plain page, as FastAPI's own would be loaded from another server."""

    async def docs() -> Response:
        rows = "".join(
            f"<tr><td><code>{method.upper()} {html.escape(path)}</code></td>"
            f"<td>{html.escape(operation['summary'])}</td></tr>"
            for path, operations in app.openapi()["paths"].items()
            for method, operation in operations.items()
        )
        return HTMLResponse(
            f"<!doctype html><title>{app.title}</title><h1>{app.title} {app.version}</h1>"
            f'<p>Bodies, answers and errors: <a href="openapi.json">openapi.json</a>.</p><table>{rows}</table>'
        )

    app.add_api_route("/docs", docs, include_in_schema=False)


def body_of(kind: type[BaseModel]) -> Description:
    """Describes the request body of a route, for `openapi_extra`."""
    return {"requestBody": {"required": True, "content": _json_of(kind)}}


def timeout_header() -> Description:
    """Describes the header that bounds a request's time."""
    schema = {"type": "number", "exclusiveMinimum": 0}
    return {"name": TIMEOUT_HEADER, "in": "header", "required": False, "schema": schema}


def answers_of(
    kind: type[msgspec.Struct], *errors: int, error: type[msgspec.Struct] = ErrorBody
) -> dict[int | str, Description]:
    """Describes the answers of a route, for `responses`: 200 with `kind`, these errors, and those of every route."""
    ok: Description = {"description": "OK", "content": _json_of(kind)}
    return {200: ok, **errors_of(*errors, error=error)}


def object_answer(*errors: int) -> dict[int | str, Description]:
    """Describes the answers of a route that gives any JSON object."""
    ok: Description = {"description": "OK", "content": {"application/json": {"schema": {"type": "object"}}}}
    return {200: ok, **errors_of(*errors)}


def empty_answer(*errors: int) -> dict[int | str, Description]:
    """Describes the answers of a route that says nothing but that it is done."""
    return {200: {"description": "OK"}, **errors_of(*errors)}


def text_answer() -> dict[int | str, Description]:
    """Describes the answers of a route that gives plain text."""
    ok: Description = {"description": "OK", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {200: ok, **errors_of()}


def errors_of(*errors: int, error: type[msgspec.Struct] = ErrorBody) -> dict[int | str, Description]:
    """Describes these errors and those of every route, for `responses`, with `error` as their body."""
    described: dict[int | str, Description] = {}
    for status in sorted({*errors, *EVERYWHERE}):
        described[status] = {"description": ERRORS[status], "content": _json_of(error)}
        if status in {429, 503}:
            described[status]["headers"] = _RETRY_AFTER
    return described


def generation_answers(
    kind: type[msgspec.Struct], event: str, error: type[msgspec.Struct] = ErrorBody
) -> dict[int | str, Description]:
    """Describes the answers of a route that generates: one object of this `kind`, or events, each of them `event`."""
    answers = answers_of(kind, *BODY_ERRORS, 429, 503, 504, error=error)
    schema = {
        "type": "object",
        "description": f"A server-sent event: {event}.",
        "properties": {"data": {"type": "string"}},
        "required": ["data"],
    }
    answers[200]["content"]["text/event-stream"] = {"schema": schema}
    answers[200]["headers"] = _REQUEST_ID
    return answers


def _json_of(kind: type) -> Description:
    return {"application/json": {"schema": {"$ref": REF.format(kind.__name__)}}}
