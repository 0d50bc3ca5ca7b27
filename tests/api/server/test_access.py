"""Every request is counted, and those that are refused leave a line: bounded in labels, in length and in number."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from api.server import access
from api.server.access import UNKNOWN, AccessLog, BoundedLog, RequestWatch
from api.server.admission import AdmissionControl
from api.server.app import create_app, plain_paths
from api.server.monitoring import add_monitoring_routes
from api.server.request import BODY_BYTES_MAX
from api.settings.server import ApiKeys, FrontSettings, QueueLimits
from tests.support.api_client import error_of
from tests.support.api_server import MODEL, endless_text
from tests.support.fake_engine import FakeEngine
from tests.support.reporting_engine import ReportingEngine, at_work

BODY = {"prompt": "hello", "max_tokens": 1}
KEY = {"authorization": "Bearer secret"}


@asynccontextmanager
async def client(watch: RequestWatch, slots: int = 8) -> AsyncIterator[httpx.AsyncClient]:
    engine = FakeEngine(endless_text)
    admission = AdmissionControl(QueueLimits(slots=slots, requests=0, tokens=100))
    app = create_app(MODEL, engine, front=FrontSettings(api_keys=ApiKeys(["secret"])), admission=admission)
    add_monitoring_routes(app, MODEL.name, [ReportingEngine(at_work())])
    transport = httpx.ASGITransport(AccessLog(app, watch, plain_paths(app)), client=("10.1.2.3", 5))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as opened:
        yield opened


async def test_each_refusal_leaves_a_line_and_a_count() -> None:
    watch = RequestWatch()
    asked: list[tuple[str, str, int, str, dict[str, Any]]] = [
        ("POST", "/v1/completions", 200, "/v1/completions", {"json": BODY}),
        ("POST", "/v1/completions", 400, "/v1/completions", {"json": {**BODY, "top_p": 9}}),
        ("POST", "/v1/completions", 401, "/v1/completions", {"json": BODY, "headers": {"authorization": "Bearer no"}}),
        ("GET", "/v1/models/other", 404, "/v1/models/{name:path}", {}),
        ("POST", "/v1/embeddings", 404, UNKNOWN, {"json": {}}),
        ("GET", "/v1/completions", 405, "/v1/completions", {}),
        ("POST", "/tokenize", 413, "/tokenize", {"content": b" " * (BODY_BYTES_MAX + 1)}),
    ]
    async with client(watch) as opened:
        for method, path, status, handler, fields in asked:
            before = watch.requests[method, handler, str(status)]
            with capture_logs() as logs:
                answer = await opened.request(method, path, **{"headers": KEY, **fields})
            assert answer.status_code == status
            assert watch.requests[method, handler, str(status)] == before + 1
            lines = [line for line in logs if line["event"] == "request refused"]
            assert len(lines) == (status >= 400)
            for line in lines:
                assert (line["method"], line["path"], line["status"]) == (method, path, status)
                assert (line["client"], line["seconds"] >= 0) == ("10.1.2.3:5", True)
                assert line["request_id"] == answer.headers.get("x-request-id")
                assert not {"secret", "Bearer no"} & set(map(str, line.values()))


async def test_too_much_at_once_is_counted_too() -> None:
    watch = RequestWatch()
    async with client(watch, slots=0) as opened:
        with capture_logs() as logs:
            error_of(await opened.post("/v1/completions", json=BODY, headers=KEY), 429)
    assert watch.requests["POST", "/v1/completions", "429"] == 1
    assert [line["status"] for line in logs if line["event"] == "request refused"] == [429]


async def test_paths_that_nobody_serves_share_one_label() -> None:
    watch = RequestWatch()
    async with client(watch) as opened:
        for number in range(50):
            await opened.get(f"/x{number}/" + "y" * 500, headers=KEY)
            await opened.get(f"/x{number}")
    assert watch.requests == {("GET", UNKNOWN, "404"): 50, ("GET", UNKNOWN, "401"): 50}


async def test_probes_that_are_refused_fill_no_log() -> None:
    watch = RequestWatch()
    async with client(watch) as opened:
        with capture_logs() as logs:
            error_of(await opened.get("/metrics"), 401)
    assert [line["log_level"] for line in logs] == ["debug"]
    assert watch.requests["GET", "/metrics", "401"] == 1


async def test_a_storm_of_lines_is_cut_short_and_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    closings: list[Any] = []
    lines = BoundedLog()

    class Loop:
        def call_later(self, seconds: float, close: Any, *values: str) -> None:
            closings.append((seconds, lambda: close(*values)))

    monkeypatch.setattr(asyncio, "get_running_loop", Loop)
    with capture_logs() as logs:
        for number in range(1000):
            lines.info("cut", "slow", client=number)
            lines.info("cut", "other", client=number) if not number else None
        assert len(logs) == access.LINES_MAX + 1
        [(seconds, slow), (_, other)] = closings
        slow()
        other()
    [last] = logs[access.LINES_MAX + 1 :]
    assert (last["kind"], last["count"], seconds) == ("slow", 1000 - access.LINES_MAX, access.PERIOD_S)


async def test_a_path_that_is_not_served_says_what_is() -> None:
    async with client(RequestWatch()) as opened:
        error = error_of(await opened.post("/v1/embeddings", json={}, headers=KEY), 404)
        served = "POST /v1/completions, POST /v1/chat/completions, POST /v1/responses, POST /v1/messages"
        assert error["message"].startswith(f"This server has no /v1/embeddings. It serves: {served}")
        assert "GET /v1/models" in error["message"]
        refused = await opened.delete("/ping", headers=KEY)
        assert error_of(refused, 405)["message"] == "/ping takes GET or HEAD or POST, not DELETE."
        assert refused.headers["allow"] == "GET, HEAD, POST"


async def test_no_path_redirects() -> None:
    async with client(RequestWatch()) as opened:
        for path in ("/health/", "/v1/completions/", "/v1//models"):
            answer = await opened.get(path, headers={**KEY, "host": "evil.example"})
            error_of(answer, 404)
            assert "location" not in answer.headers


async def test_head_is_answered_as_get_is() -> None:
    async with client(RequestWatch()) as opened:
        for path in ("/health", "/ready", "/live", "/ping", "/v1/models", "/metrics", "/version"):
            assert (await opened.head(path, headers=KEY)).status_code == 200


async def test_descriptions_are_for_users() -> None:
    async with client(RequestWatch()) as opened:
        document = (await opened.get("/openapi.json", headers=KEY)).json()
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for operation in operations:
        assert operation["operationId"].isidentifier()
        assert "Raises" not in operation["description"]
        assert operation["summary"].endswith(".")


async def test_load_and_docs_are_served() -> None:
    async with client(RequestWatch()) as opened:
        assert (await opened.get("/load", headers=KEY)).json() == {"server_load": 0}
        assert (await opened.post("/ping")).status_code == 200
        page = await opened.get("/docs", headers=KEY)
        assert page.headers["content-type"].startswith("text/html")
        assert "<code>POST /v1/completions</code>" in page.text
        assert "http" not in page.text  # nothing is loaded from elsewhere
