"""GET /openapi.json describes the server truly, for requests that schemathesis derives from it."""

import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.types import Receive, Scope, Send

from api.server.app import create_app
from api.server.request import TIMEOUT_HEADER
from tests.support.api_server import MODEL, endless_text
from tests.support.fake_engine import FakeEngine

pytest_plugins = ["schemathesis.pytest.plugin"]

EXAMPLES = 500 if os.environ.get("GALAXYLINE_FULL") else 40
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]

server = create_app(MODEL, FakeEngine(endless_text))


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """The server; it stays up while schemathesis starts and stops an application with each request."""
    if scope["type"] != "lifespan":
        await server(scope, receive, send)
        return
    for _ in range(2):
        await send({"type": f"{(await receive())['type']}.complete"})


schema = schemathesis.openapi.from_asgi("/openapi.json", application)


@pytest.mark.slow
@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    # Without shrinking, which takes minutes: the failure has the whole request anyway.
    phases=[Phase.explicit, Phase.generate],
)
def test_every_answer_is_as_described(case: schemathesis.Case[Any]) -> None:
    # A request that gives the server no time gets 504, and rightly so.
    case.headers.pop(TIMEOUT_HEADER, None)
    case.call_and_validate(checks=CHECKS)


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/detokenize", "/v1/models", "/v1/models/{name}"])
def test_the_routes_of_the_api_are_described(path: str) -> None:
    [operation] = schema[path].values()
    assert {"200", "401", "500"} <= set(operation.definition.raw["responses"])
