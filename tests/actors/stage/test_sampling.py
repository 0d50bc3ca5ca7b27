"""The thread beside the compute thread of a last stage: order, errors, waits, and what ends with it."""

import asyncio
import tempfile
import threading
from collections.abc import Iterator

import msgspec
import pytest
import structlog
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from actors.stage import sampling
from actors.stage.runner import WithoutBlocks
from actors.stage.sampling import AHEAD
from stages.errors import StepError
from stages.pending import OnDevice, PendingResult, StageOutput
from stages.step import StageFailure, Step, StepResult
from tests.support.loops import on_uvloop
from tests.support.stage_bench import IDENTITY, SECONDS, Bench, bench, join, reset, step, untimed

LAST = msgspec.structs.replace(IDENTITY, index=2)
AGAIN = msgspec.structs.replace(LAST, epoch=5, secret=b"another")


class Gated(WithoutBlocks):
    """A last stage that draws a step's tokens when its gate is opened.

    A step of two tokens needs the device, one of three is drawn already, and one of four fails while it is computed.
    """

    def __init__(self) -> None:
        self._gates: dict[int, threading.Event] = {}
        self._changing = threading.Lock()
        self.computed: list[int] = []
        self.drawn: list[tuple[int, str]] = []
        self.failing: set[int] = set()
        self.asking: set[int] = set()
        self.asked: list[str] = []
        self.is_closed = False

    def gate(self, step_id: int) -> threading.Event:
        with self._changing:
            return self._gates.setdefault(step_id, threading.Event())

    def open_all(self) -> None:
        for step_id in range(100):
            self.gate(step_id).set()

    def step(self, step: Step, hidden: memoryview) -> StageOutput:
        self.computed.append(step.step_id)
        if step.token_count == 4:
            raise ZeroDivisionError("one by nought")
        if step.token_count == 3:
            return result(step.step_id, step.epoch)
        return PendingResult(lambda on_device: self._draw(step, on_device), needs_device=step.token_count == 2)

    def _draw(self, step: Step, on_device: OnDevice) -> StepResult:
        structlog.get_logger().info("drawing")
        self.drawn.append((step.step_id, threading.current_thread().name))
        assert self.gate(step.step_id).wait(SECONDS)
        if step.step_id in self.asking:
            self.asked.append(on_device(lambda: threading.current_thread().name))
        if step.step_id in self.failing:
            raise StepError("its position is another")
        return result(step.step_id, step.epoch)

    def close(self) -> None:
        self.is_closed = True


def result(step_id: int, epoch: int = 4) -> StepResult:
    return StepResult(epoch=epoch, step_id=step_id, tokens=[step_id])


@pytest.fixture
def gated() -> Iterator[Gated]:
    runner = Gated()
    yield runner
    runner.open_all()


async def comes(around: Bench, step_id: int, epoch: int = 4) -> None:
    assert untimed((await around.downstream_ear.next()).message) == result(step_id, epoch)


async def computes(around: Bench, steps: int) -> None:
    await around.health_when(lambda health: health.steps_done == steps)


@on_uvloop
async def test_steps_are_computed_while_tokens_are_drawn_and_leave_in_order(gated: Gated) -> None:
    async with bench(LAST, gated) as around:
        for step_id in range(AHEAD):
            await around.send(step_id)
        await computes(around, AHEAD)
        assert around.downstream_ear.arrivals.empty()
        for step_id in range(AHEAD, AHEAD + 3):
            await around.send(step_id)
        for step_id in range(AHEAD + 3):
            gated.gate(step_id).set()
            await comes(around, step_id)
        assert gated.drawn == [(step_id, "sampling") for step_id in range(AHEAD + 3)]


@on_uvloop
async def test_no_more_steps_wait_for_their_tokens_than_memory_is_meant_for(gated: Gated) -> None:
    async with bench(LAST, gated) as around:
        for step_id in range(AHEAD + 3):
            await around.send(step_id)
        await around.health_when(lambda health: health.steps_done == AHEAD + 1)
        assert gated.computed == list(range(AHEAD + 1))
        gated.gate(0).set()
        await comes(around, 0)
        await computes(around, AHEAD + 2)
        assert gated.computed == list(range(AHEAD + 2))


