"""The thread in which a stage computes: it makes the runner, runs steps in order, and sends their output on."""

import queue
import threading
import time
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
from actors.stage.sampling import ComputedStep, SamplingThread
from actors.stage.state import StageState
from actors.stage.task import StageTask
from stages.errors import StepError
from stages.kv.inventory import Inventory
from stages.pending import PendingResult, StageOutput, at_once
from stages.step import SentHidden, StageTiming, Step, StepResult

MakeRunner = Callable[[OnProgress], StageRunner]


ComputeQueue = queue.SimpleQueue[ReceivedStep | StageTask | None]
"""What the compute thread has to do, in order; None ends it."""


SAMPLING_SECONDS = 2.0
"""How long tokens that are being drawn are waited for at the end."""


class ComputeThread:
    """Runs the steps and tasks of a queue, once `load` has started it.

    A step's output is written to the socket by this thread itself, or by the one that draws its tokens; only what the
    socket does not take at once is left to the I/O thread. Steps of other epochs, and those that come after a failure,
    are dropped.
    """

    def __init__(self, state: StageState, links: StageLinks, jobs: ComputeQueue) -> None:
        self._state = state
        self._links = links
        self._jobs = jobs
        self._log = structlog.get_logger().bind(stage=state.identity.index)
        self._sampling = SamplingThread(state, self._send_result, self._report_error, jobs.put)
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
                # What waits for the device is older than what comes now.
                self._sampling.serve()
                if isinstance(job, StageTask):
                    self._run_task(job)
                elif self._state.name == "ready" and job.step.epoch == self._state.epoch:
                    self._compute(runner, job)
                else:
                    job.arrival.release()
        finally:
            self._sampling.stop(SAMPLING_SECONDS)
            runner.close()

    def _run_task(self, task: StageTask) -> None:
        """Runs a task, or leaves it to the sampling thread where that is not done with the steps before."""
        if not task.behind_all or self._sampling.is_idle:
            task.run()
            return
        try:
            self._sampling.put(task)
        except StepError as error:
            task.done.set_exception(error)

    def _compute(self, runner: StageRunner, received: ReceivedStep) -> None:
        step, arrival, state = received.step, received.arrival, self._state
        began_ns, began_cpu_ns = now_ns(), time.thread_time_ns()
        state.begin_step(step.step_id)
        bind_contextvars(step_id=step.step_id)
        sampling_cpu_ns = 0
        try:
            step, output = self._output(runner, step, arrival.payload)
            if isinstance(output, PendingResult) and output.needs_device:
                output, sampling_cpu_ns = self._draw_here(output)
        except Exception as error:
            self._log.exception("step failed", step_id=step.step_id)
            arrival.release()
            self._fail(error, step.step_id)
            return
        timing = StageTiming(
            received_ns=received.received_ns,
            began_ns=began_ns,
            ended_ns=now_ns(),
            cpu_ns=time.thread_time_ns() - began_cpu_ns - sampling_cpu_ns,
            sampling_cpu_ns=sampling_cpu_ns,
        )
        state.end_computing((timing.ended_ns - began_ns) * 1e-9)
        self._pass_on(arrival, step, output, timing)
        state.end_step()

    def _output(self, runner: StageRunner, step: Step, hidden: memoryview) -> tuple[Step, StageOutput]:
        """Returns what the step becomes, and what to send on of it. Raises StepError where that is the wrong thing."""
        if step.mode == "load":
            missed = sorted({*step.missed, *runner.load_blocks(step)})
            if not self._state.identity.is_last:
                return msgspec.structs.replace(step, missed=missed), memoryview(b"")
            return step, StepResult(epoch=step.epoch, step_id=step.step_id, tokens=[], missed=missed)
        output = runner.step(step, hidden)
        if isinstance(output, StepResult | PendingResult) is not self._state.identity.is_last:
            raise StepError(f"The runner returned {type(output).__name__}; only the last stage returns a StepResult.")
        return step, output

    def _draw_here(self, pending: PendingResult) -> tuple[StepResult, int]:
        """Draws the step's tokens once those before are, for what needs the device too; returns what that took."""
        self._sampling.wait_until_idle()
        began_cpu_ns = time.thread_time_ns()
        result = pending.draw(at_once)
        return result, time.thread_time_ns() - began_cpu_ns

    def _pass_on(self, arrival: Arrival, step: Step, output: StageOutput, timing: StageTiming) -> None:
        if not isinstance(output, StepResult | PendingResult):
            self._send_step(arrival, step, output, timing)
            return
        arrival.release()
        if isinstance(output, StepResult) and self._sampling.is_idle:
            self._send_result(step, output, timing)
            return
        try:
            self._sampling.put(ComputedStep(step, output, timing))
        except StepError as error:
            self._report_error(error, step.step_id)

    def _send_step(self, arrival: Arrival, step: Step, output: memoryview | SentHidden, timing: StageTiming) -> None:
        """Sends the step with its hidden states, or what was sent of them by a mesh socket."""
        downstream = self._downstream(step)
        if downstream is None:
            arrival.release()
            return
        sent = output if isinstance(output, SentHidden) else None
        passed_on = msgspec.structs.replace(step, timings=[*step.timings, timing], sent=sent)
        if isinstance(output, SentHidden):
            arrival.release()
            self._send(downstream, passed_on, memoryview(b""), free_nothing)
        else:
            self._send(downstream, passed_on, output, arrival.release)

    def _send_result(self, step: Step, result: StepResult, timing: StageTiming) -> None:
        """Sends what a step has come to; called by the thread that computes or the one that samples."""
        downstream = self._downstream(step)
        if downstream is not None:
            timed = msgspec.structs.replace(result, timings=[*step.timings, timing])
            self._send(downstream, timed, memoryview(b""), free_nothing)

    def _downstream(self, step: Step) -> HostLink | None:
        downstream = self._links.downstream
        if downstream is None:
            self._links.report_failure("error", "a step came before the next stage was joined", step.step_id)
        return downstream

    def _send(
        self, downstream: HostLink, message: Step | StepResult, payload: memoryview, sent: Callable[[], None]
    ) -> None:
        # Before it is sent: the next stage may die of it faster than this thread gets on.
        passed_before, self._state.passed_step = self._state.passed_step, message.step_id
        try:
            downstream.send_from_thread(message, payload, sent)
        except LinkError:
            # The I/O thread gets the event as well, and reports it.
            self._state.passed_step = passed_before
            self._log.warning("step not passed on", step_id=message.step_id)

    def _fail(self, error: Exception, step_id: int) -> None:
        """Reports the failure of a step, behind the results of those before it, or in place of them if they fail."""
        try:
            self._sampling.wait_until_idle()
        except StepError as late:
            error = late
        self._report_error(error, step_id)

    def _report_error(self, error: Exception, step_id: int) -> None:
        self._links.report_failure("error", f"{type(error).__name__}: {error}", step_id)
