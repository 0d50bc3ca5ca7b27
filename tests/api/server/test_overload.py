"""Requests beyond the queue's limits or their deadline are refused, and the others are not affected."""

import asyncio
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from api.server.admission import RETRY_AFTER_S, AdmissionControl
from api.server.app import create_app
from api.settings.server import FrontSettings, QueueLimits
from tests.support.api_client import error_of
from tests.support.api_server import MODEL, TEXT_TOKENS, endless_text, never_ending
from tests.support.fake_engine import FakeEngine

DEADLINE_S = 20
HOUR = 3600.0


def client(engine: FakeEngine, limits: QueueLimits | None = None, timeout_s: float | None = None) -> httpx.AsyncClient:
    admission = None if limits is None else AdmissionControl(limits)
    app = create_app(MODEL, engine, admission=admission, front=FrontSettings(request_timeout_s=timeout_s))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def post(opened: httpx.AsyncClient, timeout: str | None = None, **fields: Any) -> httpx.Response:
    headers = {} if timeout is None else {"x-request-timeout": timeout}
    return await opened.post("/v1/completions", json={"prompt": "hello", **fields}, headers=headers)


async def until_open(engine: FakeEngine, count: int) -> None:
    deadline = asyncio.get_running_loop().time() + DEADLINE_S
    while len(engine.streams) < count:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_finds_no_place_is_refused_before_its_stream_begins(stream: bool) -> None:
    engine = FakeEngine(never_ending)
    async with client(engine, QueueLimits(slots=1, requests=1, tokens=1000)) as opened:
        held = [asyncio.create_task(post(opened, n=1)) for _ in range(2)]
        await until_open(engine, 2)
        refused = await post(opened, stream=stream)
        assert error_of(refused, 429)["type"] == "RateLimitError"
        assert refused.headers["retry-after"] == str(RETRY_AFTER_S)
        # The refusal comes before the body is read, so what is wrong with the body makes no difference.
        error_of(await opened.post("/v1/completions", content=b"{"), 429)
        assert len(engine.streams) == 2
        # Bodies are read on threads, so that either request may have got the first stream.
        engine.streams[0].fail()
        [ended], [other] = await asyncio.wait(held, return_when=asyncio.FIRST_COMPLETED)
        error_of(ended.result(), 503)
        engine.script = endless_text
        assert (await post(opened)).status_code == 200
        engine.streams[1].fail()
        error_of(await other, 503)
        # All places have been given back.
        answers = await asyncio.gather(*(post(opened) for _ in range(2)))
        assert [answer.status_code for answer in answers] == [200, 200]


async def test_all_completions_of_a_request_are_taken_or_none() -> None:
    engine = FakeEngine(never_ending)
    async with client(engine, QueueLimits(slots=1, requests=2, tokens=1000)) as opened:
        held = asyncio.create_task(post(opened))
        await until_open(engine, 1)
        error_of(await post(opened, n=3), 429)
        assert len(engine.streams) == 1
        engine.script = endless_text
        assert (await post(opened, n=2)).status_code == 200
        engine.streams[0].fail()
        await held


async def test_a_request_whose_time_is_up_is_aborted_and_told() -> None:
    engine = FakeEngine(never_ending)
    async with client(engine, timeout_s=HOUR) as opened:
        with capture_logs() as logs:
            error = error_of(await post(opened, "0.05", max_tokens=50), 504)
        assert error["type"] == "GatewayTimeoutError"
        assert error["message"].startswith("The request's 0.05 s are over")
        [stream] = engine.streams
        assert stream.aborted.is_set()
        [line] = [line for line in logs if line["event"] == "completion failed"]
        assert line["error"] == error["message"]


async def test_the_server_s_own_time_counts_where_it_is_smaller() -> None:
    engine = FakeEngine(never_ending)
    async with client(engine, timeout_s=0.05) as opened:
        for timeout in (None, "3600"):
            assert "0.05 s" in error_of(await post(opened, timeout, max_tokens=50), 504)["message"]


async def test_a_stream_whose_time_is_up_ends_with_the_error() -> None:
    engine = FakeEngine(never_ending)
    async with client(engine) as opened:
        answer = await post(opened, "0.1", stream=True, max_tokens=50)
    assert answer.status_code == 200
    *texts, error, done = [part for part in answer.text.split("\n\n") if part]
    assert len(texts) == len(TEXT_TOKENS[:2])
    assert '"code":504' in error
    assert done == "data: [DONE]"
    assert engine.streams[0].aborted.is_set()


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf", "soon", ""])
async def test_a_time_that_is_none_is_refused(timeout: str) -> None:
    async with client(FakeEngine(endless_text)) as opened:
        assert error_of(await post(opened, timeout), 400)["param"] == "x-request-timeout"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 257),
        ("best_of", 2),
        ("stop", ["a"] * 65),
        ("stop", "a" * 1025),
        ("bad_words", ["a"] * 4097),
        ("bad_words", ["a" * 1025]),
        ("logprobs", 21),
        ("prompt_logprobs", 21),
        ("logit_bias", {str(token): 1 for token in range(301)}),
        ("prompt", ["a"] * 4097),
        ("prompt", [[1] * 300]),
        ("prompt", "a" * 100_000),
        ("max_tokens", 300),
    ],
)
async def test_what_is_too_much_is_refused_with_the_field(name: str, value: Any) -> None:
    engine = FakeEngine(endless_text)
    async with client(engine) as opened:
        error = error_of(await post(opened, **{name: value}), 400)
    assert error["param"] == name
    assert "\n" not in error["message"]
    assert not engine.streams


async def test_a_batch_of_more_tokens_than_may_wait_is_refused() -> None:
    async with client(FakeEngine(endless_text), QueueLimits(slots=9, requests=9, tokens=100)) as opened:
        assert error_of(await post(opened, prompt=[[1] * 60, [2] * 60]), 400)["param"] == "prompt"
