"""A stage at work: one thread that moves bytes, one that computes, and answers about both at any time."""

import asyncio
import os
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
from actors.sockets.link import Arrival
from actors.sockets.listener import Address, HostListener, connect
from actors.stage.health import StageHealth, State, resident_bytes
from actors.stage.identity import StageIdentity, stage_name
from actors.stage.io_thread import IoThread
from actors.stage.runner import OnProgress, StageRunner
from stages.errors import StepError
from stages.mesh_spec import MeshSocketSpec
from stages.step import SentHidden, StageFailure, StageTiming, Step, StepResult


class ComputeTask:
    """A function that belongs to that thread; `done` has its end, or what it raised."""

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


FAILED_BETWEEN_STEPS = -1

CLOSE_SECONDS = 2.0


class StageServer:
    """Runs one stage between its two links. Its methods may be called from any thread; none of them computes.

    Steps pass from the I/O thread to the compute thread by a queue; what a step yields is written to the socket by
    the compute thread itself, and only what the socket does not take at once is left to the I/O thread. After a first
    failure, which is told downstream, where the engine is, later steps are dropped until the stage is `reset`.
    """

    def __init__(self, identity: StageIdentity) -> None:
        self._identity = identity
        self._log = structlog.get_logger().bind(stage=identity.index)
        self._io = IoThread(stage_name(identity.index))
        self._arrivals: queue.SimpleQueue[tuple[Arrival, int] | ComputeTask | None] = queue.SimpleQueue()
        self._compute: threading.Thread | None = None
        # Another one each time the stage leaves its links: what was being joined then comes too late.
        self._joining = object()
        self._listener: HostListener | None = None
        self._downstream: HostLink | None = None
        self._downstream_address = ""
        self._upstream: HostLink | None = None
        self._state: State = "loading"
        self._failing = threading.Lock()
        self._detail = ""
        self._current: tuple[int, float] | None = None
        self._received_step: int | None = None
        self._passed_step: int | None = None
        self._steps_done = 0
        self._busy_seconds = 0.0
        self._progress = (0, 0)

    @property
    def epoch(self) -> int:
        """Of the pipeline that the stage is, or is being, joined to."""
        return self._identity.epoch

    def load(self, make_runner: Callable[[OnProgress], StageRunner]) -> "Future[None]":
        """Starts the compute thread, which makes the runner and keeps it; done when steps can be computed."""
        loaded: Future[None] = Future()
        compute = threading.Thread(target=self._compute_steps, args=(make_runner, loaded), name="compute", daemon=True)
        compute.start()
        self._compute = compute
        return loaded

    def call(self, function: Callable[[], None]) -> "Future[None]":
        """Has the compute thread call a function between two steps: what touches a device belongs to that thread."""
        task = ComputeTask(function, Future())
        self._arrivals.put(task)
        return task.done

    def listen(self, address: Address, mesh: MeshSocketSpec | None = None) -> "Future[Address]":
        """Opens the address for the stage before this one, or the engine; gives the address it was bound to.

        `mesh` is the socket by which hidden states come from mesh to mesh, if they do not come with the steps.
        """
        return self._io.run(self._listen(address, mesh))

    def connect(self, address: Address, mesh: MeshSocketSpec | None = None) -> "Future[None]":
        """Joins the next stage, or the engine. Ends in LinkError or ProtocolError if that fails."""
        return self._io.run(self._connect(address, mesh))

    def reset(self, identity: StageIdentity) -> "Future[None]":
        """Leaves both links and drops every step that came by them; then the stage can be joined anew, as `identity`.

        Done when the compute thread is free. Ends in LinkError if the stage was closed, or never had its weights.
        """
        freed: Future[None] = Future()
        with self._failing:
            if self._state in {"loading", "closed"} or self._compute is None or not self._compute.is_alive():
                freed.set_exception(LinkError("The stage is not there to be joined anew."))
                return freed
            self._state = "failed"
            self._detail = "it is to be joined anew"
        self._io.run(self._leave(ComputeTask(lambda: self._begin_anew(identity), freed)))
        return freed

    def health(self) -> StageHealth:
        """What the stage is doing at this moment."""
        current, upstream, downstream = self._current, self._upstream, self._downstream
        return StageHealth(
            stage=self._identity.index,
            host=self._identity.host,
            pid=os.getpid(),
            state=self._state,
            step_id=None if current is None else current[0],
            step_seconds=0.0 if current is None else time.monotonic() - current[1],
            received_step=self._received_step,
            steps_done=self._steps_done,
            busy_seconds=self._busy_seconds,
            layers_done=self._progress[0],
            layers=self._progress[1],
            resident_bytes=resident_bytes(),
            detail=self._detail,
            received_bytes=0 if upstream is None else upstream.received_bytes,
            sent_bytes=0 if downstream is None else downstream.sent_bytes,
            sent_to=self._downstream_address,
            passed_step=self._passed_step,
        )

    def close(self) -> None:
        """Ends links and threads; a step in progress is waited for only for a moment."""
        with self._failing:
            if self._state == "closed":
                return
            self._state = "closed"
        self._io.run(self._close_links()).result(CLOSE_SECONDS)
        self._arrivals.put(None)
        if self._compute is not None:
            self._compute.join(CLOSE_SECONDS)
        self._io.stop()

    # The compute thread

    def _compute_steps(self, make_runner: Callable[[OnProgress], StageRunner], loaded: "Future[None]") -> None:
        # Whatever the runner logs says of which stage, and of which step, it is.
        bind_contextvars(stage=self._identity.index)
        try:
            runner = make_runner(self._note_progress)
        except Exception as error:
            self._log.exception("loading failed")
            self._state = "failed"
            self._detail = str(error)
            loaded.set_exception(error)
            return
        self._state = "ready"
        loaded.set_result(None)
        try:
            while (queued := self._arrivals.get()) is not None:
                if isinstance(queued, ComputeTask):
                    queued.run()
                    continue
                arrival, received_ns = queued
                step = arrival.message
                if self._state == "ready" and isinstance(step, Step) and step.epoch == self._identity.epoch:
                    self._run(runner, arrival, step, received_ns)
                else:
                    arrival.release()
        finally:
            runner.close()

    def _run(self, runner: StageRunner, arrival: Arrival, step: Step, received_ns: int) -> None:
        began_ns = now_ns()
        self._current = (step.step_id, time.monotonic())
        self._turn("ready", "running")
        bind_contextvars(step_id=step.step_id)
        try:
            output = runner.step(step, arrival.payload)
            self._check_output(output)
        except Exception as error:
            self._log.exception("step failed", step_id=step.step_id)
            arrival.release()
            self._fail(step.step_id, f"{type(error).__name__}: {error}")
            return
        timing = StageTiming(received_ns=received_ns, began_ns=began_ns, ended_ns=now_ns())
        self._busy_seconds += (timing.ended_ns - began_ns) * 1e-9
        self._steps_done += 1
        self._turn("running", "blocked")
        self._send_on(arrival, step, output, [*step.timings, timing])
        self._current = None
        self._turn("blocked", "ready")

    def _check_output(self, output: memoryview | SentHidden | StepResult) -> None:
        if isinstance(output, StepResult) is not self._identity.is_last:
            raise StepError(f"The runner returned {type(output).__name__}; only the last stage returns a StepResult.")

    def _send_on(
        self, arrival: Arrival, step: Step, output: memoryview | SentHidden | StepResult, timings: list[StageTiming]
    ) -> None:
        downstream = self._downstream
        if downstream is None:
            arrival.release()
            self._fail(step.step_id, "a step came before the next stage was joined")
            return
        # Before it is sent: the next stage may die of it faster than this thread gets on.
        passed_before, self._passed_step = self._passed_step, step.step_id
        try:
            if isinstance(output, StepResult):
                arrival.release()
                result = msgspec.structs.replace(output, timings=timings)
                downstream.send_from_thread(result, memoryview(b""), _nothing)
            elif isinstance(output, SentHidden):
                arrival.release()
                passed_on = msgspec.structs.replace(step, timings=timings, sent=output)
                downstream.send_from_thread(passed_on, memoryview(b""), _nothing)
            else:
                passed_on = msgspec.structs.replace(step, timings=timings, sent=None)
                downstream.send_from_thread(passed_on, output, arrival.release)
        except LinkError:
            # The loop was told of it as well, and tells the engine (`_Downstream.lost`).
            self._passed_step = passed_before
            self._log.warning("step not passed on", step_id=step.step_id)

    def _begin_anew(self, identity: StageIdentity) -> None:
        with self._failing:
            if self._state != "closed":
                self._state = "ready"
        self._identity = identity
        self._detail = ""
        self._current = None
        self._received_step = None
        self._passed_step = None

    def _note_progress(self, layers_done: int, layers: int) -> None:
        self._progress = (layers_done, layers)

    # The I/O thread

    async def _listen(self, address: Address, mesh: MeshSocketSpec | None) -> Address:
        self._listener = HostListener.open(address, self._identity.upstream_terms(mesh), _Upstream(self))
        self._accepting = asyncio.create_task(self._accept(self._listener))
        return self._listener.address

    async def _accept(self, listener: HostListener) -> None:
        joining = self._joining
        link = await listener.accepted()
        if joining is self._joining:
            self._upstream = link
        else:
            link.close()

    async def _connect(self, address: Address, mesh: MeshSocketSpec | None) -> None:
        joining = self._joining
        link = await connect(address, self._identity.downstream_terms(mesh), _Downstream(self))
        if joining is not self._joining:
            # The stage has left the chain meanwhile, and is or will be joined to another peer.
            link.close()
            raise LinkError("The stage left its links while it was being joined.")
        self._downstream = link
        self._downstream_address = str(address)

    async def _leave(self, then: ComputeTask) -> None:
        await self._close_links()
        self._listener = self._upstream = self._downstream = None
        # After the links: what came by them lies before this in the queue, and is dropped.
        self._arrivals.put(then)

    async def _close_links(self) -> None:
        self._joining = object()
        if self._listener is not None:
            self._listener.close()
        for link in (self._upstream, self._downstream):
            if link is not None:
                link.close()

    def take(self, arrival: Arrival) -> None:
        """A message came from upstream: steps are for the compute thread, failures for the engine."""
        if isinstance(arrival.message, Step):
            self._received_step = arrival.message.step_id
            self._arrivals.put((arrival, now_ns()))
            return
        arrival.release()
        if isinstance(arrival.message, StageFailure) and self._downstream is not None:
            self._downstream.post(arrival.message)

    def lose_upstream(self, error: LinkError) -> None:
        """Nothing more will come: tells the engine, if that is not the one that left."""
        current = self._current
        self._fail(FAILED_BETWEEN_STEPS if current is None else current[0], str(error))

    def lose_downstream(self, error: LinkError) -> None:
        """Nothing can be told downstream any more, so the loss itself goes upstream, to the engine."""
        current = self._current
        self._fail(FAILED_BETWEEN_STEPS if current is None else current[0], str(error))
        if self._listener is not None:
            self._listener.close()
        if self._upstream is not None:
            self._upstream.close()

    # Either thread

    def _turn(self, before: State, after: State) -> None:
        with self._failing:
            if self._state == before:
                self._state = after

    def _fail(self, step_id: int, cause: str) -> None:
        with self._failing:
            if self._state in {"failed", "closed"}:
                return
            self._state = "failed"
            self._detail = cause
        self._log.error("stage failed", step_id=step_id, cause=cause)
        if self._downstream is not None:
            identity = self._identity
            self._downstream.post(
                StageFailure(
                    epoch=identity.epoch, stage=identity.index, host=identity.host, step_id=step_id, cause=cause
                )
            )


class _Upstream:
    """What the upstream link of one epoch calls; once the stage is joined anew, nobody listens to it."""

    def __init__(self, server: StageServer) -> None:
        self._server = server
        self._epoch = server.epoch

    def arrived(self, arrival: Arrival) -> None:
        if self._epoch == self._server.epoch:
            self._server.take(arrival)
        else:
            arrival.release()

    def lost(self, error: LinkError) -> None:
        if self._epoch == self._server.epoch:
            self._server.lose_upstream(error)


class _Downstream:
    """What the downstream link calls: nothing but credits comes back by it."""

    def __init__(self, server: StageServer) -> None:
        self._server = server
        self._epoch = server.epoch

    def arrived(self, arrival: Arrival) -> None:
        arrival.release()

    def lost(self, error: LinkError) -> None:
        if self._epoch == self._server.epoch:
            self._server.lose_downstream(error)


def _nothing() -> None:
    """For messages whose memory nobody waits for."""
