"""Pipelines of real processes on a real Ray cluster of this host, with runners that need no model."""

import asyncio
import functools
import os
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from actors.cluster.environment import cluster_address, prepare_environment
from actors.errors import ClusterError, LinkError, PipelineError, PlacementError, StartError
from actors.pipeline import Pipeline
from actors.sockets.frames import LinkMessage
from actors.sockets.link import Arrival, EngineLinks, Link
from actors.stage.health import StageHealth, StageProgress
from actors.stage.runner import runner_factory
from stages.kv.inventory import Inventory
from stages.step import StageFailure, StepResult
from tests.support.loops import on_skipping_loop, on_uvloop, skip_time
from tests.support.pipelines import (
    LAYERS,
    LOST_LINK,
    RAISED,
    SECONDS,
    health,
    leftovers,
    options,
    receive,
    running,
    step,
)
from tests.support.ray_cluster import ray_of_this_process
from weights.errors import CheckpointError

if TYPE_CHECKING:
    from actors.cluster.cluster import Cluster

ROWS = 3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Cluster]":
    """One Ray for all tests of this module; pipelines find it and leave it running."""
    tmp_path_factory.getbasetemp()  # Not in the directory of this Ray, which is removed.
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        with ray_of_this_process(ROWS) as joined:
            yield joined


@pytest.mark.slow
@on_uvloop
async def test_results_come_in_order_and_nothing_is_left_after_close(cluster: "Cluster") -> None:
    told: list[StageProgress] = []
    pipeline = await Pipeline.start(options("echo", stages=3), told.append)
    healths = await pipeline.health()
    processes = [psutil.Process(health.pid) for health in healths]
    assert [(health.stage, health.state) for health in healths] == [(0, "ready"), (1, "ready"), (2, "ready")]
    assert len({health.pid for health in healths} | {os.getpid()}) == 4
    count = 200

    async def submit_all() -> None:
        for step_id in range(count):
            await pipeline.submit(step(pipeline, step_id))

    submitting = asyncio.ensure_future(submit_all())
    results = [await receive(pipeline) for _ in range(count)]
    await submitting
    assert [result.step_id for result in results] == list(range(count))
    assert [result.tokens for result in results] == [[(step_id + 3) % 256] for step_id in range(count)]
    assert [health.steps_done for health in await pipeline.health()] == [count] * 3
    await pipeline.close()
    await pipeline.close()
    assert not any(process.is_running() for process in processes)
    assert leftovers() == []
    with pytest.raises(PipelineError, match="closed"):
        await pipeline.receive()
    for stage in range(3):
        own = [progress for progress in told if progress.stage == stage]
        phases = [progress.phase for progress in own]
        assert phases[0] == "starting"
        assert phases[-2:] == ["connecting", "ready"]
        assert own[-1].layers_done == own[-1].layers == LAYERS


@pytest.mark.slow
@on_uvloop
async def test_a_killed_stage_is_named_and_nothing_is_left(cluster: "Cluster") -> None:
    async with running(options("acting", "sleep:1:5", stages=3)) as pipeline:
        pids = [health.pid for health in await pipeline.health()]
        processes = [psutil.Process(pid) for pid in pids]
        await pipeline.submit(step(pipeline, 4))
        assert (await receive(pipeline)).step_id == 4
        await pipeline.submit(step(pipeline, 5))
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(PipelineError, match=r"Stage 1 on \S+ failed at step 5: its process died") as first:
            await receive(pipeline)
        with pytest.raises(PipelineError) as second:
            await pipeline.submit(step(pipeline, 6))
        assert second.value is first.value
        assert [health.state for health in await pipeline.health()][1] == "dead"
    assert not any(process.is_running() for process in processes)
    assert leftovers() == []


@pytest.mark.slow
@on_uvloop
async def test_a_raising_stage_is_named_with_its_step_and_cause(cluster: "Cluster") -> None:
    async with running(options("acting", "raise:0:1")) as pipeline:
        await pipeline.submit(step(pipeline, 0))
        # A step that is still further down when a stage fails is lost with it: this one has to be out first.
        assert (await receive(pipeline)).step_id == 0
        await pipeline.submit(step(pipeline, 1))
        with pytest.raises(
            PipelineError, match=r"^Stage 0 on \S+ failed at step 1: ZeroDivisionError: one by nought\.$"
        ):
            await receive(pipeline)


