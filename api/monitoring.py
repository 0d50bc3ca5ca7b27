"""GET /metrics and GET /pipeline: what operators look at, and their tools."""

import asyncio
from typing import Protocol

import msgspec
from fastapi import FastAPI, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from api.error_responses import public_text
from api.errors import EngineError
from api.messages import EngineMetrics, EngineState, PipelineReport
from api.metrics import MetricsText
from api.pipeline_view import EngineView, PipelineView
from api.request_metrics import RequestMetrics
from api.responses import encode


class MonitoredEngine(Protocol):
    """What is asked of an engine: `EngineClient` is one."""

    requests: RequestMetrics

    @property
    def state(self) -> EngineState:
        """Where it stands now."""

    @property
    def pid(self) -> int:
        """Its process id. Raises EngineError before it was started."""

    async def metrics(self) -> EngineMetrics:
        """What it has measured. Raises EngineError where it is gone, or does not answer in time."""

    async def report(self) -> PipelineReport:
        """What it and its stages do now. Raises EngineError where it is gone, or does not answer in time."""


def add_monitoring_routes(app: FastAPI, model_name: str, engine: MonitoredEngine) -> None:
    """Both answer at any time, also while the engine loads and after it failed."""
    text = MetricsText(model_name, lambda: engine.pid)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        try:
            measured = await engine.metrics()
        except EngineError:
            measured = None
        families = text.families(engine.requests, measured)
        # Not on the loop, where the tokens of open streams pass.
        body = await asyncio.to_thread(text.encode, families)
        # Every scraper takes it, and the library's OpenMetrics would spell the colons in vLLM's names as underscores.
        return Response(body, headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

    @app.get("/pipeline", response_model=None)
    async def pipeline() -> Response:
        return Response(encode(await _view(model_name, engine)), media_type="application/json")


async def _view(model_name: str, engine: MonitoredEngine) -> PipelineView:
    report = await _report(engine)
    state = engine.state
    return PipelineView(
        model=model_name,
        phase=state.phase,
        detail=public_text(state.detail),
        engine=None if report is None else _engine_view(engine.pid, report),
        stages=[]
        if report is None
        else [msgspec.structs.replace(stage, detail=public_text(stage.detail)) for stage in report.stages],
    )


async def _report(engine: MonitoredEngine) -> PipelineReport | None:
    """None where the engine has failed and is gone. Raises EngineError where it does not answer in time."""
    try:
        return await engine.report()
    except EngineError:
        if engine.state.phase != "failed":
            raise
        return None


def _engine_view(pid: int, report: PipelineReport) -> EngineView:
    counts = report.counts
    return EngineView(
        pid=pid,
        epoch=report.epoch,
        microbatches=report.microbatches,
        steps_in_flight=counts.steps_in_flight,
        requests_running=counts.running,
        requests_waiting=counts.waiting,
        preemptions=report.preemptions,
        slots=counts.slots,
        slots_used=counts.slots - counts.free_slots,
        kv_cache_blocks=counts.blocks,
        kv_cache_blocks_used=counts.blocks - counts.free_blocks,
    )
