"""Pipelines of mock Galaxies for tests, with checks of what both ends of every socket recorded."""

import asyncio
import itertools
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import psutil

from actors.options import ClusterOptions, PipelineOptions
from actors.pipeline import Pipeline
from stages.options import CacheOptions, StageOptions, WeightOptions
from stages.plan import StageSpec
from stages.step import Mode, Segment, Step
from tests.galaxy.mesh_runners import DECODE, HIDDEN_SIZE, PREFILL, Call, calls_of
from tests.support.mock_galaxy.descriptors import cluster_descriptor
from tests.support.mock_galaxy.environment import mock_environment
from tests.support.mock_galaxy.wiring import COLUMNS, ROWS

FITTING = {
    "vocab_size": 4096,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
"""A small model whose attention has the sizes of DeepSeek-R1's, for which the ops of a row are made."""

if TYPE_CHECKING:
    from actors.deployment import Deployment

SECONDS = 120
GALAXIES = 2


def galaxy_environments(folder: Path) -> list[dict[str, str]]:
    """Options for two hosts with a mock Galaxy each."""
    shared = mock_environment(folder, range(ROWS), GALAXIES * ROWS)
    environments = []
    for host in range(GALAXIES):
        descriptor = folder / f"cluster-{host}.yaml"
        own = range(host * ROWS, (host + 1) * ROWS)
        descriptor.write_text(cluster_descriptor(own, GALAXIES * ROWS), encoding="utf-8")
        changes = {
            "TT_METAL_MOCK_CLUSTER_DESC_PATH": str(descriptor),
            "TT_METAL_CACHE": str(folder / f"cache-{host}"),
        }
        environments.append({**shared, **changes})
    return environments


def options(
    runner: str,
    environments: list[dict[str, str]],
    folder: Path,
    rows_per_stage: int = 1,
    ray_address: str | None = None,
    start_timeout_s: float = SECONDS,
) -> PipelineOptions:
    stages = len(environments)
    pools = rows_per_stage * COLUMNS
    cache = CacheOptions(slots=pools, pools=pools, blocks=2, block_size=32, max_model_len=64)
    return PipelineOptions(
        hidden_size=HIDDEN_SIZE,
        specs=[
            StageSpec(index=index, stages=stages, first_layer=index, end_layer=index + 1) for index in range(stages)
        ],
        stage=StageOptions(
            model_path=str(folder),
            cache_dir="",
            dtype="bfloat16",
            weights=WeightOptions(load_format="dummy"),
            seed=0,
            cache=cache,
        ),
        cluster=ClusterOptions(
            device="ttnn",
            rows_per_stage=rows_per_stage,
            ray_address=ray_address,
            start_timeout_s=start_timeout_s,
            step_timeout_s=SECONDS,
        ),
        runner=f"tests.galaxy.mesh_runners:{runner}",
        transport="mesh",
        environments=environments,
    )


def mode(step_id: int) -> Mode:
    return "prefill" if step_id % 10 == 0 else "decode"


def step(pipeline: Pipeline, step_id: int) -> Step:
    segment = Segment(slot=0, start=0, tokens=[1], new_blocks=[], sample=True)
    return Step(epoch=pipeline.epoch, step_id=step_id, mode=mode(step_id), segments=[segment], admissions=[], ended=[])


@asynccontextmanager
async def running(how: PipelineOptions) -> AsyncIterator[Pipeline]:
    """A pipeline that must leave neither a process nor a file."""
    pipeline = await Pipeline.start(how, lambda _: None)
    try:
        pids = [health.pid for health in await pipeline.health()] + deployment(pipeline).mpi_pids
        processes = [psutil.Process(pid) for pid in pids]
        assert len(set(pids)) == 2 * len(how.specs) + 1
        yield pipeline
    finally:
        await pipeline.close()
    assert [process for process in processes if runs(process)] == []
    assert leftovers() == []


def runs(process: psutil.Process) -> bool:
    """Whether a process still runs, and is not only an entry that its parent has not read yet."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def deployment(pipeline: Pipeline) -> "Deployment":
    return cast("Deployment", pipeline._stages)


def leftovers() -> list[str]:
    """The files of the pipeline, and the processes of its MPI world."""
    files = [str(path) for path in Path(tempfile.gettempdir()).glob("galaxyline-*")]
    children = psutil.Process().children(recursive=True)
    return files + [process.name() for process in children if process.name().startswith(("prte", "mpirun"))]


async def run_steps(pipeline: Pipeline, count: int) -> None:
    async def submit() -> None:
        for step_id in range(1, count + 1):
            await pipeline.submit(step(pipeline, step_id))

    submitting = asyncio.ensure_future(submit())
    try:
        for step_id in range(1, count + 1):
            result = await asyncio.wait_for(pipeline.receive(), SECONDS)
            assert (result.step_id, result.tokens) == (step_id, [step_id])
    finally:
        submitting.cancel()


def expected_calls(name: str, count: int) -> list[Call]:
    whats = [(step_id, PREFILL if mode(step_id) == "prefill" else DECODE) for step_id in range(1, count + 1)]
    return [Call(name, step_id, what.shape, "DataType.BFLOAT16") for step_id, what in whats]


def check_pairs(folder: Path, stages: int, count: int) -> None:
    """Checks that each end of every socket made the right calls, in the order of steps."""
    for stage in range(stages):
        calls = calls_of(folder, stage)
        received = [call for call in calls if call.name == "receive"]
        sent = [call for call in calls if call.name == "send"]
        assert received == (expected_calls("receive", count) if stage else [])
        assert sent == (expected_calls("send", count) if stage < stages - 1 else [])


async def check_transfers(pipeline: Pipeline, stages: int, count: int) -> None:
    """Checks that the pipeline's own record is the same for both ends of each socket."""
    transfers = await deployment(pipeline).transfers()
    for before, after in itertools.pairwise(transfers):
        sent = [transfer for transfer in before if transfer.direction == "send"]
        received = [transfer for transfer in after if transfer.direction == "receive"]
        assert [transfer.sent for transfer in sent] == [transfer.sent for transfer in received]
        assert {transfer.socket for transfer in sent} == {transfer.socket for transfer in received}
        assert [transfer.sent.step_id for transfer in sent] == list(range(1, count + 1))
    assert len(transfers) == stages
