"""The thread that draws tokens beside the one that computes, and sends results on in the order of the steps."""

import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TypeVar

import msgspec
import structlog
from structlog.contextvars import bind_contextvars

from actors.clock import now_ns
from actors.stage.state import StageState
from actors.stage.task import StageTask
from stages.errors import StepError
from stages.pending import OnDevice, PendingResult
from stages.step import StageTiming, Step, StepResult

Result = TypeVar("Result")

AHEAD = 2
"""Steps that are computed and not sampled yet, at most, as each holds its logits: half a megabyte a user of R1."""

WAIT_SECONDS = 600.0
"""How long the compute thread waits for tokens; the engine replaces a stage that takes much less for a step."""

SWITCH_SECONDS = 5e-4
"""How long one of the two threads may keep Python from the other, where 5 ms are usual: a step of chips is as long."""


class ComputedStep(msgspec.Struct, frozen=True):
    """A step whose result waits to be drawn, or to be sent where it needs not be; `timing` is that of its computing."""

    step: Step
    output: PendingResult | StepResult
    timing: StageTiming


SendResult = Callable[[Step, StepResult, StageTiming], None]
"""Sends the result of a step on; the timing is the last stage's own."""

Wake = Callable[[StageTask], None]
"""Has the compute thread run a task when it has nothing to compute."""

ReportError = Callable[[Exception, int], None]
"""Reports that a step of this id has failed, and why."""


def draw_result(pending: PendingResult, timing: StageTiming, on_device: OnDevice) -> tuple[StepResult, StageTiming]:
    """Draws a step's tokens in this thread; the timing then has what that took. Raises what drawing raises."""
    began_cpu_ns = time.thread_time_ns()
    result = pending.draw(on_device)
    took_ns = time.thread_time_ns() - began_cpu_ns
    return result, msgspec.structs.replace(timing, sampled_ns=now_ns(), sampling_cpu_ns=took_ns)


class SamplingThread:
    """Draws the tokens of computed steps, one after the other, once the first of them has started it.

    `put`, `wait_until_idle`, `serve` and `stop` belong to the compute thread. After a failure, and for other epochs,
    steps are dropped.
    """

    def __init__(self, state: StageState, send: SendResult, report: ReportError, wake: Wake) -> None:
        self._state = state
        self._wake = wake
        self._send = send
        self._report = report
        self._jobs: queue.SimpleQueue[ComputedStep | StageTask | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._unfinished = 0
        self._calls: deque[StageTask] = deque()
        self._is_ending = False
        self._thread: threading.Thread | None = None

    @property
    def is_idle(self) -> bool:
        """Whether all that was put has been done."""
        return not self._unfinished

    def put(self, job: ComputedStep | StageTask) -> None:
        """Has the thread draw a step's tokens, or run a task between two steps; waits where AHEAD of them wait.

        Raises StepError as `wait_until_idle` does.
        """
        self._wait(AHEAD - 1)
        with self._changed:
            self._unfinished += 1
        if self._thread is None:
            sys.setswitchinterval(SWITCH_SECONDS)
            self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def wait_until_idle(self) -> None:
        """Waits until the tokens of all former steps are drawn. Raises StepError after WAIT_SECONDS."""
        self._wait(0)

    def serve(self) -> None:
        """Runs what the thread has asked of the device; called by the compute thread between two steps."""
        while self._calls:
            self._calls.popleft().run()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread; a step in progress is waited for no longer than `timeout_s`."""
        with self._changed:
            self._is_ending = True
        self.serve()
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _wait(self, most: int) -> None:
        until = time.monotonic() + WAIT_SECONDS
        while self._unfinished > most:
            with self._changed:
                left = max(until - time.monotonic(), 0.0)
                if not self._changed.wait_for(lambda: self._unfinished <= most or self._calls, left):
                    raise StepError(f"The tokens of the steps before were not drawn within {WAIT_SECONDS:g} s.")
            self.serve()

    def _on_device(self, function: Callable[[], Result]) -> Result:
        """Has the compute thread call a function between two steps, as the device is its own. It is an `OnDevice`."""
        results: list[Result] = []
        call = StageTask(lambda: results.append(function()), Future())
        with self._changed:
            if self._is_ending:
                raise StepError("The stage ended before a token was drawn.")
            self._calls.append(call)
            self._changed.notify_all()
        self._wake(StageTask(self.serve, Future()))
        try:
            call.done.result(WAIT_SECONDS)
        except FutureTimeoutError:
            raise StepError(f"The device was not free within {WAIT_SECONDS:g} s.") from None
        return results[0]

    def _run(self) -> None:
        # Every record that the sampler logs has the stage and the step.
        bind_contextvars(stage=self._state.identity.index)
        while (job := self._jobs.get()) is not None:
            if isinstance(job, StageTask):
                job.run()
            elif self._state.is_working and job.step.epoch == self._state.epoch:
                self._finish(job)
            with self._changed:
                self._unfinished -= 1
                self._changed.notify_all()

    def _finish(self, job: ComputedStep) -> None:
        step, output, timing = job.step, job.output, job.timing
        bind_contextvars(step_id=step.step_id)
        self._state.begin_sampling(step.step_id)
        try:
            if isinstance(output, PendingResult):
                output, timing = draw_result(output, timing, self._on_device)
        except Exception as error:
            structlog.get_logger().exception("sampling failed")
            self._report(error, step.step_id)
        else:
            # A step whose stage has failed meanwhile is not to come out of it.
            if self._state.is_working:
                self._send(step, output, timing)
        finally:
            self._state.end_sampling()
