"""A pipeline of real processes on a real Ray cluster that loses stages and comes back."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn, cast

import msgspec
import psutil
import pytest

from actors.errors import PipelineError, StartError
from actors.options import PipelineOptions
from actors.pipeline import Pipeline
from actors.stage.health import StageProgress
from tests.support.early_runner import VARIABLE
from tests.support.loops import on_uvloop
from tests.support.pipelines import leftovers, options, receive, runs, step
from tests.support.ray_cluster import ray_of_this_process

if TYPE_CHECKING:
    from actors.cluster.cluster import Cluster
    from actors.deployment import Deployment

STAGES = 3
SECONDS = 120


@pytest.fixture(scope="module")
def cluster() -> "Iterator[Cluster]":
    """One Ray for all tests of this module."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        with ray_of_this_process(STAGES) as joined:
            yield joined


async def pass_steps(pipeline: Pipeline, first: int, count: int = 40) -> None:
    """Passes steps through the pipeline, which all come back in order, with what the stages made of them."""
    for step_id in range(first, first + count):
        await pipeline.submit(step(pipeline, step_id))
        result = await receive(pipeline)
        assert (result.step_id, result.epoch, result.tokens) == (step_id, pipeline.epoch, [(step_id + STAGES) % 256])


async def receive_all(pipeline: Pipeline) -> NoReturn:
    """Receives results until the pipeline fails."""
    while True:
        await receive(pipeline)


async def pids(pipeline: Pipeline) -> list[int]:
    return [health.pid for health in await pipeline.health()]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hurt", "cause"), [(kill, "its process died"), (stop, "no answer within 0.9 s")], ids=["killed", "stopped"]
)
@pytest.mark.parametrize("victim", range(STAGES))
@on_uvloop
async def test_a_lost_stage_is_replaced_and_the_others_stay(
    cluster: "Cluster", hurt: Callable[[int], None], cause: str, victim: int
) -> None:
    told: list[StageProgress] = []
    pipeline = await Pipeline.start(options("echo", stages=STAGES), told.append)
    try:
        await pass_steps(pipeline, 0)
        before = await pids(pipeline)
        hurt(before[victim])
        with pytest.raises(PipelineError, match=rf"^Stage {victim} on \S+ failed.*: {cause}") as lost:
            await receive(pipeline)
        assert lost.value.stage == victim
        epoch = pipeline.epoch
        await pipeline.recover()
        assert pipeline.epoch > epoch
        await pass_steps(pipeline, 100)
        after = await pids(pipeline)
        assert [stage for stage in range(STAGES) if before[stage] != after[stage]] == [victim]
        starts = [progress.stage for progress in told if progress.phase == "starting"]
        assert starts == [*range(STAGES), victim]
    finally:
        await pipeline.close()
    assert not any(runs(pid) for pid in [*before, *after])
    assert leftovers() == []


@pytest.mark.slow
@on_uvloop
async def test_a_stage_that_raises_keeps_its_process_the_first_time_and_gets_another_the_second(
    cluster: "Cluster",
) -> None:
    pipeline = await Pipeline.start(options("acting", "raise:1:5", stages=STAGES), lambda _: None)
    try:
        before = await pids(pipeline)
        for is_second in (False, True):
            await pipeline.submit(step(pipeline, 5))
            with pytest.raises(PipelineError, match=r"^Stage 1 on \S+ failed at step 5: ZeroDivisionError") as raised:
                await receive(pipeline)
            assert raised.value.step_id == 5
            await pipeline.recover()
            after = await pids(pipeline)
            assert [one == other for one, other in zip(before, after, strict=True)] == [True, not is_second, True]
        await pass_steps(pipeline, 6)
    finally:
        await pipeline.close()
    assert leftovers() == []


