"""The thread in which a stage computes: it makes the runner, runs steps in order, and sends their output on."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

import msgspec
import structlog
from structlog.contextvars import bind_contextvars

from actors.clock import now_ns
from actors.errors import LinkError
from actors.sockets.host import HostLink
from actors.sockets.link import Arrival, free_nothing
from actors.stage.links import ReceivedStep, StageLinks
from actors.stage.runner import OnProgress, StageRunner
from actors.stage.state import StageState
from stages.errors import StepError
from stages.kv.inventory import Inventory
from stages.step import SentHidden, StageTiming, Step, StepResult

MakeRunner = Callable[[OnProgress], StageRunner]


class ComputeTask:
    """A function that belongs to the compute thread; `done` ends when it does, with what it raised."""

    def __init__(self, function: Callable[[], None], done: "Future[None]") -> None:
        self._function = function
        self.done = done

    def run(self) -> None:
        """Calls the function; raises nothing."""
        try:
            self._function()
        except Exception as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)


ComputeQueue = queue.SimpleQueue[ReceivedStep | ComputeTask | None]
"""What the compute thread has to do, in order; None ends it."""


class ComputeThread:
    """Runs the steps and tasks of a queue, once `load` has started it.

    A step's output is written to the socket by this thread itself; only what the socket does not take at once is left
    to the I/O thread. Steps of other epochs, and those that come after a failure, are dropped.
    """

    def __init__(self, state: StageState, links: StageLinks, jobs: ComputeQueue) -> None:
        self._state = state
        self._links = links
        self._jobs = jobs
        self._log = structlog.get_logger().bind(stage=state.identity.index)
        self._thread: threading.Thread | None = None
        self._runner: StageRunner | None = None

    @property
    def is_alive(self) -> bool:
        """Whether the thread was started and has not ended."""
        return self._thread is not None and self._thread.is_alive()

    def load(self, make_runner: MakeRunner) -> "Future[None]":
        """Starts the thread, which makes the runner and keeps it; done when steps can be computed."""
        loaded: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(make_runner, loaded), name="compute", daemon=True)
        self._thread.start()
        return loaded

    def inventory(self, version: int) -> Inventory | None:
        """Returns what the stage keeps beside its device, as `StageRunner` does; None before it is loaded."""
        return None if self._runner is None else self._runner.inventory(version)

    def stop(self, timeout_s: float) -> None:
        """Ends the thread; a step in progress is waited for no longer than `timeout_s`."""
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self, make_runner: MakeRunner, loaded: "Future[None]") -> None:
        # Every record that the runner logs has the stage and the step.
        bind_contextvars(stage=self._state.identity.index)
        try:
            runner = make_runner(self._state.note_layers)
        except Exception as error:
            self._log.exception("loading failed")
            self._state.fail("error", str(error))
            loaded.set_exception(error)
            return
        self._runner = runner
        self._state.become("loading", "ready")
        loaded.set_result(None)
        try:
            while (job := self._jobs.get()) is not None:
                if isinstance(job, ComputeTask):
                    job.run()
                elif self._state.name == "ready" and job.step.epoch == self._state.epoch:
                    self._compute(runner, job)
                else:
                    job.arrival.release()
        finally:
            runner.close()

    def _compute(self, runner: StageRunner, received: ReceivedStep) -> None:
        step, arrival, state = received.step, received.arrival, self._state
        began_ns = now_ns()
        state.begin_step(step.step_id)
        bind_contextvars(step_id=step.step_id)
        output: memoryview | SentHidden | StepResult
        try:
            if step.mode == "load":
                step, output = self._load_blocks(runner, step)
            else:
                output = runner.step(step, arrival.payload)
            self._check_output(output)
        except Exception as error:
            self._log.exception("step failed", step_id=step.step_id)
            arrival.release()
            self._links.report_failure("error", f"{type(error).__name__}: {error}")
            return
        timing = StageTiming(received_ns=received.received_ns, began_ns=began_ns, ended_ns=now_ns())
        state.end_computing((timing.ended_ns - began_ns) * 1e-9)
        self._send_on(arrival, step, output, [*step.timings, timing])
        state.end_step()

    def _load_blocks(self, runner: StageRunner, step: Step) -> tuple[Step, memoryview | StepResult]:
        """Returns the step with what is missing in this stage too, and what to send on of it."""
        missed = sorted({*step.missed, *runner.load_blocks(step)})
        if self._state.identity.is_last:
            return step, StepResult(epoch=step.epoch, step_id=step.step_id, tokens=[], missed=missed)
        return msgspec.structs.replace(step, missed=missed), memoryview(b"")

    def _check_output(self, output: memoryview | SentHidden | StepResult) -> None:
        if isinstance(output, StepResult) is not self._state.identity.is_last:
            raise StepError(f"The runner returned {type(output).__name__}; only the last stage returns a StepResult.")

    def _send_on(
        self, arrival: Arrival, step: Step, output: memoryview | SentHidden | StepResult, timings: list[StageTiming]
    ) -> None:
        downstream = self._links.downstream
        if downstream is None:
            arrival.release()
            self._links.report_failure("error", "a step came before the next stage was joined")
            return
        # Before it is sent: the next stage may die of it faster than this thread gets on.
        passed_before, self._state.passed_step = self._state.passed_step, step.step_id
        try:
            _send(downstream, arrival, step, output, timings)
        except LinkError:
            # The I/O thread gets the event as well, and reports it.
            self._state.passed_step = passed_before
            self._log.warning("step not passed on", step_id=step.step_id)


def _send(
    downstream: HostLink,
    arrival: Arrival,
    step: Step,
    output: memoryview | SentHidden | StepResult,
    timings: list[StageTiming],
) -> None:
    """Sends a result, or the step with its hidden states or what was sent of them by a mesh socket."""
    if isinstance(output, StepResult):
        arrival.release()
        result = msgspec.structs.replace(output, timings=timings)
        downstream.send_from_thread(result, memoryview(b""), free_nothing)
    elif isinstance(output, SentHidden):
        arrival.release()
        passed_on = msgspec.structs.replace(step, timings=timings, sent=output)
        downstream.send_from_thread(passed_on, memoryview(b""), free_nothing)
    else:
        passed_on = msgspec.structs.replace(step, timings=timings, sent=None)
        downstream.send_from_thread(passed_on, output, arrival.release)
