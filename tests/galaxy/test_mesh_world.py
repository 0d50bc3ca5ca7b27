"""Pipelines of Ray actors whose meshes, of mock Galaxies, are joined by mesh sockets."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil
import pytest

from actors.errors import PipelineError, StartError
from actors.mpi.galaxy import VISIBLE_DEVICES
from actors.pipeline import Pipeline
from stages.device import PROFILES
from stages.step import Admission, Segment, Step
from tests.galaxy.chips import ON_CHIPS
from tests.galaxy.mesh_pipelines import (
    FITTING,
    GALAXIES,
    SECONDS,
    check_pairs,
    check_transfers,
    deployment,
    galaxy_environments,
    leftovers,
    options,
    run_steps,
    running,
    runs,
    step,
)
from tests.support.checkpoints import config_keys
from tests.support.loops import within
from tests.support.mock_galaxy.descriptors import pci_address
from tests.support.mock_galaxy.environment import mock_environment
from tests.support.mock_galaxy.wiring import COLUMNS, ROWS
from tests.support.ray_cluster import ray_of_this_process
from tests.support.stage_driver import GREEDY

if TYPE_CHECKING:
    from actors.cluster.cluster import Cluster

pytestmark = pytest.mark.slow

STEPS = 100
ALL_CHIPS = ",".join(pci_address(row, column) for row in range(ROWS) for column in range(COLUMNS))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Cluster]":
    """One Ray cluster for all tests of this module; pipelines find it and leave it running."""
    tmp_path_factory.getbasetemp()  # Before the temporary directory is another one, for the time of this module.
    with pytest.MonkeyPatch.context() as environment:
        if not ON_CHIPS:
            environment.delenv("RAY_ADDRESS", raising=False)
        with ray_of_this_process(GALAXIES * ROWS) as joined:
            yield joined


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, str]]:
    """Options for four stages with a row each on one host with a Galaxy; each stage sees its own rows only."""
    if ON_CHIPS:
        return [{} for _ in range(ROWS)]
    shared = mock_environment(tmp_path, range(ROWS), ROWS)
    return [{**shared, "TT_METAL_CACHE": str(tmp_path / f"cache-{stage}")} for stage in range(ROWS)]


@pytest.fixture
def galaxies(tmp_path: Path) -> list[dict[str, str]]:
    """Options for two stages with a Galaxy each: two hosts for ttnn, but only one for Ray."""
    if ON_CHIPS:
        return [{} for _ in range(GALAXIES)]
    return [{**environment, VISIBLE_DEVICES: ALL_CHIPS} for environment in galaxy_environments(tmp_path)]


@within(2 * SECONDS)
async def test_four_rows_pass_a_hundred_steps_on(
    cluster: "Cluster", rows: list[dict[str, str]], tmp_path: Path
) -> None:
    async with running(options("plain", rows, tmp_path)) as pipeline:
        await run_steps(pipeline, STEPS)
        await check_transfers(pipeline, ROWS, STEPS)
    check_pairs(tmp_path, ROWS, STEPS)


@within(2 * SECONDS)
async def test_two_galaxies_pass_a_hundred_steps_on(
    cluster: "Cluster", galaxies: list[dict[str, str]], tmp_path: Path
) -> None:
    async with running(options("plain", galaxies, tmp_path, ROWS)) as pipeline:
        await run_steps(pipeline, STEPS)
        await check_transfers(pipeline, GALAXIES, STEPS)
    check_pairs(tmp_path, GALAXIES, STEPS)


@within(2 * SECONDS)
async def test_real_stages_are_joined_from_mesh_to_mesh(
    cluster: "Cluster", rows: list[dict[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_keys(FITTING)), encoding="utf-8")
    how = options("", rows[:2], tmp_path)
    stage = msgspec.structs.replace(how.stage, cache_dir=str(tmp_path / "weights"))
    how = msgspec.structs.replace(how, runner=PROFILES["ttnn"].runner, stage=stage, hidden_size=FITTING["hidden_size"])
    prompt = Segment(slot=0, start=0, tokens=[1, 2, 3], new_blocks=[0], sample=True)
    async with running(how) as pipeline:
        for step_id in range(3):
            segment = (
                msgspec.structs.replace(prompt, start=2 + step_id, tokens=[4], new_blocks=[]) if step_id else prompt
            )
            admissions = [] if step_id else [Admission(slot=0, sampling=GREEDY)]
            await pipeline.submit(
                Step(
                    epoch=pipeline.epoch,
                    step_id=step_id,
                    mode="decode" if step_id else "prefill",
                    segments=[segment],
                    admissions=admissions,
                    ended=[],
                )
            )
            result = await asyncio.wait_for(pipeline.receive(), SECONDS)
            assert (result.step_id, len(result.tokens)) == (step_id, 1)
        sent, received = await deployment(pipeline).transfers()
    assert [transfer.sent for transfer in sent] == [transfer.sent for transfer in received]
    assert [transfer.sent.tensor.shape for transfer in sent] == 3 * [(1, 1, 32, FITTING["hidden_size"] // COLUMNS)]


@within(2 * SECONDS)
async def test_a_dropped_send_is_noticed(cluster: "Cluster", rows: list[dict[str, str]], tmp_path: Path) -> None:
    async with running(options("silent", rows[:2], tmp_path)) as pipeline:
        await run_steps(pipeline, 5)
    with pytest.raises(AssertionError):
        check_pairs(tmp_path, 2, 5)


@within(2 * SECONDS)
async def test_a_tensor_of_another_shape_fails_the_step(
    cluster: "Cluster", rows: list[dict[str, str]], tmp_path: Path
) -> None:
    async with running(options("mistaken", rows[:2], tmp_path)) as pipeline:
        await pipeline.submit(step(pipeline, 1))
        with pytest.raises(PipelineError, match=r"Stage 1 on \S+ failed at step 1: ProtocolError: stage 0 sent "):
            await asyncio.wait_for(pipeline.receive(), SECONDS)


@within(2 * SECONDS)
async def test_ends_with_different_specs_are_not_joined(
    cluster: "Cluster", rows: list[dict[str, str]], tmp_path: Path
) -> None:
    both = r"do not agree on what passes .*\[1, 1, 32, 128\] at decode.*\[1, 1, 64, 128\] at decode"
    with pytest.raises(StartError, match=both):
        await Pipeline.start(options("other_shape", rows[:2], tmp_path), lambda _: None)
    assert leftovers() == []


@pytest.mark.parametrize("runner", ["killed_at_start", "killed_in_barrier"])
@within(2 * SECONDS)
async def test_a_rank_killed_while_starting_is_named_and_a_new_world_starts(
    cluster: "Cluster", rows: list[dict[str, str]], tmp_path: Path, runner: str
) -> None:
    with pytest.raises(StartError, match=r"^Stage 1 on \S+ could not .*: its process died$"):
        await Pipeline.start(options(runner, rows[:2], tmp_path), lambda _: None)
    assert leftovers() == []
    async with running(options("plain", rows[:2], tmp_path)) as pipeline:
        await run_steps(pipeline, 2)


@within(2 * SECONDS)
async def test_a_rank_that_stands_still_is_named_at_the_deadline(
    cluster: "Cluster", rows: list[dict[str, str]], tmp_path: Path
) -> None:
    how = options("stopped_in_barrier", rows[:2], tmp_path, start_timeout_s=60.0)
    with pytest.raises(
        StartError, match=r"^stage 1 on \S+ \(no answer within 0\.9 s\): did not pass the barrier in time"
    ):
        await Pipeline.start(how, lambda _: None)
    assert leftovers() == []


@within(2 * SECONDS)
async def test_a_rank_killed_in_a_step_is_named_and_the_pipeline_comes_back_in_a_new_world(
    cluster: "Cluster", rows: list[dict[str, str]], tmp_path: Path
) -> None:
    async with running(options("killed_in_step", rows, tmp_path)) as pipeline:
        await run_steps(pipeline, 2)
        first = await pids(pipeline)
        await pipeline.submit(step(pipeline, 3))
        with pytest.raises(PipelineError, match=r"Stage 1 on \S+ failed at step 3: its process died"):
            await asyncio.wait_for(pipeline.receive(), SECONDS)
        await asyncio.wait_for(pipeline.recover(), SECONDS)
        second = await pids(pipeline)
        assert not first & second
        processes = [psutil.Process(pid) for pid in second]
        for step_id in (4, 5):
            await pipeline.submit(step(pipeline, step_id))
            assert (await asyncio.wait_for(pipeline.receive(), SECONDS)).step_id == step_id
    assert [process for process in processes if runs(process)] == []


async def pids(pipeline: Pipeline) -> set[int]:
    """Returns the processes of the stages and of what holds their world together."""
    return {health.pid for health in await pipeline.health()} | set(deployment(pipeline).mpi_pids)


@within(2 * SECONDS)
async def test_a_world_that_ends_is_named(cluster: "Cluster", rows: list[dict[str, str]], tmp_path: Path) -> None:
    async with running(options("plain", rows[:2], tmp_path)) as pipeline:
        os.kill(deployment(pipeline).mpi_pids[0], signal.SIGKILL)
        with pytest.raises(PipelineError, match="lost the MPI world: mpirun ended"):
            await asyncio.wait_for(pipeline.receive(), SECONDS)