@pytest.mark.slow
@on_uvloop
async def test_a_stuck_stage_is_replaced_and_its_step_is_named(cluster: "Cluster") -> None:
    how = options("acting", "sleep:1:5", stages=STAGES, step_timeout_s=2.0)
    pipeline = await Pipeline.start(how, lambda _: None)
    try:
        before = await pids(pipeline)
        for step_id in (4, 5, 6):
            await pipeline.submit(step(pipeline, step_id))
        assert (await receive(pipeline)).step_id == 4
        with pytest.raises(PipelineError, match=r"^Stage 1 on \S+ failed at step 5: it did not come out") as late:
            await receive(pipeline)
        assert (late.value.stage, late.value.step_id) == (1, 5)
        await pipeline.recover()
        await pass_steps(pipeline, 7)
        after = await pids(pipeline)
        assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True]
    finally:
        await pipeline.close()


@pytest.mark.slow
@on_uvloop
async def test_a_cut_link_costs_nobody_its_process(cluster: "Cluster") -> None:
    pipeline = await Pipeline.start(options("cutting", "", stages=STAGES), lambda _: None)
    try:
        await pass_steps(pipeline, 0, 5)
        before = await pids(pipeline)
        await pipeline.submit(step(pipeline, 1000))
        # The link by which it came in is cut while it is computed: it may get out before the loss is known.
        with pytest.raises(PipelineError, match="lost the link"):
            await receive_all(pipeline)
        await pipeline.recover()
        await pass_steps(pipeline, 6)
        assert await pids(pipeline) == before
        assert await spare_pids(pipeline) == []
    finally:
        await pipeline.close()


@pytest.mark.slow
@on_uvloop
async def test_a_stage_that_dies_while_another_is_replaced_is_replaced_next(cluster: "Cluster") -> None:
    pipeline = await Pipeline.start(options("echo", stages=STAGES), lambda _: None)
    try:
        before = await pids(pipeline)
        kill(before[0])
        with pytest.raises(PipelineError):
            await receive(pipeline)
        recovering = asyncio.ensure_future(pipeline.recover())
        kill(before[2])
        # It may die before it is asked to be joined anew, or while the other one loads.
        [failed] = await asyncio.gather(recovering, return_exceptions=True)
        if failed is not None:
            assert isinstance(failed, StartError)
            await pipeline.recover()
        await pass_steps(pipeline, 6)
        after = await pids(pipeline)
        assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, False]
    finally:
        await pipeline.close()
    assert leftovers() == []


def with_spares(runner: str = "echo") -> PipelineOptions:
    return options(runner, stages=STAGES, spare=True, start_timeout_s=SECONDS)


async def spare_pids(pipeline: Pipeline) -> list[int]:
    return await cast("Deployment", pipeline._stages).spare_pids()


async def lose(pipeline: Pipeline, victims: Sequence[int]) -> None:
    """Kills stages, and waits until the pipeline has failed."""
    before = await pids(pipeline)
    for victim in victims:
        kill(before[victim])
    with pytest.raises(PipelineError):
        await receive(pipeline)


@pytest.mark.slow
@on_uvloop
async def test_a_spare_becomes_the_lost_stage_and_another_one_waits_then(cluster: "Cluster") -> None:
    told: list[StageProgress] = []
    pipeline = await Pipeline.start(with_spares(), told.append)
    seen = set()
    try:
        for turn, victim in enumerate((1, 0, 1)):
            before = await pids(pipeline)
            [spare] = await spare_pids(pipeline)
            seen |= {spare, *before}
            await lose(pipeline, [victim])
            await pipeline.recover()
            before[victim] = spare
            assert await pids(pipeline) == before
            await pass_steps(pipeline, 100 * turn)
        [waiting] = await spare_pids(pipeline)
        assert waiting not in seen
        starts = [progress.stage for progress in told if progress.phase == "starting"]
        assert starts == [*range(STAGES), 1, 0, 1]
    finally:
        await pipeline.close()
    assert not any(runs(pid) for pid in [*seen, waiting])
    assert leftovers() == []