@on_uvloop
async def test_a_result_that_is_there_already_waits_for_those_before(gated: Gated) -> None:
    async with bench(LAST, gated) as around:
        await around.send(1)
        await around.send(2, tokens=3)
        await computes(around, 2)
        assert around.downstream_ear.arrivals.empty()
        gated.gate(1).set()
        for step_id in (1, 2):
            await comes(around, step_id)


@on_uvloop
async def test_a_step_that_needs_the_device_too_is_drawn_by_the_thread_that_has_it(gated: Gated) -> None:
    async with bench(LAST, gated) as around:
        await around.send(1)
        await around.send(2, tokens=2)
        await around.send(3)
        await around.health_when(lambda _: gated.computed == [1, 2])
        assert [step_id for step_id, _ in gated.drawn] == [1]
        gated.gate(1).set()
        await comes(around, 1)
        await around.health_when(lambda _: len(gated.drawn) == 2)
        assert gated.computed == [1, 2]
        gated.open_all()
        for step_id in (2, 3):
            await comes(around, step_id)
        assert gated.drawn == [(1, "sampling"), (2, "compute"), (3, "sampling")]


@on_uvloop
async def test_a_load_waits_for_the_tokens_before(gated: Gated) -> None:
    load = msgspec.structs.replace(step(2), mode="load", segments=[])
    async with bench(LAST, gated) as around:
        await around.send(1)
        await asyncio.to_thread(around.upstream.send_from_thread, load, memoryview(b""), lambda: None)
        await computes(around, 2)
        gated.gate(1).set()
        await comes(around, 1)
        message = untimed((await around.downstream_ear.next()).message)
        assert message == StepResult(epoch=4, step_id=2, tokens=[], missed=[])


@on_uvloop
async def test_an_error_of_the_sampler_is_the_error_of_its_step(gated: Gated) -> None:
    gated.failing.add(1)
    async with bench(LAST, gated) as around:
        for step_id in (1, 2):
            await around.send(step_id)
        await computes(around, 2)
        gated.open_all()
        assert await around.failure() == StageFailure(
            epoch=4, stage=2, host="host-a", step_id=1, kind="error", cause="StepError: its position is another"
        )
        await around.send(3)
        assert around.server.health().state == "failed"
        assert [step_id for step_id, _ in gated.drawn] == [1]


@on_uvloop
async def test_an_error_while_a_step_is_computed_comes_behind_the_results_before_it(gated: Gated) -> None:
    async with bench(LAST, gated) as around:
        await around.send(1)
        await around.send(2, tokens=4)
        await around.send(3)
        await around.health_when(lambda _: gated.computed == [1, 2])
        gated.open_all()
        await comes(around, 1)
        failure = await around.failure()
        assert (failure.step_id, failure.cause) == (2, "ZeroDivisionError: one by nought")
        assert gated.computed == [1, 2]


@on_uvloop
async def test_what_a_draw_asks_of_the_device_is_done_between_steps(gated: Gated) -> None:
    gated.asking = {1, 2, 3, 4, 5}
    async with bench(LAST, gated) as around:
        await around.send(1)
        await computes(around, 1)
        gated.gate(1).set()
        await comes(around, 1)
        # The compute thread waits for tokens to be drawn: first for room, then for a step that needs the device.
        for step_id, tokens in ((2, 1), (3, 1), (4, 1), (5, 2)):
            await around.send(step_id, tokens)
        await around.health_when(lambda _: len(gated.computed) == 4)
        gated.open_all()
        for step_id in (2, 3, 4, 5):
            await comes(around, step_id)
    assert gated.asked == ["compute"] * 5