@pytest.mark.slow
@on_uvloop
async def test_a_late_step_names_the_stage_that_is_stuck_and_health_is_answered_meanwhile(cluster: "Cluster") -> None:
    async with running(options("acting", "sleep:1:0", step_timeout_s=1.0)) as pipeline:
        await pipeline.submit(step(pipeline, 0))
        healths = await pipeline.health()
        while healths[1].state != "running":
            healths = await pipeline.health()
        assert healths[1].step_id == 0
        with pytest.raises(
            PipelineError, match=r"Stage 1 on \S+ failed at step 0: it did not come out within 1 s, and the stage has"
        ):
            await receive(pipeline)


@pytest.mark.parametrize(
    ("model_path", "error", "sentence"),
    [
        ("files", CheckpointError, r"^model\.safetensors has no tensor model\.layers\.1\.mlp\.gate\.weight\.$"),
        ("code", StartError, r"^Stage 1 on \S+ could not load its weights: ValueError: no such thing$"),
        ("process", StartError, r"^Stage 1 on \S+ could not load its weights: its process died$"),
    ],
)
@pytest.mark.slow
@on_uvloop
async def test_a_stage_that_cannot_load_is_named(
    cluster: "Cluster", model_path: str, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        await Pipeline.start(options("unloadable", model_path), lambda _: None)
    assert leftovers() == []


@pytest.mark.slow
@on_uvloop
async def test_a_start_that_takes_too_long_names_who_is_late(cluster: "Cluster") -> None:
    how = options("unloadable", "clock", start_timeout_s=4.0)
    with pytest.raises(StartError, match=r"tage 1 on \S+ \(.*did not load its weights in time"):
        await Pipeline.start(how, lambda _: None)


@pytest.mark.parametrize("path", ["tests.support.runners:nobody", "tests.nowhere:echo", "tests.support.runners"])
def test_an_unknown_runner_is_a_start_error(path: str) -> None:
    with pytest.raises(StartError, match=f"Cannot import the stage runner {path}"):
        runner_factory(path)


@pytest.mark.slow
@on_uvloop
async def test_stages_that_can_never_fit_are_refused_at_once(cluster: "Cluster") -> None:
    with pytest.raises(PlacementError, match=r"2 stages of 2 rows need 4 Galaxy rows.*has 3: \S+ \(3\).*room for 1"):
        await Pipeline.start(options("echo", stages=2, rows=2), lambda _: None)


@pytest.mark.slow
@on_uvloop
async def test_rows_in_use_are_waited_for_until_the_deadline_and_free_after_close(cluster: "Cluster") -> None:
    waiting = options("echo", rows=1, placement_timeout_s=1.0)
    async with running(options("echo", stages=1, rows=2)):
        runs = rf"These processes of stages run: 1 on 127\.0\.0\.1 by process {os.getpid()} on 127"
        told = rf"were not free within 1 s.*\(3, 2 in use\).* {runs}"
        with pytest.raises(PlacementError, match=told):
            await Pipeline.start(waiting, lambda _: None)
    async with running(options("echo", stages=1, rows=ROWS)) as pipeline:
        assert [health.state for health in await pipeline.health()] == ["ready"]


@pytest.mark.slow
@on_uvloop
async def test_pipelines_that_start_at_once_on_one_host_own_different_rows(cluster: "Cluster") -> None:
    told: list[list[StageProgress]] = [[], [], []]
    starts = [Pipeline.start(options("echo", stages=1), progress.append) for progress in told]
    pipelines = await asyncio.gather(*starts)
    try:
        assert sorted(progress[-1].rows for progress in told) == [[row] for row in range(ROWS)]
        await pipelines[1].close()
        again: list[StageProgress] = []
        pipelines.append(await Pipeline.start(options("echo", stages=1), again.append))
        assert again[-1].rows == told[1][-1].rows
    finally:
        for pipeline in pipelines:
            await pipeline.close()


async def test_a_cluster_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    prepare_environment("127.0.0.1:1")
    from actors.cluster.cluster import Cluster  # noqa: PLC0415 - imports Ray, which reads the environment

    with pytest.raises(ClusterError, match=r"No Ray cluster answers at 127\.0\.0\.1:1"):
        await Cluster.join("127.0.0.1:1", 1, tmp_path)


async def greet(said: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says something, and nothing more until the client leaves."""
    writer.write(said)
    await reader.read()
    writer.close()
    await writer.wait_closed()


async def test_what_takes_connections_and_does_not_answer_is_named_in_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_environment("127.0.0.1:1")
    from actors.cluster import cluster  # noqa: PLC0415 - imports Ray, which reads the environment

    monkeypatch.setattr(cluster, "REACH_SECONDS", 0.2)
    for said in (b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"):
        greeter = await asyncio.start_server(functools.partial(greet, said), "127.0.0.1", 0)
        address = "{}:{}".format(*greeter.sockets[0].getsockname())
        with pytest.raises(ClusterError, match=rf"No Ray cluster answers at {address}"):
            await cluster.Cluster.join(address, 1, tmp_path)
        greeter.close()


async def test_a_stale_note_of_the_current_cluster_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_environment("127.0.0.1:1")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    from actors.cluster.cluster import Cluster  # noqa: PLC0415 - imports Ray, which reads the environment

    with pytest.raises(ClusterError, match=r"No Ray cluster answers at 127\.0\.0\.1:1"):
        await Cluster.join(None, 1, tmp_path)


def test_the_environment_names_the_cluster_unless_an_address_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster_address(None) == "10.0.0.1:6379"
    assert cluster_address("10.0.0.2:6379") == "10.0.0.2:6379"
    assert cluster_address("local") is None
    monkeypatch.delenv("RAY_ADDRESS")
    assert cluster_address(None) is None


class FakeStages:
    """Stages whose health is what the test sets."""

    def __init__(self, *healths: StageHealth) -> None:
        self.healths = list(healths)
        self.killed: list[set[int]] = []

    async def health(self) -> list[StageHealth]:
        return self.healths

    async def inventories(self, versions: Sequence[int]) -> list[Inventory | None]:
        return [None for _ in versions]

    async def rejoin(self, links: EngineLinks, kill: Collection[int]) -> Link:
        self.killed.append(set(kill))
        return FakeLink()

    async def close(self) -> None:
        return None


class FakeLink:
    """Takes every step, or is lost."""

    peer = "stage 0"

    def __init__(self, lost: LinkError | None = None) -> None:
        self.lost = lost

    async def send(self, message: LinkMessage) -> None:
        if self.lost is not None:
            raise self.lost

    def send_from_thread(self, message: LinkMessage, payload: memoryview, sent: Callable[[], None]) -> None:
        raise AssertionError("the engine sends from its loop")

    def post(self, message: LinkMessage) -> None:
        raise AssertionError("the engine has no failures to tell")

    def close(self) -> None:
        return None


def fake_pipeline(*healths: StageHealth, step_timeout_s: float = SECONDS, lost: LinkError | None = None) -> Pipeline:
    pipeline = Pipeline(3, step_timeout_s)
    pipeline.attach(FakeStages(*healths), FakeLink(lost))
    return pipeline


def arrival(message: StepResult | StageFailure) -> Arrival:
    return Arrival(message, memoryview(b""), lambda: None)


async def test_a_result_that_nobody_asked_for_fails_the_pipeline() -> None:
    pipeline = fake_pipeline(health(0, "ready"))
    await pipeline.submit(step(pipeline, 1))
    pipeline.engine_links().upstream.arrived(arrival(StepResult(epoch=3, step_id=1, tokens=[5])))
    pipeline.engine_links().upstream.arrived(arrival(StepResult(epoch=3, step_id=1, tokens=[6])))
    assert (await receive(pipeline)).tokens == [5]
    with pytest.raises(PipelineError, match="step 1, which is not outstanding"):
        await receive(pipeline)
    await pipeline.close()


async def test_a_lost_first_link_fails_submit_and_receive_alike() -> None:
    lost = LinkError("lost the link to stage 0: reset", "lost")
    pipeline = fake_pipeline(health(0, "dead", "its process died"), lost=lost)
    receiving = asyncio.ensure_future(receive(pipeline))
    with pytest.raises(PipelineError, match=r"Stage 0 on host-a failed between steps: its process died"):
        await pipeline.submit(step(pipeline, 1))
    with pytest.raises(PipelineError, match="Stage 0 on host-a"):
        await receiving
    await pipeline.close()


@on_skipping_loop
async def test_the_deadline_counts_from_the_oldest_step() -> None:
    pipeline = fake_pipeline(health(0, "running", seconds=0.2), step_timeout_s=0.2)
    await pipeline.submit(step(pipeline, 1))
    skip_time(0.1)
    await pipeline.submit(step(pipeline, 2))
    pipeline.engine_links().upstream.arrived(arrival(StepResult(epoch=3, step_id=1, tokens=[5])))
    assert (await receive(pipeline)).step_id == 1
    skip_time(0.15)
    await asyncio.sleep(0)
    assert (await pipeline.health())[0].state == "running"
    await pipeline.submit(step(pipeline, 3))
    skip_time(0.1)
    with pytest.raises(PipelineError, match="at step 2: it did not come out within"):
        await receive(pipeline)
    await pipeline.close()


async def fail_once(pipeline: Pipeline, failure: StageFailure, step_id: int) -> None:
    await pipeline.submit(step(pipeline, step_id))
    pipeline.engine_links().upstream.arrived(arrival(failure))
    with pytest.raises(PipelineError):
        await receive(pipeline)
    await pipeline.recover()


@pytest.mark.parametrize(
    ("healths", "failure", "first", "second"),
    [
        ([health(1, "dead", "its process died"), health(2, "ready")], LOST_LINK, {1}, {1}),
        ([health(1, "ready"), health(2, "failed", "ValueError: x", failure="error")], RAISED, set(), {2}),
        ([health(1, "ready"), health(2, "failed", LOST_LINK.cause, failure="lost_link")], LOST_LINK, set(), {2}),
    ],
)
async def test_a_stage_is_killed_when_it_is_lost_or_failed_twice_in_a_row(
    healths: list[StageHealth], failure: StageFailure, first: set[int], second: set[int]
) -> None:
    stages = FakeStages(*healths)
    pipeline = Pipeline(3, SECONDS)
    pipeline.attach(stages, FakeLink())
    await fail_once(pipeline, failure, 1)
    await fail_once(pipeline, failure, 2)
    assert stages.killed == [first, second]
    await pipeline.submit(step(pipeline, 3))
    pipeline.engine_links().upstream.arrived(arrival(StepResult(epoch=pipeline.epoch, step_id=3, tokens=[5])))
    assert (await receive(pipeline)).step_id == 3
    await fail_once(pipeline, failure, 4)
    assert stages.killed[2] == first
    await pipeline.close()


async def test_what_comes_by_links_of_a_former_epoch_is_dropped() -> None:
    pipeline = fake_pipeline(health(0, "ready"))
    former = pipeline.engine_links()
    await pipeline.submit(step(pipeline, 1))
    pipeline.handle_lost_link(LinkError("lost the link to stage 0: reset", "lost"))
    with pytest.raises(PipelineError):
        await receive(pipeline)
    await pipeline.recover()
    await pipeline.submit(step(pipeline, 2))
    former.upstream.arrived(arrival(StepResult(epoch=3, step_id=2, tokens=[9])))
    former.upstream.lost(LinkError("late", "lost"))
    former.downstream.lost(LinkError("late", "lost"))
    pipeline.engine_links().upstream.arrived(arrival(StepResult(epoch=pipeline.epoch, step_id=2, tokens=[5])))
    assert (await receive(pipeline)).tokens == [5]
    await pipeline.close()


async def test_close_wakes_whoever_waits() -> None:
    pipeline = fake_pipeline()
    receiving = asyncio.ensure_future(receive(pipeline))
    await asyncio.sleep(0)
    await pipeline.close()
    with pytest.raises(PipelineError, match="closed"):
        await receiving


@pytest.mark.slow
async def test_a_ray_that_is_not_up_in_time_is_one_sentence(
    cluster: "Cluster", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray  # noqa: PLC0415 - the fixture has prepared its environment

    attempts: list[object] = []

    def start(_: str, __: Path, resources: object, ___: int, ____: Path | None) -> None:
        attempts.append(resources)
        raise Exception("The current node timed out during startup.")  # noqa: TRY002 - as Ray does

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr("actors.cluster.cluster.OwnNode", start)
    with pytest.raises(ClusterError, match=r"^Ray cannot be started: The current node timed out during startup\.$"):
        await type(cluster).join("local", ROWS, tmp_path)
    assert attempts == [{"galaxy_rows": ROWS}] * 2


@pytest.mark.slow
def test_no_thread_is_left_that_would_spin_without_rays_head(cluster: "Cluster") -> None:
    from ray._private.worker import global_worker  # noqa: PLC0415 - the fixture has prepared its environment

    assert not global_worker.listener_thread.is_alive()  # type: ignore[attr-defined] # set as it connects
