"""Pipelines of real processes with runners that need no model, and what their stages report."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from actors.options import ClusterOptions, PipelineOptions
from actors.pipeline import Pipeline
from actors.stage.health import StageHealth, State
from stages.options import CacheOptions, StageOptions, WeightOptions
from stages.plan import StageSpec
from stages.step import FailureKind, Segment, StageFailure, Step, StepResult
from tests.support.runners import HIDDEN_SIZE

SECONDS = 30
LAYERS = 2
LOST_LINK = StageFailure(
    epoch=1, stage=2, host="host-a", step_id=-1, kind="lost_link", cause="lost the link from stage 1: reset"
)
RAISED = StageFailure(epoch=1, stage=2, host="host-a", step_id=9, kind="error", cause="ValueError: x")


def options(runner: str, model_path: str = "", *, stages: int = 2, rows: int = 1, **cluster: Any) -> PipelineOptions:
    """So many stages of so many rows; `cluster` are others of ClusterOptions."""
    cache = CacheOptions(slots=1, pools=1, blocks=2, block_size=32, max_model_len=64)
    return PipelineOptions(
        hidden_size=HIDDEN_SIZE,
        specs=[
            StageSpec(index=index, stages=stages, first_layer=LAYERS * index, end_layer=LAYERS * (index + 1))
            for index in range(stages)
        ],
        stage=StageOptions(
            model_path=model_path,
            cache_dir="",
            dtype="float32",
            weights=WeightOptions(load_format="dummy"),
            seed=0,
            cache=cache,
        ),
        cluster=ClusterOptions(
            rows_per_stage=rows, **{"start_timeout_s": SECONDS, "step_timeout_s": SECONDS, "spare": False, **cluster}
        ),
        runner=f"tests.support.runners:{runner}",
    )


def step(pipeline: Pipeline, step_id: int) -> Step:
    segment = Segment(slot=0, start=0, tokens=[step_id, step_id], new_blocks=[], sample=True)
    return Step(epoch=pipeline.epoch, step_id=step_id, mode="decode", segments=[segment], admissions=[], ended=[])


@asynccontextmanager
async def running(how: PipelineOptions) -> AsyncIterator[Pipeline]:
    pipeline = await Pipeline.start(how, lambda _: None)
    try:
        yield pipeline
    finally:
        await pipeline.close()


async def receive(pipeline: Pipeline) -> StepResult:
    return await asyncio.wait_for(pipeline.receive(), SECONDS)


def leftovers() -> list[str]:
    return [str(path) for path in Path(tempfile.gettempdir()).glob("galaxyline-*")]


def runs(pid: int) -> bool:
    """Whether a process runs; one that its parent has not taken the exit code of does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def health(
    stage: int, state: State, detail: str = "", seconds: float = 0.0, failure: FailureKind | None = None
) -> StageHealth:
    return StageHealth(
        stage=stage,
        host="host-a",
        pid=1,
        state=state,
        step_id=9 if state == "running" else None,
        step_seconds=seconds,
        steps_done=0,
        busy_seconds=0.0,
        layers_done=0,
        layers=0,
        resident_bytes=0,
        received_step=None,
        detail=detail,
        failure=failure,
    )