@pytest.mark.slow
@on_uvloop
async def test_a_spare_that_dies_is_replaced_before_it_is_needed(cluster: "Cluster") -> None:
    pipeline = await Pipeline.start(with_spares(), lambda _: None)
    try:
        [before] = await spare_pids(pipeline)
        kill(before)

        async def another() -> None:
            from ray.exceptions import RayError  # noqa: PLC0415 - the fixture has prepared its environment

            found = [before]
            while found == [before]:
                await asyncio.sleep(0.1)
                # Raised between its death and its replacement.
                with contextlib.suppress(RayError):
                    found = await spare_pids(pipeline)

        await asyncio.wait_for(another(), SECONDS)
    finally:
        await pipeline.close()
    assert leftovers() == []


@pytest.mark.slow
@pytest.mark.parametrize("hurt", [kill, stop], ids=["killed", "stopped"])
@on_uvloop
async def test_a_spare_that_does_not_answer_is_not_used(cluster: "Cluster", hurt: Callable[[int], None]) -> None:
    pipeline = await Pipeline.start(with_spares(), lambda _: None)
    try:
        before = await pids(pipeline)
        [spare] = await spare_pids(pipeline)
        hurt(spare)
        await lose(pipeline, [2])
        await pipeline.recover()
        after = await pids(pipeline)
        assert after[:2] == before[:2]
        assert after[2] not in {spare, before[2]}
        await pass_steps(pipeline, 0)
        [another] = await spare_pids(pipeline)
        assert another not in {spare, *before, *after}
    finally:
        await pipeline.close()
    assert not any(runs(pid) for pid in [spare, another, *before, *after])


@pytest.mark.slow
@on_uvloop
async def test_of_two_stages_that_are_lost_at_once_one_gets_the_spare(cluster: "Cluster") -> None:
    pipeline = await Pipeline.start(with_spares(), lambda _: None)
    try:
        before = await pids(pipeline)
        [spare] = await spare_pids(pipeline)
        await lose(pipeline, [0, 2])
        await pipeline.recover()
        first, second, third = await pids(pipeline)
        assert (first, second) == (spare, before[1])
        assert third not in {spare, *before}
        await pass_steps(pipeline, 0)
    finally:
        await pipeline.close()
    assert not any(runs(pid) for pid in [spare, third, *before])


@pytest.mark.slow
@on_uvloop
async def test_a_spare_that_is_only_starting_ends_with_the_pipeline(cluster: "Cluster") -> None:
    pipeline = await Pipeline.start(with_spares(), lambda _: None)
    await pipeline.close()
    assert await spare_pids(pipeline) == []
    deadline = asyncio.get_running_loop().time() + SECONDS
    while left := stage_processes():
        assert asyncio.get_running_loop().time() < deadline, left
        await asyncio.sleep(0.1)


def stage_processes() -> list[psutil.Process]:
    """Returns the processes of stages and of spares, by the title that Ray gives them."""
    children = psutil.Process().children(recursive=True)
    found = []
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "StageActor" in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.slow
@on_uvloop
async def test_a_spare_has_its_environment_before_it_imports_torch(cluster: "Cluster") -> None:
    how = msgspec.structs.replace(
        with_spares(), runner="tests.support.early_runner:load", environments=[{VARIABLE: "1"}] * STAGES
    )
    pipeline = await Pipeline.start(how, lambda _: None)
    try:
        [spare] = await spare_pids(pipeline)
        await lose(pipeline, [1])
        await pipeline.recover()
        assert (await pids(pipeline))[1] == spare
        await pass_steps(pipeline, 0)
    finally:
        await pipeline.close()


@pytest.mark.slow
@on_uvloop
async def test_there_are_no_spares_for_stages_of_different_environments(cluster: "Cluster") -> None:
    environments = [{VARIABLE: str(stage)} for stage in range(STAGES)]
    pipeline = await Pipeline.start(msgspec.structs.replace(with_spares(), environments=environments), lambda _: None)
    try:
        assert await spare_pids(pipeline) == []
    finally:
        await pipeline.close()
