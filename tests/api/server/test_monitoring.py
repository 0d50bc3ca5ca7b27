"""GET /metrics and GET /pipeline, around engine processes whose pipelines have no model."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import httpx
import msgspec
import psutil
import pytest
from fastapi import FastAPI

from api.client.engine_client import EngineClient
from api.client.request_metrics import CompletionMetrics
from api.errors import EngineError
from api.messages.engine import AddRequest, failed_state
from api.messages.pipeline_view import PipelineView
from api.server.access import RequestWatch
from api.server.app import create_app
from api.server.metrics import FrontMetrics
from api.server.monitoring import add_monitoring_routes
from stages.step import SamplingParams
from tests import ROOT
from tests.support.api_client import error_of
from tests.support.api_server import MODEL as SMALL
from tests.support.engine_fakes import HOP_NS, QUEUE_NS, STEP_NS, engine_options
from tests.support.reporting_engine import ReportingEngine, at_work
from tests.support.scrape import MODEL, Scrape

SECONDS = 20.0
MAX_MODEL_LEN = 256
Seen = TypeVar("Seen")


@pytest.fixture(autouse=True)
def tests_in_the_engine_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine process imports the pipelines of tests/support/engine_fakes.py."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


class Monitored:
    """An engine, and a client of the routes that monitor it."""

    def __init__(self, engine: EngineClient, client: httpx.AsyncClient) -> None:
        self.engine = engine
        self.client = client

    async def scrape(self) -> "Scrape":
        response = await self.client.get("/metrics")
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        return Scrape(response.text)

    async def pipeline(self) -> PipelineView:
        response = await self.client.get("/pipeline")
        assert response.status_code == 200
        return msgspec.json.decode(response.content, type=PipelineView)


@asynccontextmanager
async def monitored(start: str = "start_sound") -> AsyncIterator[Monitored]:
    async with EngineClient.start(engine_options(start)) as engine:
        app = FastAPI()
        cache = {"block_size": "32", "cache_dtype": "float32"}
        completions = CompletionMetrics(MAX_MODEL_LEN)
        completions.ended([3, 5])
        front = FrontMetrics(watch=RequestWatch(), completions=completions, cache_config=cache)
        front.watch.answered("POST", "/v1/completions", 200, 0.2)
        front.watch.answered("GET", "none", 404, 0.0)
        add_monitoring_routes(app, MODEL, [engine], front)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://monitored", timeout=SECONDS) as client:
            yield Monitored(engine, client)


async def until(look: Callable[[], Awaitable[Seen]], is_so: Callable[[Seen], bool]) -> Seen:
    """Repeats `look` until `is_so`, and returns what it saw; fails at the deadline."""
    deadline = asyncio.get_running_loop().time() + SECONDS
    while not is_so(seen := await look()):
        assert asyncio.get_running_loop().time() < deadline
    return seen


def request(engine: EngineClient, prompt: int = 40, max_tokens: int = 20, stop: tuple[int, ...] = ()) -> AddRequest:
    return AddRequest(
        request_id=engine.next_request_id(),
        tokens=list(range(prompt)),
        max_tokens=max_tokens,
        stop_token_ids=list(stop),
        sampling=SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, choice=0),
    )


async def answer(engine: EngineClient, added: AddRequest) -> int:
    """Returns the number of tokens that a request gets."""
    return sum([len(output.tokens) async for output in engine.generate(added)])


async def test_a_scrape_tells_what_was_served() -> None:
    async with monitored() as around:
        engine = around.engine
        await engine.wait_ready(SECONDS)
        ended = [request(engine, prompt=10 + i, max_tokens=5) for i in range(20)]
        lengths = await asyncio.gather(*(answer(engine, added) for added in ended))
        # The fake model has 16 tokens, and each of them stops this request.
        stopped = await answer(engine, request(engine, prompt=3, stop=tuple(range(16))))
        assert (lengths, stopped) == ([5] * 20, 1)
        scrape = await around.scrape()
        counts = await engine.counts()
    assert scrape.of("galaxyline:engine_up", engine="0") == 1
    assert scrape.model("vllm:prompt_tokens_total") == sum(10 + i for i in range(20)) + 3
    assert scrape.model("vllm:generation_tokens_total") == 101
    reasons = {"stop": 1, "length": 20, "abort": 0, "error": 0}
    for reason, count in reasons.items():
        assert scrape.model("vllm:request_success_total", finished_reason=reason) == count
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert scrape.model(f"vllm:{name}_count") == scrape.model(f"vllm:{name}_bucket", le="+Inf") == 21
    assert scrape.model("vllm:inter_token_latency_seconds_count") == 80
    assert scrape.model("vllm:request_prompt_tokens_sum") == scrape.model("vllm:prompt_tokens_total")
    assert scrape.model("vllm:request_generation_tokens_bucket", le="1.0") == 1
    assert scrape.model("vllm:request_generation_tokens_bucket", le="5.0") == 21
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"):
        assert scrape.model(f"vllm:{name}") == 0
    for name in ("request_prefill_time_seconds", "request_decode_time_seconds", "request_inference_time_seconds"):
        assert scrape.model(f"vllm:{name}_count") == 21
    # All but the one that stopped at its first token.
    assert scrape.model("vllm:request_time_per_output_token_seconds_count") == 20
    assert scrape.model("vllm:request_params_max_tokens_count") == 21
    assert scrape.model("vllm:iteration_tokens_total_sum") == scrape.model("vllm:prompt_tokens_total") + 80
    assert scrape.model("vllm:prefix_cache_queries_total") == scrape.model("vllm:prompt_tokens_total")
    assert scrape.model("vllm:prefix_cache_hits_total") == scrape.model("galaxyline:recomputed_tokens_total") == 0
    assert scrape.of("galaxyline:steps_in_flight", engine="0") == 0 == counts.steps_in_flight
    assert scrape.of("process_resident_memory_bytes") > 1 << 20
    assert scrape.of("galaxyline_engine_process_resident_memory_bytes", engine="0") > 1 << 20


async def test_a_scrape_tells_what_every_stage_did() -> None:
    async with monitored() as around:
        await around.engine.wait_ready(SECONDS)
        await answer(around.engine, request(around.engine, prompt=40, max_tokens=4))
        scrape = await around.scrape()
    # A chunk of the prompt's 40 tokens, and three more tokens.
    steps = {"prefill": 1, "decode": 3}
    for stage in ("0", "1"):
        place = {"engine": "0", "stage": stage, "host": "fake-host"}
        for mode, count in steps.items():
            assert scrape.of("galaxyline:stage_step_seconds_count", mode=mode, **place) == count
            assert scrape.of("galaxyline:stage_step_seconds_sum", mode=mode, **place) == pytest.approx(
                count * STEP_NS * 1e-9
            )
        assert scrape.of("galaxyline:stage_busy_seconds_total", **place) == pytest.approx(4 * STEP_NS * 1e-9)
        assert scrape.of("galaxyline:stage_queue_seconds_sum", **place) == pytest.approx(4 * QUEUE_NS * 1e-9)
        assert scrape.of("galaxyline:stage_hop_seconds_count", **place) == 4
        assert 0 < scrape.of("galaxyline:stage_busy_share", **place) < 1e-3
    assert scrape.of("galaxyline:stage_hop_seconds_sum", engine="0", stage="1", host="fake-host") == pytest.approx(
        4 * HOP_NS * 1e-9
    )
    in_flight = sum(scrape.of("galaxyline:step_seconds_sum", engine="0", mode=mode) for mode in steps)
    bubbles = scrape.of("galaxyline:stage_bubble_seconds_total", engine="0", stage="0", host="fake-host")
    assert bubbles + 4 * STEP_NS * 1e-9 == pytest.approx(in_flight)


async def test_what_is_cached_is_shown_and_can_be_reset() -> None:
    async with monitored() as around:
        await around.engine.wait_ready(SECONDS)
        for _ in range(2):
            await answer(around.engine, request(around.engine, prompt=70, max_tokens=1))
        scrape, view = await around.scrape(), await around.pipeline()
        reset = await around.client.post("/reset_prefix_cache")
        after = await around.scrape()
        await answer(around.engine, request(around.engine, prompt=70, max_tokens=1))
        last = await around.scrape()
    assert (reset.status_code, reset.content) == (200, b"")
    assert scrape.model("vllm:prefix_cache_queries_total") == 140
    assert scrape.model("vllm:prefix_cache_hits_total") == last.model("vllm:prefix_cache_hits_total") == 64
    assert [one.model("galaxyline:prefix_cache_blocks") for one in (scrape, after, last)] == [2, 0, 2]
    assert view.engine is not None
    figures = (view.engine.prefix_cache_blocks, view.engine.prefix_cache_queries, view.engine.prefix_cache_hits)
    assert figures == (2, 140, 64)
    for stage in ("0", "1"):
        place = {"engine": "0", "stage": stage, "host": "fake-host"}
        assert scrape.of("galaxyline:stage_host_tier_bytes", **place) == 0
        assert scrape.of("galaxyline:stage_disk_tier_bytes", **place) == 0


async def test_requests_that_run_wait_and_leave_are_counted() -> None:
    async with monitored("start_stalling") as around:
        engine = around.engine
        await engine.wait_ready(SECONDS)
        streams = [engine.generate(request(engine, prompt=60, max_tokens=60)) for _ in range(20)]
        await anext(streams[0])
        scrape = await until(around.scrape, lambda scraped: scraped.of("galaxyline:steps_in_flight", engine="0") == 3)
        running, queued = scrape.model("vllm:num_requests_running"), scrape.model("vllm:num_requests_waiting")
        assert running + queued == 20
        assert 0 < running <= 12
        assert 0 < scrape.model("vllm:kv_cache_usage_perc") <= 1
        await streams[0].aclose("stop")
        for stream in streams:
            await stream.aclose()
        after = await around.scrape()
    assert after.model("vllm:request_success_total", finished_reason="abort") == 19
    assert after.model("vllm:request_success_total", finished_reason="stop") == 1
    assert after.model("vllm:num_requests_running") == after.model("vllm:kv_cache_usage_perc") == 0


async def test_metrics_have_the_types_and_bounds_of_vllm() -> None:
    async with monitored() as around:
        scrape = await around.scrape()
    assert scrape.model("vllm:request_params_n_sum") == 2
    assert scrape.model("vllm:request_max_num_generation_tokens_sum") == 5
    assert scrape.of("vllm:cache_config_info", block_size="32", cache_dtype="float32", engine="0") == 1
    assert scrape.of("http_requests_total", method="POST", handler="/v1/completions", status="200") == 1
    assert scrape.of("http_requests_total", method="GET", handler="none", status="404") == 1
    assert scrape.of("http_request_duration_seconds_sum", method="POST", handler="/v1/completions") == 0.2
    histograms = ("request_params_n", "iteration_tokens_total", "request_time_per_output_token_seconds")
    assert {scrape.families[f"vllm:{name}"].type for name in histograms} == {"histogram"}
    assert scrape.families["galaxyline:recomputed_tokens"].type == "counter"
    assert scrape.families["galaxyline:prefix_cache_blocks"].type == "gauge"
    counters = ("prompt_tokens", "generation_tokens", "request_success", "num_preemptions", "prefix_cache_hits")
    assert {scrape.families[f"vllm:{name}"].type for name in counters} == {"counter"}
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    assert {scrape.families[f"vllm:{name}"].type for name in gauges} == {"gauge"}
    first = scrape.families["vllm:time_to_first_token_seconds"]
    bounds = [sample.labels["le"] for sample in first.samples if sample.name.endswith("_bucket")]
    assert (first.type, len(bounds), bounds[:3], bounds[-2:]) == (
        "histogram",
        23,
        ["0.001", "0.005", "0.01"],
        ["2560.0", "+Inf"],
    )


async def test_names_keep_their_colons_whatever_a_scraper_prefers() -> None:
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    async with monitored() as around:
        around.client.headers["accept"] = accept
        scrape = await around.scrape()
    assert scrape.model("vllm:prompt_tokens_total") == 0


async def test_a_scrape_gives_the_front_ends_part_when_the_engine_is_gone() -> None:
    async with monitored() as around:
        engine = around.engine
        await engine.wait_ready(SECONDS)
        await answer(engine, request(engine))
        os.kill(engine.pid, signal.SIGKILL)
        scrape = await until(around.scrape, lambda scraped: scraped.of("galaxyline:engine_up", engine="0") == 0)
        view = await around.pipeline()
    assert scrape.of("galaxyline:engine_up", engine="0") == 0
    assert scrape.model("vllm:generation_tokens_total") >= 20
    assert "vllm:num_requests_running" not in scrape.families
    assert (view.phase, view.engine, view.stages) == ("failed", None, [])
    assert "The engine process was killed by signal 9" in view.detail


async def test_questions_that_the_engine_answers_too_late_mix_up_no_later_ones() -> None:
    async with monitored() as around:
        engine = around.engine
        await engine.wait_ready(SECONDS)
        process = psutil.Process(engine.pid)
        process.suspend()
        for ask in (engine.metrics, engine.report, engine.counts):
            with pytest.raises(EngineError, match=r"The engine did not answer within 0\.01 s"):
                await ask(timeout_s=0.01)
        process.resume()
        await answer(engine, request(engine, max_tokens=7))
        assert (await engine.metrics()).steps["decode"].counts != [0] * 17
        assert (await engine.report()).stages[0].pid == 1000
        assert (await engine.counts()).running == 0


async def test_the_pipeline_is_shown_while_it_loads() -> None:
    async with monitored("start_never") as around:
        view = await until(around.pipeline, lambda seen: seen.stages[1].state != "placing")
        scrape = await around.scrape()
    assert (view.model, view.phase) == (MODEL, "loading")
    assert view.detail == "Stage 1 on fake-host: loading, 1 of 2 layers"
    assert view.engine is not None
    assert (view.engine.epoch, view.engine.microbatches, view.engine.slots) == (None, 3, 12)
    first, second = view.stages
    assert (first.stage, first.host, first.rows, first.state) == (0, "fake-host", [0], "loading")
    assert (first.first_layer, first.end_layer, first.layers_done) == (0, 2, 1)
    assert (second.stage, second.first_layer, second.end_layer) == (1, 2, 4)
    assert (first.pid, first.resident_bytes, first.restarts, first.busy_share) == (None, None, 0, 0)
    assert scrape.of("galaxyline:engine_up", engine="0") == 1


async def test_the_pipeline_is_shown_at_work() -> None:
    async with monitored("start_stalling") as around:
        engine = around.engine
        await engine.wait_ready(SECONDS)
        streams = [engine.generate(request(engine, prompt=60)) for _ in range(12)]
        await anext(streams[0])
        views = await asyncio.gather(*(around.pipeline() for _ in range(5)))
        view = views[-1]
        assert view.engine is not None
        assert (view.phase, view.detail, view.engine.epoch, view.engine.pid) == ("ready", "", 7, engine.pid)
        assert view.engine.requests_running + view.engine.requests_waiting == 12
        assert view.engine.slots_used == view.engine.requests_running
        assert 0 < view.engine.kv_cache_blocks_used <= view.engine.kv_cache_blocks == 48
        for stage in view.stages:
            assert (stage.pid, stage.resident_bytes, stage.steps_done) == (1000 + stage.stage, 3 << 20, 7)
            assert (stage.state, stage.layers_done) == ("ready", 1)
            assert stage.kv_cache_blocks_used == view.engine.kv_cache_blocks_used
        for stream in streams:
            await stream.aclose()


async def test_a_pipeline_that_could_not_start_says_why() -> None:
    async with monitored("start_refused") as around:
        view = await until(around.pipeline, lambda seen: seen.phase != "loading")
    assert (view.phase, view.detail) == ("failed", "2 stages need 2 rows, the cluster has 1.")


@asynccontextmanager
async def in_front_of(*engines: ReportingEngine) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(SMALL, engines[0])
    add_monitoring_routes(app, SMALL.name, engines)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://monitored") as client:
        yield client


async def test_a_reset_reaches_all_replicas_that_work_also_where_one_does_not_take_it() -> None:
    sound, failed, silent, last = (ReportingEngine(at_work()) for _ in range(4))
    failed.state = failed_state(EngineError("The engine is gone."))
    failed.failure = EngineError("The engine is gone.")
    async with in_front_of(sound, failed, last) as client:
        assert (await client.post("/reset_prefix_cache")).status_code == 200
    silent.failure = EngineError.for_clients("The engine did not answer within 5 s.")
    async with in_front_of(sound, silent, last) as client:
        error = error_of(await client.post("/reset_prefix_cache"), 503)
    assert error["message"] == "The engine did not answer within 5 s."
    assert [engine.resets for engine in (sound, failed, silent, last)] == [2, 0, 0, 2]


async def test_where_no_engine_works_nothing_can_be_reset() -> None:
    failed = ReportingEngine(at_work())
    failed.state = failed_state(EngineError.for_clients("The engine is gone."))
    async with in_front_of(failed) as client:
        assert "The engine is gone." in error_of(await client.post("/reset_prefix_cache"), 503)["message"]
        error_of(await client.get("/reset_prefix_cache"), 405)
