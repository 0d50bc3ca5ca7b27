"""Bodies that are not requests, or almost: each gets an answer, and none of them is a server error."""

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.errors import PipelineError
from api.errors import EngineError
from api.openai.completions import CompletionRequest
from api.server.app import create_app
from tests.support.api_server import MODEL, endless_text
from tests.support.fake_engine import FakeEngine
from weights.errors import CheckpointError

BODIES = 10_000 if os.environ.get("GALAXYLINE_FULL") else 1_000
ANSWER_S = 20
SECRET_WORDS = ("/work", "/srv", "/home", "/usr", "Traceback", "site-packages", "model.layers", "norm.weight")

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "hello", "\ud800", "NaN", "text"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
field_names = st.sampled_from([*CompletionRequest.model_fields, "tokens", "messages", "return_token_strs"])
valid = st.fixed_dictionaries({"prompt": st.just("hello"), "max_tokens": st.integers(1, 5), "tokens": st.just([1])})
almost_requests = st.builds(
    lambda fields, wrong: {**fields, **wrong}, valid, st.dictionaries(field_names, json_values, max_size=3)
)


def _text(value: Any) -> bytes:
    return json.dumps(value).encode()


def _broken(body: bytes, seed: int) -> bytes:
    """The body with bytes cut, flipped, repeated or inserted."""
    chance = random.Random(seed)
    for _ in range(chance.randint(1, 3)):
        at = chance.randint(0, len(body))
        body = chance.choice(
            [
                body[:at],
                body[at:],
                body[:at] + bytes([chance.randrange(256)]) + body[at + 1 :],
                body[:at] + body[at // 2 :],
                body[:at]
                + chance.choice([b"\x00", b"\xff\xfe", b"[" * 2000, b'{"a":' * 2000, b"1" * 5000, b"1e999"])
                + body[at:],
            ]
        )
    return body


bodies = (
    st.binary(max_size=100)
    | almost_requests.map(_text)
    | json_values.map(_text)
    | st.builds(_broken, almost_requests.map(_text), st.integers(0, 1 << 32))
)
paths = st.sampled_from(["/v1/completions"] * 4 + ["/tokenize", "/detokenize"])


@asynccontextmanager
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(MODEL, engine), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as opened:
        yield opened


def assert_shows_nothing_of_the_server(answer: httpx.Response) -> None:
    assert not [word for word in SECRET_WORDS if word in answer.text]


@pytest.mark.slow
def test_malformed_bodies_are_answered_and_the_server_serves_after() -> None:
    statuses: set[int] = set()
    loop = asyncio.new_event_loop()
    opening = client(FakeEngine(endless_text))
    opened = loop.run_until_complete(opening.__aenter__())

    async def answer(path: str, body: bytes) -> httpx.Response:
        sent = opened.post(path, content=body, headers={"content-type": "application/json"})
        return await asyncio.wait_for(sent, ANSWER_S)

    @settings(max_examples=BODIES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(path=paths, body=bodies)
    def send(path: str, body: bytes) -> None:
        answered = loop.run_until_complete(answer(path, body))
        statuses.add(answered.status_code)
        assert answered.status_code in {200, 400, 404}, answered.text
        if answered.status_code != 200:
            error = answered.json()["error"]
            assert error["code"] == answered.status_code
            assert len(error["message"]) <= 500
            assert_shows_nothing_of_the_server(answered)

    try:
        send()
        assert {200, 400} <= statuses
        served = loop.run_until_complete(answer("/v1/completions", b'{"prompt": "hello", "max_tokens": 3}'))
        assert served.json()["choices"][0]["finish_reason"] == "length"
    finally:
        loop.run_until_complete(opening.__aexit__(None, None, None))
        loop.close()


causes = st.lists(
    st.sampled_from(
        [
            "/home/someone/models/x.safetensors",
            "/srv/a b/c.json",
            "'/usr/lib/python3/site-packages/ray/_raylet.pyx'",
            "model.layers.3.self_attn.kv_b_proj.weight",
            "model.norm.weight",
            "lm_head.weight",
            "Stage 1 on 127.0.0.1 died at step 7:",
            "tcp://10.0.0.1:6379",
            '\n  File "/opt/program/api/engine.py", line 3, in run\nTraceback (most recent call last):',
        ]
    ),
    min_size=1,
    max_size=6,
).map(" ".join)


@given(cause=causes, phase=st.sampled_from(["loading", "recovering", "failed"]), stream=st.booleans())
@settings(max_examples=100, deadline=None)
def test_no_error_tells_paths_stacks_or_tensors(cause: str, phase: Any, stream: bool) -> None:
    async def check() -> None:
        engine = FakeEngine(endless_text)
        body = {"prompt": "hello", "stream": stream}
        async with client(engine) as opened:
            for refusal in (
                EngineError(cause),
                PipelineError(cause, 1, 7),
                CheckpointError(cause),
                RuntimeError(cause),
            ):
                engine.refusal = refusal
                answer = await opened.post("/v1/completions", json=body)
                assert answer.status_code >= 500
                assert_shows_nothing_of_the_server(answer)
            engine.refusal = None
            engine.state = msgspec.structs.replace(engine.state, phase=phase, detail=cause)
            for answer in (await opened.post("/v1/completions", json=body), await opened.get("/health")):
                assert_shows_nothing_of_the_server(answer)

    asyncio.run(check())
