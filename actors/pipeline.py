"""The chain of stages as the engine sees it: start, steps in, results out, health, close."""

import asyncio
import itertools
import secrets
from collections import deque
from collections.abc import Callable
from typing import Protocol

import structlog

from actors.errors import LinkError, PipelineError
from actors.health import StageHealth, StageProgress
from actors.options import PipelineOptions
from actors.ray_environment import prepare
from actors.sockets.link import Arrival, Link, LinkEvents
from actors.verdict import Symptom, verdict
from stages.step import StageFailure, Step, StepResult

_epochs = itertools.count(1)
_log = structlog.get_logger()


class Running(Protocol):
    """What stands behind a pipeline: its stages, wherever they run."""

    async def health(self) -> list[StageHealth]:
        """What every stage says of itself, in order; returns within about a second."""

    async def close(self) -> None:
        """Ends everything."""


class Pipeline:
    """A running pipeline. Made by `start`; usable until `close`, or until the first PipelineError."""

    def __init__(self, epoch: int, step_timeout_s: float) -> None:
        """Not joined to any stages yet: `attach` does that."""
        self.epoch = epoch
        self._step_timeout_s = step_timeout_s
        self._loop = asyncio.get_running_loop()
        self._running: Running | None = None
        self._inlet: Link | None = None
        self._outstanding: dict[int, float] = {}
        self._results: deque[Arrival] = deque()
        self._changed = asyncio.Event()
        self._failed: asyncio.Future[PipelineError] = self._loop.create_future()
        self._diagnosing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    async def start(cls, options: PipelineOptions, on_progress: Callable[[StageProgress], None]) -> "Pipeline":
        """Places, starts, loads and joins all stages.

        `on_progress` is called on the caller's loop whenever a stage gets on. Raises ClusterError, PlacementError,
        or StartError naming stage, host and cause; a CheckpointError, CacheError, PlanError or DeviceError of a stage
        is raised as itself. Whatever was started is ended before it raises.
        """
        prepare(options.ray_address)
        # Importing Ray takes most of a second; the caller's loop has other work.
        await asyncio.to_thread(_import_ray)
        from actors.launch import EngineEnd, Launch  # noqa: PLC0415 - imports Ray, which reads what `prepare` has set

        pipeline = cls(next(_epochs), options.step_timeout_s)
        engine = EngineEnd(
            epoch=pipeline.epoch, secret=secrets.token_bytes(32), inlet=pipeline.inlet, outlet=pipeline.outlet
        )
        launch = Launch(options, engine, on_progress)
        try:
            pipeline.attach(launch, await launch.run())
        except BaseException:
            await asyncio.shield(launch.close())
            raise
        return pipeline

    def attach(self, running: Running, inlet: Link) -> None:
        """Takes over stages that are ready; `inlet` leads to the first, and the last one reports to `outlet`."""
        self._running = running
        self._inlet = inlet

    @property
    def inlet(self) -> LinkEvents:
        """Hears of the link to the first stage."""
        return _Inlet(self)

    @property
    def outlet(self) -> LinkEvents:
        """Hears of the link from the last stage."""
        return _Outlet(self)

    async def submit(self, step: Step) -> None:
        """Sends a step to the first stage; waits while the pipeline is full.

        Raises PipelineError once the pipeline has failed.
        """
        if self._failed.done():
            raise self._failed.result()
        if self._inlet is None:
            raise PipelineError("The pipeline was not started.")
        self._outstanding[step.step_id] = self._loop.time() + self._step_timeout_s
        if self._timer is None:
            self._timer = self._loop.call_later(self._step_timeout_s, self._check_deadline)
        try:
            await self._inlet.send(step)
        except LinkError as error:
            self.diagnose(Symptom(step_id=step.step_id, cause=str(error), failure=None))
            raise await asyncio.shield(self._failed) from error

    async def receive(self) -> StepResult:
        """The next result, in the order of submission; waits for it, for ever if no step is outstanding.

        Raises PipelineError naming stage, host, step and cause when a stage fails, dies or loses its link, or when
        the oldest outstanding step has passed `step_timeout_s`; and the same error on every call after that.
        """
        while not self._results:
            if self._failed.done():
                raise self._failed.result()
            self._changed.clear()
            await self._changed.wait()
        arrival = self._results.popleft()
        arrival.release()
        result = arrival.message
        if not isinstance(result, StepResult):
            raise TypeError(f"{type(result).__name__} among the results")
        return result

    async def health(self) -> list[StageHealth]:
        """What every stage says of itself, in order; one that does not answer is "silent", or "dead"."""
        return [] if self._running is None else await self._running.health()

    async def close(self) -> None:
        """Ends all stages and removes every socket; ends the Ray cluster if `start` started it. May be repeated."""
        self._fail(PipelineError("The pipeline is closed."))
        if self._diagnosing is not None:
            self._diagnosing.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if self._running is not None:
            await self._running.close()

    def take(self, arrival: Arrival) -> None:
        """A message came from the last stage."""
        message = arrival.message
        if isinstance(message, StepResult):
            if self._outstanding.pop(message.step_id, None) is None:
                arrival.release()
                cause = f"the last stage gave a result for step {message.step_id}, which is not outstanding"
                self.diagnose(Symptom(step_id=message.step_id, cause=cause, failure=None))
                return
            self._results.append(arrival)
            self._changed.set()
            return
        arrival.release()
        if isinstance(message, StageFailure):
            step_id = message.step_id if message.step_id >= 0 else self._oldest()
            self.diagnose(Symptom(step_id=step_id, cause=message.cause, failure=message))

    def diagnose(self, symptom: Symptom) -> None:
        """Something is wrong: finds out what, once, and fails the pipeline."""
        if self._diagnosing is None and not self._failed.done():
            self._diagnosing = asyncio.ensure_future(self._diagnose(symptom))

    def lose(self, error: LinkError) -> None:
        """One of the engine's own links is lost."""
        self.diagnose(Symptom(step_id=self._oldest(), cause=str(error), failure=None))

    def _oldest(self) -> int | None:
        return next(iter(self._outstanding), None)

    async def _diagnose(self, symptom: Symptom) -> None:
        self._fail(PipelineError(verdict(symptom, await self.health())))

    def _fail(self, error: PipelineError) -> None:
        if not self._failed.done():
            self._failed.set_result(error)
            self._changed.set()

    def _check_deadline(self) -> None:
        self._timer = None
        if self._failed.done() or not self._outstanding:
            return
        step_id, deadline = next(iter(self._outstanding.items()))
        if deadline > self._loop.time():
            self._timer = self._loop.call_at(deadline, self._check_deadline)
            return
        cause = f"it did not come out within {self._step_timeout_s:g} s"
        self.diagnose(Symptom(step_id=step_id, cause=cause, failure=None))


class _Inlet:
    """What the link to the first stage calls: nothing but credits comes back by it."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def arrived(self, arrival: Arrival) -> None:
        arrival.release()

    def lost(self, error: LinkError) -> None:
        self._pipeline.lose(error)


class _Outlet:
    """What the link from the last stage calls."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def arrived(self, arrival: Arrival) -> None:
        self._pipeline.take(arrival)

    def lost(self, error: LinkError) -> None:
        self._pipeline.lose(error)


def _import_ray() -> None:
    import ray  # noqa: F401, PLC0415 - not before `prepare` has set what it reads
