"""Requests to the application in this process, with an engine whose tokens are known."""

import json
from typing import Any

import httpx

from api.server.app import create_app
from api.settings.server import FrontSettings
from api.text.served_model import ServedModel
from tests.support.api_server import MODEL
from tests.support.fake_engine import FakeEngine

Events = list[dict[str, Any]]


def client(
    engine: FakeEngine, model: ServedModel = MODEL, seed: int | None = None, front: FrontSettings | None = None
) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(model, engine, seed, front=front), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def post(engine: FakeEngine, served: ServedModel = MODEL, /, **fields: Any) -> httpx.Response:
    async with client(engine, served) as opened:
        return await opened.post("/v1/completions", json={"prompt": "hello", **fields})


async def complete(engine: FakeEngine, served: ServedModel = MODEL, /, **fields: Any) -> dict[str, Any]:
    response = await post(engine, served, **fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(engine: FakeEngine, served: ServedModel = MODEL, /, **fields: Any) -> Events:
    """Returns the events of a stream, which must be framed as in the standard and end with [DONE]."""
    return events_of(await post(engine, served, stream=True, **fields))


def events_of(response: httpx.Response) -> Events:
    """Returns the events of a stream, which must be framed as in the standard and end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: ") and "\n" not in part for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    return error
