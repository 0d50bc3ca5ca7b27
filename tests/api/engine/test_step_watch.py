"""The log of requests and steps at the debug level, and that it costs nothing above that level."""

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, MutableMapping
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from api.engine.engine import Engine
from api.messages.engine import AbortRequest, AddRequest, EngineMetrics, FromEngine, GetMetrics, Outputs
from api.scheduler.scheduler import Scheduler
from stages.step import NO_TOKEN, SamplingParams, Step, StepResult
from tests.support.engine_fakes import FakePipeline, engine_options

Logs = list[MutableMapping[str, Any]]


@pytest.fixture
def debugging() -> Iterator[None]:
    """Sets the level at which steps are logged."""
    logger = logging.getLogger("api.engine.step_watch")
    logger.setLevel(logging.DEBUG)
    yield
    logger.setLevel(logging.NOTSET)


def request(request_id: int, prompt: int = 20, max_tokens: int = 3) -> AddRequest:
    return AddRequest(
        request_id=request_id,
        tokens=list(range(prompt)),
        max_tokens=max_tokens,
        stop_token_ids=[],
        sampling=SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, choice=0),
    )


async def serve(*messages: AddRequest | AbortRequest, break_at: float = math.inf) -> tuple[FakePipeline, Logs]:
    """Runs an engine on these messages until it has no more to do."""
    options = engine_options()
    pipeline = FakePipeline(options.pipeline, break_at=break_at)

    async def start(*_: object) -> FakePipeline:
        return pipeline

    engine = Engine(options, start, lambda _: None)
    with capture_logs() as logs:
        for message in messages:
            engine.handle_message(message)
        serving = asyncio.create_task(engine.run())
        for _ in range(200):
            await asyncio.sleep(0)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await engine.close()
    return pipeline, logs


async def test_every_step_is_logged_with_its_requests(debugging: None) -> None:
    pipeline, logs = await serve(*(request(request_id) for request_id in range(4)))
    issued = [log for log in logs if log["event"] == "step issued"]
    assert [(log["step_id"], log["mode"]) for log in issued] == [(step.step_id, step.mode) for step in pipeline.steps]
    assert [len(log["request_ids"]) for log in issued] == [len(step.segments) for step in pipeline.steps]
    steps_of: dict[int, int] = defaultdict(int)
    for log in issued:
        for request_id in log["request_ids"]:
            steps_of[request_id] += 1
    assert steps_of == dict.fromkeys(range(4), 3)
    assert {log["log_level"] for log in logs} == {"debug"}


async def test_admissions_and_ends_are_logged_with_their_requests(debugging: None) -> None:
    pipeline, logs = await serve(*map(request, range(14)), AbortRequest(request_id=13))
    admitted = [log for log in logs if log["event"] == "request admitted"]
    assert sorted(log["request_id"] for log in admitted) == list(range(13))
    by_slot = {(step.step_id, admission.slot) for step in pipeline.steps for admission in step.admissions}
    assert {(log["step_id"], log["slot"]) for log in admitted} == by_slot
    ended = [log for log in logs if log["event"] == "request ended"]
    assert sorted((log["request_id"], log["reason"]) for log in ended) == [(each, "length") for each in range(13)]
    assert [log["request_id"] for log in logs if log["event"] == "request aborted"] == [13]


async def test_a_failure_ends_every_request_in_the_log_too(debugging: None) -> None:
    _, logs = await serve(*map(request, range(14)), break_at=3)
    ended = {log["request_id"]: log["reason"] for log in logs if log["event"] == "request ended"}
    assert set(ended) == set(range(14))
    assert "error" in ended.values()


async def test_above_the_debug_level_nothing_is_looked_up_or_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Step] = []
    requests_in = Scheduler.requests_in

    def spy(self: Scheduler, step: Step) -> list[int]:
        asked.append(step)
        return requests_in(self, step)

    monkeypatch.setattr(Scheduler, "requests_in", spy)
    pipeline, logs = await serve(*map(request, range(4)))
    assert logs == []
    assert asked == [step for step in pipeline.steps if step.admissions]
    assert len(asked) < len(pipeline.steps)


class TokenlessPipeline(FakePipeline):
    """A pipeline whose last stage gets logits that are not numbers."""

    async def receive(self) -> StepResult:
        """The next result, without a token."""
        result = await super().receive()
        return msgspec.structs.replace(result, tokens=[NO_TOKEN] * len(result.tokens))


async def test_a_request_without_a_token_is_logged_and_counted() -> None:
    options = engine_options()
    pipeline = TokenlessPipeline(options.pipeline)
    sent: list[FromEngine] = []
    answered = asyncio.Event()

    def send(message: FromEngine) -> None:
        sent.append(message)
        if isinstance(message, Outputs):
            answered.set()

    async def start(*_: object) -> FakePipeline:
        return pipeline

    engine = Engine(options, start, send)
    with capture_logs() as logs:
        engine.handle_message(request(7))
        serving = asyncio.create_task(engine.run())
        await answered.wait()
        engine.handle_message(GetMetrics())
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await engine.close()
    sentence = "Stage 1 got logits that are not numbers at step 0."
    [line] = [entry for entry in logs if entry["event"] == "a request has no token"]
    assert (line["request_id"], line["error"], line["log_level"]) == (7, sentence, "error")
    [metrics] = [message for message in sent if isinstance(message, EngineMetrics)]
    assert metrics.non_finite_logits == 1
