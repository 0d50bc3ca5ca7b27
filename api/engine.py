"""The engine: joins the scheduler to the pipeline. A process of its own, so that tokenising never delays a step.

`EngineClient` starts it with the number of a socket's file descriptor; its options are the first frame on it, and the
messages of api/messages.py follow. It ends itself when the socket or the pipeline does. SIGINT and SIGTERM are for the
front end alone: `ray job stop` sends them to every process, and the open requests are to end first.
"""

import asyncio
import math
import pkgutil
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import msgspec
import structlog
import uvloop

from actors.clock import now_ns
from actors.errors import PipelineError, ProtocolError
from actors.health import StageHealth, StageProgress
from actors.log import configure_logging
from actors.options import PipelineOptions
from api.engine_metrics import EngineMeters
from api.engine_options import EngineOptions
from api.engine_state import failed_state
from api.errors import EngineError, RequestError, exit_code
from api.framing import Framing
from api.messages import (
    AbortRequest,
    AddRequest,
    EngineState,
    FromEngine,
    GetCounts,
    GetMetrics,
    GetPipelineReport,
    Outputs,
    RequestOutput,
    ToEngine,
)
from api.pipeline_reports import PipelineReports
from api.recovery import Recovery
from api.restart_limit import RestartLimit
from api.scheduler import Scheduler
from api.signals import on_stop_signal
from api.step_watch import StepWatch
from api.timeline import Timeline, open_timeline
from stages.step import Step, StepResult
from weights.errors import GalaxylineError

OPTIONS_TIMEOUT_S = 30.0
FLUSH_TIMEOUT_S = 5.0
EXIT_MARGIN_S = 5

log = structlog.get_logger()


class StartedPipeline(Protocol):
    """What the engine needs of actors.pipeline.Pipeline."""

    epoch: int

    async def submit(self, step: Step) -> None:
        """Sends a step to the first stage. Raises PipelineError."""

    async def receive(self) -> StepResult:
        """The next result, in the order of submission. Raises PipelineError."""

    async def health(self) -> list[StageHealth]:
        """What every stage says of itself, in order; returns within about a second."""

    async def recover(self) -> None:
        """Brings it back after a failure, as another epoch. Raises GalaxylineError; may be called again then."""

    async def close(self) -> None:
        """Ends all stages."""


StartPipeline = Callable[[PipelineOptions, Callable[[StageProgress], None]], Awaitable[StartedPipeline]]


class Engine:
    """Fills the pipeline with the scheduler's steps and hands out what they sample, through `send`."""

    def __init__(
        self, options: EngineOptions, start_pipeline: StartPipeline, send: Callable[[FromEngine], None]
    ) -> None:
        self._options = options
        self._start_pipeline = start_pipeline
        self._send = send
        self._scheduler = Scheduler(options.scheduler, epoch=0)
        self._meters = EngineMeters(len(options.pipeline.specs))
        self._watch = StepWatch(self._scheduler, self._meters)
        self._reports = PipelineReports(options, self._scheduler, self._meters, send)
        self._recovery = Recovery(self._scheduler, self._watch, self._meters, RestartLimit(options.max_restarts), send)
        self._changed = asyncio.Event()
        self._pipeline: StartedPipeline | None = None

    @property
    def close_timeout_s(self) -> float:
        """How long the stages get to end."""
        return self._options.close_timeout_s

    def take(self, message: ToEngine) -> None:
        """A message from the front end. Requests may come while the pipeline starts: they wait."""
        if isinstance(message, AddRequest):
            self._add(message)
        elif isinstance(message, AbortRequest):
            self._scheduler.abort(message.request_id)
            self._watch.request_aborted(message.request_id)
        elif isinstance(message, GetCounts):
            counts = self._scheduler.counts()
            self._send(msgspec.structs.replace(counts, tasks=len(asyncio.all_tasks())))
        elif isinstance(message, GetMetrics):
            counts, preemptions = self._scheduler.counts(), self._scheduler.preemptions
            self._send(self._meters.metrics(counts, preemptions, self._reports.roster.hosts))
        elif isinstance(message, GetPipelineReport):
            self._reports.ask(self._pipeline)

    async def run(self) -> None:
        """Starts the pipeline and serves until the task is cancelled; `close` is to follow in any case.

        A pipeline that fails is brought back, and the requests in it go on where they were. Raises what
        `Pipeline.start` raises, or PipelineError or PlacementError where it cannot be brought back: every request has
        ended with it then, and the front end has been told.
        """
        self._send(EngineState(phase="loading", detail="The stages are being placed."))
        try:
            if self._options.timeline is not None:
                self._watch.timeline = Timeline(open_timeline(Path(self._options.timeline)))
            self._pipeline = await self._start_pipeline(self._options.pipeline, self._tell_progress)
            while True:
                # A new epoch knows no request: those that wait for it, or ran in a former one, begin anew.
                self._scheduler.reset(self._pipeline.epoch)
                if self._watch.timeline is not None:
                    self._watch.timeline.name_stages(self._reports.roster.hosts)
                self._send(EngineState(phase="ready", detail=""))
                failure = await self._serve(self._pipeline)
                await self._recovery.bring_back(self._pipeline, failure)
        except asyncio.CancelledError:
            self._fail(EngineError("The engine was stopped."))
            raise
        except GalaxylineError as error:
            self._fail(error)
            raise

    async def close(self) -> None:
        """Ends the stages. Raises EngineError when they do not end in their time."""
        if self._watch.timeline is not None:
            self._watch.timeline.close()
        self._reports.close()
        if self._pipeline is None:
            return
        closing = asyncio.ensure_future(self._pipeline.close())
        await asyncio.wait([closing], timeout=self.close_timeout_s)
        if not closing.done():
            raise EngineError(f"The stages did not end within {self.close_timeout_s:g} s.")
        closing.result()

    async def _serve(self, pipeline: StartedPipeline) -> PipelineError | ProtocolError:
        """Serves until the pipeline fails; returns what it failed with."""
        self._changed.set()
        loops = [asyncio.create_task(self._feed(pipeline)), asyncio.create_task(self._collect(pipeline))]
        try:
            done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            for loop in done:
                loop.result()
        except (PipelineError, ProtocolError) as error:
            return error
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
        raise EngineError("The engine stopped serving without a cause.")

    async def _feed(self, pipeline: StartedPipeline) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            while step := self._scheduler.next_step():
                self._watch.step_issued(step)
                await pipeline.submit(step)

    async def _collect(self, pipeline: StartedPipeline) -> None:
        while True:
            result = await pipeline.receive()
            returned_ns = now_ns()
            outputs = self._scheduler.on_result(result)
            self._changed.set()
            if outputs:
                self._recovery.progress()
                self._send(Outputs(outputs=outputs))
            self._watch.step_returned(result, outputs, returned_ns)

    def _add(self, request: AddRequest) -> None:
        try:
            self._scheduler.add(request)
        except RequestError as error:
            refusal = RequestOutput(request_id=request.request_id, tokens=[], finish_reason="error", error=str(error))
            self._send(Outputs(outputs=[refusal]))
        else:
            self._watch.request_came(request.request_id)
            self._changed.set()

    def _tell_progress(self, progress: StageProgress) -> None:
        self._reports.roster.note(progress)
        detail = f"Stage {progress.stage} on {progress.host}: {progress.phase}"
        if progress.phase == "loading":
            detail += f", {progress.layers_done} of {progress.layers} layers"
        if not self._recovery.is_under_way:
            self._send(EngineState(phase="loading", detail=detail))

    def _fail(self, error: GalaxylineError) -> None:
        self._send(failed_state(error))
        outputs = self._scheduler.fail(str(error))
        self._send(Outputs(outputs=outputs))
        self._watch.pipeline_lost()
        self._watch.requests_ended(outputs)


