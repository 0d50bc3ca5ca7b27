"""The routes GET /metrics, GET /pipeline and POST /reset_prefix_cache, for operators and their tools."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import msgspec
from fastapi import FastAPI, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from api.client.request_metrics import RequestMetrics
from api.errors import EngineError
from api.messages.engine import DraftCounts, EngineMetrics, EngineState, PipelineReport, common_state, not_ready
from api.messages.pipeline_view import DraftView, EngineView, PipelineView, ReplicaView, total
from api.openai.bodies import INTERNAL_ERROR, encode
from api.server.metrics import FrontMetrics, Measured, MetricsText
from api.server.openapi import add_route, empty_answer, object_answer, text_answer
from api.settings.server import RESET_PATH

STOPPING = "is_stopping"
"""The attribute of an application's `state` that is True once the server was told to end."""


class MonitoredEngine(Protocol):
    """The interface of an engine that the routes need: `EngineClient` has it."""

    requests: RequestMetrics

    @property
    def state(self) -> EngineState:
        """The state now."""

    @property
    def pid(self) -> int:
        """The process id. Raises EngineError before the process was started."""

    async def metrics(self) -> EngineMetrics:
        """Queries its measurements. Raises EngineError where it is gone, or does not answer in time."""

    async def report(self) -> PipelineReport:
        """Queries what it and its stages do now. Raises EngineError where it is gone, or does not answer in time."""

    async def reset_prefix_cache(self) -> None:
        """Lets no later request begin with what is cached now. Raises EngineError where that is not certain."""


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """One engine as it is at this moment: `report` is None where it gave none, for the public sentence `cause`."""

    state: EngineState
    pid: int | None
    report: PipelineReport | None
    cause: str


def add_monitoring_routes(
    app: FastAPI,
    model_name: str,
    engines: Sequence[MonitoredEngine],
    front: FrontMetrics | None = None,
) -> None:
    """Adds the routes. Those that look answer at any time, also while engines load and after they failed."""
    text = MetricsText(model_name)

    async def metrics() -> Response:
        measured = await asyncio.gather(*map(_measured, engines))
        families = text.families(measured, front)
        # This runs on a thread, as the tokens of open streams pass the loop.
        body = await asyncio.to_thread(text.encode, families, measured)
        # Every scraper accepts this type; OpenMetrics would turn the colons in vLLM's names into underscores.
        return Response(body, headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

    async def pipeline() -> Response:
        looks = await asyncio.gather(*map(_look, engines))
        view = _view(model_name, looks, is_stopping=getattr(app.state, STOPPING, False))
        return Response(encode(view), media_type="application/json")

    async def reset() -> Response:
        await _reset(engines)
        return Response()

    add_route(app, "/metrics", metrics, text_answer(), "Measurements in Prometheus' text format.")
    add_route(app, "/pipeline", pipeline, object_answer(503), "What engines and stages do now.")
    summary = "Lets no later request begin with what is cached of prompts now."
    add_route(app, RESET_PATH, reset, empty_answer(503), summary, method="POST")


async def _measured(engine: MonitoredEngine) -> Measured:
    try:
        metrics = await engine.metrics()
    except EngineError:
        metrics = None
    return Measured(requests=engine.requests, metrics=metrics, pid=_pid(engine))


async def _reset(engines: Sequence[MonitoredEngine]) -> None:
    """Resets the caches of all engines that have not failed; raises the first error once all were told."""
    told = [engine.reset_prefix_cache() for engine in engines if engine.state.phase != "failed"]
    if not told:
        raise not_ready(common_state([engine.state for engine in engines]))
    for answer in await asyncio.gather(*told, return_exceptions=True):
        if isinstance(answer, BaseException):
            raise answer


async def _look(engine: MonitoredEngine) -> Look:
    try:
        report, cause = await engine.report(), ""
    except EngineError as error:
        report, cause = None, error.public or INTERNAL_ERROR
    return Look(state=engine.state, pid=_pid(engine), report=report, cause=cause)


def _pid(engine: MonitoredEngine) -> int | None:
    """The process id of an engine; None before its start and after its end."""
    try:
        return engine.pid if engine.state.phase != "failed" else None
    except EngineError:
        return None


def _view(model_name: str, looks: Sequence[Look], *, is_stopping: bool) -> PipelineView:
    """Makes the body of GET /pipeline. Raises EngineError where no engine answers, but not all have failed.

    While the server ends, an engine that does not answer is part of that, and raises nothing.
    """
    silent = [look.cause for look in looks if look.report is None and look.state.phase != "failed"]
    if silent and all(look.report is None for look in looks) and not is_stopping:
        raise EngineError.for_clients(silent[0])
    state = common_state([look.state for look in looks])
    replicas = [_replica_view(replica, look, is_stopping=is_stopping) for replica, look in enumerate(looks)]
    return PipelineView(
        model=model_name,
        phase="stopping" if is_stopping else state.phase,
        detail="" if is_stopping else state.public_sentence,
        engine=total([replica.engine for replica in replicas if replica.engine is not None]),
        replicas=replicas,
        stages=[
            msgspec.structs.replace(stage, replica=replica)
            for replica, look in enumerate(looks)
            if look.report is not None
            for stage in look.report.stages
        ],
    )


def _replica_view(replica: int, look: Look, *, is_stopping: bool) -> ReplicaView:
    engine = None if look.report is None else _engine_view(look.pid, look.report)
    if is_stopping:
        return ReplicaView(replica=replica, phase="stopping", detail="", engine=engine)
    is_silent = look.report is None and look.state.phase != "failed"
    return ReplicaView(
        replica=replica,
        phase=look.state.phase,
        detail=look.cause if is_silent else look.state.public_sentence,
        engine=engine,
    )


def _engine_view(pid: int | None, report: PipelineReport) -> EngineView:
    counts, prefix = report.counts, report.prefix
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
        prefix_cache_blocks=prefix.blocks,
        prefix_cache_queries=prefix.queries,
        prefix_cache_hits=prefix.hits,
        recomputed_tokens=prefix.recomputed_tokens,
        host_tier_bytes=sum(stage.host_tier_bytes for stage in report.stages),
        disk_tier_bytes=sum(stage.disk_tier_bytes for stage in report.stages),
        drafts=_draft_view(report.drafts) if report.drafts.num_speculative_tokens else None,
        sampling_fallbacks=report.sampling_fallbacks,
    )


def _draft_view(drafts: DraftCounts) -> DraftView:
    return DraftView.of(
        num_speculative_tokens=drafts.num_speculative_tokens,
        drafts=drafts.drafts,
        draft_tokens=drafts.draft_tokens,
        accepted_tokens=drafts.accepted_tokens,
        accepted_per_position=drafts.accepted_per_position,
        are_on=drafts.are_on,
    )
