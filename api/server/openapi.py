"""The description of the routes in GET /openapi.json, made from the types that read bodies and write answers."""

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from api.openai.responses import Completion, DetokenizedText, ErrorBody, ModelCard, ModelList, Status, Tokens, Version
from api.server.request import REQUEST_ID_HEADER, TIMEOUT_HEADER

REF = "#/components/schemas/{}"

ANSWERS = (Completion, DetokenizedText, ErrorBody, ModelCard, ModelList, Status, Tokens, Version)

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

EVENT = {
    "type": "object",
    "description": "A server-sent event: a Completion or an ErrorBody as JSON; the last one is [DONE].",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}

_RETRY_AFTER = {"retry-after": {"description": "Seconds.", "schema": {"type": "integer"}}}
_REQUEST_ID = {REQUEST_ID_HEADER: {"description": "The request's id.", "schema": {"type": "string"}}}

Description = dict[str, Any]
"""A part of an OpenAPI document."""


class DescribedApp(FastAPI):
    """A FastAPI application whose OpenAPI document has the schemas that its routes refer to."""

    bodies: Sequence[type[BaseModel]] = ()
    answers: Sequence[type[msgspec.Struct]] = ANSWERS

    def openapi(self) -> Description:
        """The OpenAPI document, made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            template = REF.format("{model}")
            _, bodies = models_json_schema([(kind, "validation") for kind in self.bodies], ref_template=template)
            schemas.update(bodies.get("$defs", {}))
            _, answers = msgspec.json.schema_components(self.answers, ref_template=REF.format("{name}"))
            schemas.update(answers)
        return super().openapi()


def body_of(kind: type[BaseModel]) -> Description:
    """Describes the request body of a route, for `openapi_extra`."""
    return {"requestBody": {"required": True, "content": _json_of(kind)}}


def timeout_header() -> Description:
    """Describes the header that bounds a request's time."""
    schema = {"type": "number", "exclusiveMinimum": 0}
    return {"name": TIMEOUT_HEADER, "in": "header", "required": False, "schema": schema}


def answers_of(kind: type[msgspec.Struct], *errors: int) -> dict[int | str, Description]:
    """Describes the answers of a route, for `responses`: 200 with `kind`, these errors, and those of every route."""
    ok: Description = {"description": "OK", "content": _json_of(kind)}
    return {200: ok, **errors_of(*errors)}


def object_answer(*errors: int) -> dict[int | str, Description]:
    """Describes the answers of a route that gives any JSON object."""
    ok: Description = {"description": "OK", "content": {"application/json": {"schema": {"type": "object"}}}}
    return {200: ok, **errors_of(*errors)}


def text_answer() -> dict[int | str, Description]:
    """Describes the answers of a route that gives plain text."""
    ok: Description = {"description": "OK", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {200: ok, **errors_of()}


def errors_of(*errors: int) -> dict[int | str, Description]:
    """Describes these errors and those of every route, for `responses`."""
    described: dict[int | str, Description] = {}
    for status in sorted({*errors, *EVERYWHERE}):
        described[status] = {"description": ERRORS[status], "content": _json_of(ErrorBody)}
        if status in {429, 503}:
            described[status]["headers"] = _RETRY_AFTER
    return described


def completion_answers() -> dict[int | str, Description]:
    """Describes the answers of /v1/completions: one object, or a stream of events."""
    answers = answers_of(Completion, *BODY_ERRORS, 429, 503, 504)
    answers[200]["content"]["text/event-stream"] = {"schema": EVENT}
    answers[200]["headers"] = _REQUEST_ID
    return answers


def _json_of(kind: type) -> Description:
    return {"application/json": {"schema": {"$ref": REF.format(kind.__name__)}}}
