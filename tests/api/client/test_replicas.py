"""Replicas of engine processes whose pipelines have no model."""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from actors.errors import PlacementError
from api.client import prefix_routes
from api.client.open_requests import RequestStream
from api.client.replicas import Replicas
from api.engine.options import EngineOptions
from api.errors import EngineError, NotReadyError, OptionError, RequestError, exit_code
from api.messages.engine import AddRequest, EngineState, not_ready
from api.scheduler.slots import MUCH_FULLER
from api.settings.engine import EngineSettings
from api.settings.replicas import replica_options
from api.text.model_source import resolve_model
from stages.step import SamplingParams
from tests import ROOT
from tests.support.engine_fakes import engine_options, reference_answer
from weights.model_config import ModelConfig

SECONDS = 20.0
SAMPLE = resolve_model(None, {})


@pytest.fixture(autouse=True)
def tests_in_the_engine_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine processes import the pipelines of tests/support/engine_fakes.py."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def request(request_id: int, prompt: int = 40, max_tokens: int = 20) -> AddRequest:
    return AddRequest(
        request_id=request_id,
        tokens=[(7 * request_id + 3 * i) % 5000 for i in range(prompt)],
        max_tokens=max_tokens,
        stop_token_ids=[],
        sampling=SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, choice=0),
    )


async def answer(stream: RequestStream) -> tuple[list[int], str | None]:
    """Returns all tokens of a request and why it ended."""
    tokens: list[int] = []
    reason = None
    async for output in stream:
        tokens += output.tokens
        reason = output.finish_reason
    return tokens, reason


@asynccontextmanager
async def opened(*starts: str) -> AsyncIterator[Replicas]:
    """Replicas, not started yet, of pipelines that these functions of tests/support/engine_fakes.py start."""
    async with Replicas.open([engine_options(start) for start in starts], lambda *_: None) as replicas:
        yield replicas


async def test_two_replicas_share_the_requests_and_answer_as_one() -> None:
    async with opened("start_sound", "start_sound") as replicas:
        await replicas.start(SECONDS)
        requests = [request(replicas.next_request_id(), prompt=i + 1, max_tokens=i + 1) for i in range(30)]
        streams = [replicas.generate(added) for added in requests]
        answers = await asyncio.wait_for(asyncio.gather(*map(answer, streams)), SECONDS)
        assert answers == [reference_answer(added.tokens, added.max_tokens, []) for added in requests]
        assert [engine.requests.finished["length"] for engine in replicas.engines] == [15, 15]
        assert [engine.load.requests for engine in replicas.engines] == [0, 0]
        assert replicas.state == EngineState(phase="ready", detail="")
    assert replicas.state.phase == "failed"


async def test_requests_with_the_same_beginning_go_to_one_replica_unless_it_is_much_fuller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix_routes, "PIECE_TOKENS", 16)
    async with opened("start_stalling", "start_stalling") as replicas:
        await replicas.start(SECONDS)
        excess = engine_options("start_stalling").scheduler.cache.slots // MUCH_FULLER
        begins = [7] * 16

        def send(*tokens: int) -> list[int]:
            """Sends a request; returns how many each replica has then."""
            asked = msgspec.structs.replace(request(replicas.next_request_id()), tokens=[*begins, *tokens])
            replicas.generate(asked)
            return [engine.load.requests for engine in replicas.engines]

        first = send(1)
        loads = [send(number) for number in range(excess)]
        assert loads == [[number * taken for taken in first] for number in range(2, excess + 2)]
        assert sorted(send(99)) == [1, excess + 1]


async def test_a_killed_engine_leaves_the_other_serving_and_gives_it_what_it_had_not_begun() -> None:
    async with opened("start_stalling", "start_sound") as replicas:
        await replicas.start(SECONDS)
        requests = [request(replicas.next_request_id(), prompt=60, max_tokens=20) for _ in range(40)]
        streams = [replicas.generate(added) for added in requests]
        # In its five steps the first engine gives outputs to five requests at most.
        first = await asyncio.wait_for(anext(streams[0]), SECONDS)
        counts = await replicas.engines[0].counts()
        assert counts.running + counts.waiting == 20
        os.kill(replicas.engines[0].pid, signal.SIGKILL)
        answers = await asyncio.wait_for(asyncio.gather(*map(answer, streams), return_exceptions=True), SECONDS)
        lost = [isinstance(each, EngineError) for each in answers]
        assert lost == [place % 2 == 0 and not stream.was_moved for place, stream in enumerate(streams)]
        assert 1 <= sum(lost) <= 5
        for added, got in zip(requests, answers, strict=True):
            assert isinstance(got, EngineError) or got == reference_answer(added.tokens, added.max_tokens, [])
        assert len(first.tokens) == 1
        assert replicas.state.phase == "ready"
        assert replicas.state.detail.startswith("Replica 0: The engine process was killed by signal 9")
        assert [engine.requests.finished["error"] for engine in replicas.engines] == [sum(lost), 0]
        assert replicas.engines[1].requests.finished["length"] == 40 - sum(lost)
        later = request(replicas.next_request_id())
        assert await answer(replicas.generate(later)) == reference_answer(later.tokens, later.max_tokens, [])


