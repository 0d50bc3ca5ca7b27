"""A stage server between two links of the test: results, failures and health."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import msgspec
import psutil
import pytest
import structlog
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from actors.sockets.listener import CREDITS
from actors.stage.runner import StageRunner
from actors.stage.server import StageServer
from actors.stage.setup import ENGINE
from actors.stage.state import FAILED_BETWEEN_STEPS
from stages.step import StageFailure, StageTiming, Step, StepResult
from tests.support.loops import on_uvloop
from tests.support.runners import BYTES_PER_TOKEN, EchoRunner
from tests.support.stage_bench import IDENTITY, SECONDS, Raising, Waiting, bench, spec, step, untimed

LAST = msgspec.structs.replace(IDENTITY, index=2)


class Confused(EchoRunner):
    """Gives a result where hidden states belong."""

    def step(self, step: Step, hidden: memoryview) -> memoryview | StepResult:
        return StepResult(epoch=step.epoch, step_id=step.step_id, tokens=[])


class InPlace(EchoRunner):
    """Sends on what it received, changed in place."""

    def step(self, step: Step, hidden: memoryview) -> memoryview | StepResult:
        hidden[:] = bytes(reversed(hidden))
        return hidden


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    runner = Waiting(spec(IDENTITY))
    yield runner
    runner.go_on.set()


@on_uvloop
async def test_hidden_states_pass_through_in_order() -> None:
    async with bench(IDENTITY, EchoRunner(spec(IDENTITY))) as around:
        for step_id in range(3 * CREDITS):
            await around.send(step_id, tokens=1 + step_id % 5, fill=step_id)
            arrival = await around.downstream_ear.next()
            assert untimed(arrival.message) == step(step_id, 1 + step_id % 5)
            assert set(arrival.payload) == {step_id + 1}
            arrival.release()
        assert around.server.health().steps_done == 3 * CREDITS


@on_uvloop
async def test_a_runner_may_send_on_the_memory_it_was_given() -> None:
    async with bench(IDENTITY, InPlace(spec(IDENTITY))) as around:
        tokens = 20_000  # More than any socket buffers, so that sending goes on after the step.
        for step_id in range(4):
            await around.send(step_id, tokens, fill=step_id)
        for step_id in range(4):
            arrival = await around.downstream_ear.next()
            assert arrival.payload == bytes([step_id]) * (tokens * BYTES_PER_TOKEN)
            arrival.release()


@on_uvloop
async def test_the_last_stage_gives_results() -> None:
    async with bench(LAST, EchoRunner(spec(LAST))) as around:
        await around.send(5, tokens=3, fill=41)
        assert untimed((await around.downstream_ear.next()).message) == StepResult(epoch=4, step_id=5, tokens=[42])
        assert around.downstream.peer == "stage 2"
        assert LAST.downstream_terms().peer == ENGINE


@on_uvloop
async def test_every_stage_adds_its_own_timing() -> None:
    earlier = StageTiming(received_ns=1, began_ns=2, ended_ns=3)
    async with bench(IDENTITY, EchoRunner(spec(IDENTITY))) as around:
        timed = msgspec.structs.replace(step(1), timings=[earlier])
        await asyncio.to_thread(
            around.upstream.send_from_thread, timed, memoryview(bytes(BYTES_PER_TOKEN)), lambda: None
        )
        message = (await around.downstream_ear.next()).message
        assert isinstance(message, Step)
        assert message.timings[0] == earlier
        assert len(message.timings) == 2


@on_uvloop
async def test_a_runner_that_raises_is_told_downstream_and_takes_no_further_step() -> None:
    async with bench(IDENTITY, Raising(spec(IDENTITY))) as around:
        for step_id in (1, 2, 3):
            await around.send(step_id)
        assert untimed((await around.downstream_ear.next()).message) == step(1)
        assert await around.failure() == StageFailure(
            epoch=4, stage=1, host="host-a", step_id=2, kind="error", cause="ZeroDivisionError: one by nought"
        )
        for step_id in range(4, 4 + 2 * CREDITS):
            await around.send(step_id)  # Dropped, and their credits given back.
        health = await around.health_when(lambda health: health.state == "failed")
        assert (health.steps_done, health.detail) == (1, "ZeroDivisionError: one by nought")
        assert around.downstream_ear.arrivals.empty()


@on_uvloop
async def test_what_a_runner_logs_names_stage_and_step() -> None:
    class Logging(EchoRunner):
        def step(self, step: Step, hidden: memoryview) -> memoryview | StepResult:
            structlog.get_logger().info("computing")
            return super().step(step, hidden)

    with capture_logs(processors=[merge_contextvars]) as logs:
        async with bench(IDENTITY, Logging(spec(IDENTITY))) as around:
            for step_id in (5, 6):
                await around.send(step_id)
                (await around.downstream_ear.next()).release()
    said = [(log["stage"], log["step_id"]) for log in logs if log["event"] == "computing"]
    assert said == [(1, 5), (1, 6)]


@on_uvloop
async def test_a_runner_that_returns_the_wrong_thing_is_a_failure() -> None:
    async with bench(IDENTITY, Confused(spec(IDENTITY))) as around:
        await around.send(1)
        assert "only the last stage returns a StepResult" in (await around.failure()).cause


async def test_health_is_answered_during_a_step(waiting: Waiting) -> None:
    async with bench(IDENTITY, waiting) as around:
        assert around.server.health().state == "ready"
        await around.send(8)
        assert await asyncio.to_thread(waiting.began.wait, SECONDS)
        before, after = around.server.health(), around.server.health()
        assert (before.state, before.step_id, before.steps_done) == ("running", 8, 0)
        assert before.resident_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
        assert 0 < before.step_seconds <= after.step_seconds
        waiting.go_on.set()
        done = await around.health_when(lambda health: health.state == "ready")
        assert (done.step_id, done.steps_done) == (None, 1)
        assert done.busy_seconds >= before.step_seconds
        assert done.received_bytes == before.received_bytes > BYTES_PER_TOKEN
        assert done.sent_bytes > before.sent_bytes > 0
        assert done.sent_to.startswith("/")


@on_uvloop
async def test_a_stage_whose_neighbour_takes_nothing_is_blocked_not_busy() -> None:
    async with bench(IDENTITY, EchoRunner(spec(IDENTITY))) as around:
        for step_id in range(CREDITS + 1):
            await around.send(step_id)
        health = await around.health_when(lambda health: health.state == "blocked" and health.steps_done > CREDITS)
        assert (health.step_id, health.steps_done) == (CREDITS, CREDITS + 1)
        for _ in range(CREDITS):
            (await around.downstream_ear.next()).release()
        assert untimed((await around.downstream_ear.next()).message) == step(CREDITS)


async def test_a_lost_upstream_is_told_downstream(waiting: Waiting) -> None:
    async with bench(IDENTITY, waiting) as around:
        await around.send(3)
        assert await asyncio.to_thread(waiting.began.wait, SECONDS)
        around.upstream.close()
        failure = await around.failure()
        assert (failure.stage, failure.step_id) == (1, 3)
        assert (failure.kind, failure.cause) == ("lost_link", "lost the link from stage 0: it closed the connection")
        waiting.go_on.set()


@on_uvloop
async def test_between_steps_a_loss_names_no_step() -> None:
    async with bench(IDENTITY, EchoRunner(spec(IDENTITY))) as around:
        around.upstream.close()
        assert (await around.failure()).step_id == FAILED_BETWEEN_STEPS


@on_uvloop
async def test_a_lost_downstream_closes_the_upstream() -> None:
    async with bench(IDENTITY, EchoRunner(spec(IDENTITY))) as around:
        around.downstream.close()
        assert await around.upstream_ear.cause() == "lost the link to stage 1: it closed the connection"
        health = around.server.health()
        assert (health.failure, health.detail) == ("lost_link", "lost the link to stage 2: it closed the connection")


async def test_a_failure_from_upstream_overtakes_a_step_in_progress(waiting: Waiting) -> None:
    async with bench(IDENTITY, waiting) as around:
        await around.send(3)
        assert await asyncio.to_thread(waiting.began.wait, SECONDS)
        failure = StageFailure(epoch=4, stage=0, host="host-b", step_id=4, kind="error", cause="broken")
        around.upstream.post(failure)
        assert await around.failure() == failure
        waiting.go_on.set()


@on_uvloop
async def test_steps_of_another_epoch_are_dropped() -> None:
    async with bench(IDENTITY, EchoRunner(spec(IDENTITY))) as around:
        for step_id in range(2 * CREDITS):
            await around.send(step_id, epoch=3)
        await around.send(77)
        assert untimed((await around.downstream_ear.next()).message) == step(77)
        assert around.server.health().steps_done == 1


async def test_loading_reports_progress_and_what_went_wrong() -> None:
    server = StageServer(IDENTITY)
    reported, go_on = threading.Event(), threading.Event()

    def make(on_progress: Callable[[int, int], None]) -> StageRunner:
        on_progress(2, 5)
        reported.set()
        go_on.wait(SECONDS)
        raise OSError("disk on fire")

    loading = asyncio.wrap_future(server.load(make))
    assert await asyncio.to_thread(reported.wait, SECONDS)
    assert (server.health().state, server.health().layers_done, server.health().layers) == ("loading", 2, 5)
    go_on.set()
    with pytest.raises(OSError, match="disk on fire"):
        await loading
    assert (server.health().state, server.health().detail) == ("failed", "disk on fire")
    await asyncio.to_thread(server.close)


async def test_close_ends_the_threads_and_the_runner() -> None:
    closed = threading.Event()

    class Closing(EchoRunner):
        def close(self) -> None:
            closed.set()

    async with bench(IDENTITY, Closing(spec(IDENTITY))) as around:
        await asyncio.to_thread(around.server.close)
        assert closed.is_set()
        names = {thread.name for thread in threading.enumerate()}
        assert not {"compute", "stage 1 I/O"} & names
        assert around.server.health().state == "closed"