class EngineProcess:
    """The engine and its end of the socket, from the first frame to the exit code."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._begun = asyncio.Event()
        self._stop = asyncio.Event()
        self._framing = Framing(self._begin)

    async def run(self, connection: socket.socket) -> int:
        """Serves the front end at the other end of `connection`; returns the exit code."""
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self._framing, sock=connection)
        with on_stop_signal(lambda number: log.info("a signal is left to the front end", signal=number)):
            await _first_of(self._begun, self._framing.lost, timeout_s=OPTIONS_TIMEOUT_S)
            if self._engine is None:
                log.error("the front end is gone, or gave no options")
                return 1
            serving = asyncio.create_task(self._engine.run())
            serving.add_done_callback(lambda _: self._stop.set())
            await _first_of(self._stop, self._framing.lost)
            return await self._leave(self._engine, serving)

    async def _leave(self, engine: Engine, serving: "asyncio.Task[None]") -> int:
        serving.cancel()
        # Whatever hangs from here on, the process ends; Ray's daemons then end with it.
        signal.alarm(math.ceil(2 * engine.close_timeout_s) + EXIT_MARGIN_S)
        try:
            code = await _outcome(serving)
        finally:
            code_of_close = await _outcome(engine.close())
            self._framing.finish()
            await _first_of(self._framing.lost, timeout_s=FLUSH_TIMEOUT_S)
        return code or code_of_close

    def _begin(self, frame: memoryview) -> None:
        options = msgspec.msgpack.decode(frame, type=EngineOptions)
        engine = Engine(options, pkgutil.resolve_name(options.pipeline_start), self._framing.send)
        messages: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        self._framing.on_frame = lambda later: engine.take(messages.decode(later))
        self._engine = engine
        self._begun.set()


async def _first_of(*events: asyncio.Event, timeout_s: float | None = None) -> None:
    """Returns when one of the events is set, or after `timeout_s` seconds."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


async def _outcome(ending: Awaitable[None]) -> int:
    """The exit code of what ends now; an error is logged by its name."""
    try:
        await ending
    except asyncio.CancelledError:
        return 0
    except GalaxylineError as error:
        log.error("the engine failed", kind=type(error).__name__, error=str(error))  # noqa: TRY400 - it says enough
        return exit_code(error)
    return 0


def main() -> None:
    """The process: its one argument is the number of the socket's file descriptor."""
    configure_logging()
    connection = socket.socket(fileno=int(sys.argv[1]))
    # A process that outlives this one must not hold the connection open.
    connection.set_inheritable(False)
    sys.exit(uvloop.run(EngineProcess().run(connection)))


if __name__ == "__main__":
    main()