async def test_a_replica_that_cannot_start_is_named() -> None:
    async with opened("start_sound", "start_refused") as replicas:
        with pytest.raises(PlacementError, match=r"^Replica 1: 2 stages need 2 rows, the cluster has 1\.$") as caught:
            await replicas.start(SECONDS)
        assert exit_code(caught.value) == 2


async def test_replicas_that_join_a_cluster_start_at_once_and_the_first_to_fail_is_named() -> None:
    options = [at_cluster(engine_options(start)) for start in ("start_never", "start_refused")]
    async with Replicas.open(options, lambda *_: None) as replicas:
        with pytest.raises(PlacementError, match=r"^Replica 1: 2 stages"):
            await replicas.start(SECONDS)


def at_cluster(options: EngineOptions) -> EngineOptions:
    cluster = msgspec.structs.replace(options.pipeline.cluster, ray_address="127.0.0.1:6379")
    pipeline = msgspec.structs.replace(options.pipeline, cluster=cluster)
    return msgspec.structs.replace(options, pipeline=pipeline)


async def test_the_first_replica_serves_while_the_second_loads() -> None:
    async with opened("start_sound", "start_never") as replicas:
        with pytest.raises(NotReadyError, match="still loading"):
            replicas.generate(request(0))
        starting = asyncio.create_task(replicas.start(SECONDS))
        await asyncio.wait_for(replicas.engines[0].wait_ready(SECONDS), SECONDS)
        assert replicas.state.phase == "ready"
        assert replicas.state.detail.startswith("Replica 1: The engine process")
        with pytest.raises(RequestError, match="over the model's length of 128"):
            replicas.generate(request(0, prompt=100, max_tokens=100))
        answers = [await answer(replicas.generate(request(number))) for number in range(3)]
        assert answers == [reference_answer(request(number).tokens, 20, []) for number in range(3)]
        starting.cancel()


async def test_when_all_have_failed_requests_are_refused_with_every_reason() -> None:
    async with opened("start_breaking", "start_breaking") as replicas:
        await replicas.start(SECONDS)
        streams = [replicas.generate(request(replicas.next_request_id())) for _ in range(20)]
        answers = await asyncio.wait_for(asyncio.gather(*map(answer, streams), return_exceptions=True), SECONDS)
        assert {type(each) for each in answers} == {EngineError}
        state = replicas.state
        sentence = r"Stage 1 failed 11 times with no token made in between; the last time: Stage 1 on fake-host died .*"
        assert state.phase == "failed"
        assert re.fullmatch(f"Replica 0: {sentence} Replica 1: {sentence}", state.detail)
        assert state.error_kind == "PipelineError"
        with pytest.raises(NotReadyError, match="The engine failed: Replica 0: Stage 1 failed 11 times"):
            replicas.generate(request(99))
        assert sum(engine.requests.finished["error"] for engine in replicas.engines) == 20
        assert "Replica 1" in str(not_ready(state))


async def test_closing_moves_no_request() -> None:
    async with opened("start_stalling", "start_stalling") as replicas:
        await replicas.start(SECONDS)
        streams = [replicas.generate(request(replicas.next_request_id())) for _ in range(30)]
        await asyncio.wait_for(anext(streams[0]), SECONDS)
    for stream in streams:
        with pytest.raises(EngineError, match=r"The engine was (closed|stopped)\."):
            await answer(stream)
    assert not any(stream.was_moved for stream in streams)


def options_of(settings: EngineSettings, replicas: int) -> Sequence[EngineOptions]:
    return replica_options(settings, SAMPLE, ModelConfig.from_file(SAMPLE.path / "config.json"), replicas)


def test_one_replica_is_told_what_an_engine_is_told(tmp_path: Path) -> None:
    settings = EngineSettings.of(cache_dir=tmp_path, timeline=tmp_path / "steps.json")
    [options] = options_of(settings, 1)
    assert options == settings.engine_options(SAMPLE, ModelConfig.from_file(SAMPLE.path / "config.json"))


def test_every_replica_writes_a_timeline_of_its_own(tmp_path: Path) -> None:
    options = options_of(EngineSettings.of(cache_dir=tmp_path, timeline=tmp_path / "a.b.json"), 3)
    files = [tmp_path / f"a.b.{replica}.json" for replica in range(3)]
    assert [each.timeline for each in options] == list(map(str, files))
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="Cannot write --timeline"):
        options_of(EngineSettings.of(cache_dir=tmp_path, timeline=tmp_path / "file" / "steps.json"), 2)


def test_a_given_cluster_has_to_hold_all_replicas_and_this_host_shares_its_memory_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("api.settings.engine.memory_bytes", lambda: 1 << 26)
    [alone] = options_of(EngineSettings.of(cache_dir=tmp_path), 1)
    own = options_of(EngineSettings.of(cache_dir=tmp_path), 2)
    joined = options_of(EngineSettings.of(cache_dir=tmp_path, ray_address="10.0.0.1:6379"), 2)
    assert [each.pipeline.pipelines for each in [alone, *own, *joined]] == [1, 1, 1, 2, 2]
    blocks = alone.pipeline.stage.cache.blocks
    assert [each.pipeline.stage.cache.blocks for each in [*own, *joined]] == [blocks // 2] * 2 + [blocks] * 2


def test_replicas_on_chips_need_to_be_told_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(OptionError, match="--replicas 2 on chips need a Ray cluster"):
        options_of(EngineSettings.of(cache_dir=tmp_path, device="ttnn"), 2)