@on_uvloop
async def test_what_a_draw_asks_of_the_device_may_fail(gated: Gated) -> None:
    class Failing(Gated):
        def _draw(self, step: Step, on_device: OnDevice) -> StepResult:
            return on_device(lambda: result(1 // 0))

    async with bench(LAST, Failing()) as around:
        await around.send(1)
        failure = await around.failure()
        assert (failure.step_id, failure.cause) == (1, "ZeroDivisionError: integer division or modulo by zero")


@on_uvloop
async def test_nothing_is_asked_of_a_device_that_is_closed(gated: Gated) -> None:
    gated.asking = {1}
    async with bench(LAST, gated) as around:
        await around.send(1)
        await around.health_when(lambda health: bool(gated.drawn) and health.steps_done == 1)
        closing = asyncio.ensure_future(asyncio.to_thread(around.server.close))
        await around.health_when(lambda health: health.state == "closed")
        gated.gate(1).set()
        await closing
        assert gated.is_closed
        assert not {"compute", "sampling"} & {thread.name for thread in threading.enumerate()}


@on_uvloop
async def test_health_names_the_step_whose_tokens_are_drawn(gated: Gated) -> None:
    async with bench(LAST, gated) as around:
        await around.send(7)
        drawing = await around.health_when(lambda health: bool(gated.drawn) and health.steps_done == 1)
        assert (drawing.state, drawing.step_id, drawing.passed_step) == ("running", 7, None)
        gated.gate(7).set()
        done = await around.health_when(lambda health: health.state == "ready")
        assert (done.step_id, done.passed_step) == (None, 7)


@on_uvloop
async def test_a_loss_while_tokens_are_drawn_names_their_step(gated: Gated) -> None:
    async with bench(LAST, gated) as around:
        await around.send(7)
        await around.health_when(lambda health: bool(gated.drawn) and health.steps_done == 1)
        around.upstream.close()
        failure = await around.failure()
        assert (failure.kind, failure.step_id) == ("lost_link", 7)
        gated.open_all()
        await around.health_when(lambda health: health.step_id is None)
        assert around.downstream_ear.arrivals.empty()


@on_uvloop
async def test_a_stage_is_joined_anew_when_nothing_is_drawn_any_more(gated: Gated) -> None:
    with tempfile.TemporaryDirectory(prefix="again-") as parent:
        async with bench(LAST, gated) as around:
            for step_id in (1, 2):
                await around.send(step_id)
            await computes(around, 2)
            resetting = asyncio.ensure_future(reset(around.server, AGAIN))
            assert "closed the connection" in await around.upstream_ear.cause()
            assert not resetting.done()
            gated.gate(1).set()
            await resetting
            assert [step_id for step_id, _ in gated.drawn] == [1]
            gated.open_all()
            again = await join(around, AGAIN, parent)
            for step_id in (10, 11):
                await again.send(step_id, epoch=5)
                await comes(again, step_id, epoch=5)
            again.upstream.close()
            again.downstream.close()


@on_uvloop
async def test_a_step_has_the_times_of_both_threads(gated: Gated) -> None:
    gated.open_all()
    async with bench(LAST, gated) as around:
        for step_id, tokens in ((1, 1), (2, 2), (3, 3)):
            await around.send(step_id, tokens)
        beside, inside, plain = [(await around.downstream_ear.next()).message for _ in range(3)]
        for message in (beside, inside, plain):
            assert isinstance(message, StepResult)
            assert message.timings[0].cpu_ns > 0
        assert isinstance(beside, StepResult)
        assert beside.timings[0].left_ns == beside.timings[0].sampled_ns >= beside.timings[0].ended_ns
        assert beside.timings[0].sampling_cpu_ns > 0
        assert isinstance(inside, StepResult)
        assert inside.timings[0].sampled_ns == 0 < inside.timings[0].sampling_cpu_ns
        assert isinstance(plain, StepResult)
        assert plain.timings[0].sampled_ns == plain.timings[0].sampling_cpu_ns == 0


@on_uvloop
async def test_what_the_sampler_logs_names_stage_and_step(gated: Gated) -> None:
    gated.open_all()
    with capture_logs(processors=[merge_contextvars]) as logs:
        async with bench(LAST, gated) as around:
            for step_id in (5, 6):
                await around.send(step_id)
                await comes(around, step_id)
    assert [(log["stage"], log["step_id"]) for log in logs if log["event"] == "drawing"] == [(2, 5), (2, 6)]


@on_uvloop
async def test_tokens_that_never_come_are_an_error(gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "WAIT_SECONDS", 0.01)
    async with bench(LAST, gated) as around:
        await around.send(1)
        await around.send(2, tokens=2)
        failure = await around.failure()
        assert failure.step_id == 2
        assert "were not drawn within 0.01 s" in failure.cause
        gated.open_all()


@on_uvloop
async def test_close_ends_the_thread_before_the_runner(gated: Gated) -> None:
    gated.open_all()
    async with bench(LAST, gated) as around:
        await around.send(1)
        await comes(around, 1)
        await asyncio.to_thread(around.server.close)
        assert gated.is_closed
        assert "sampling" not in {thread.name for thread in threading.enumerate()}
