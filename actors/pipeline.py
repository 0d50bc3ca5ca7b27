"""The chain of stages as the engine sees it: start, steps in, results out, health, recovery, close."""

import asyncio
import itertools
import secrets
from collections import deque
from collections.abc import Callable, Collection
from typing import Protocol

import structlog

from actors.cluster.environment import prepare_environment
from actors.engine_end import EngineEnd
from actors.errors import LinkError, PipelineError
from actors.options import PipelineOptions
from actors.sockets.link import Arrival, Link
from actors.stage.health import StageHealth, StageProgress
from actors.step_deadline import StepDeadline
from actors.verdict import Symptom, Verdict, verdict
from stages.step import StageFailure, Step, StepResult
from weights.errors import GalaxylineError

_epochs = itertools.count(1)
_log = structlog.get_logger()


class Running(Protocol):
    """What stands behind a pipeline: its stages, wherever they run."""

    async def health(self) -> list[StageHealth]:
        """What every stage says of itself, in order; returns within about a second."""

    async def mend(self, engine: EngineEnd, given_up: Collection[int]) -> Link:
        """Joins the stages anew for another epoch, those `given_up` and others that are lost in new processes."""

    async def close(self) -> None:
        """Ends everything."""


class Pipeline:
    """A running pipeline. Made by `start`; usable until `close`.

    After a PipelineError it is of no use until `recover` has brought it back, as another `epoch`.
    """

    def __init__(self, epoch: int, step_timeout_s: float) -> None:
        """Not joined to any stages yet: `attach` does that."""
        self.epoch = epoch
        self._deadline = StepDeadline(step_timeout_s)
        self._loop = asyncio.get_running_loop()
        self._running: Running | None = None
        self._inlet: Link | None = None
        # When each step was submitted, by the loop's clock.
        self._outstanding: dict[int, float] = {}
        self._results: deque[Arrival] = deque()
        self._changed = asyncio.Event()
        self._failed: asyncio.Future[GalaxylineError] = self._loop.create_future()
        self._verdict: Verdict | None = None
        self._blamed_before: int | None = None
        self._diagnosing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    async def start(cls, options: PipelineOptions, on_progress: Callable[[StageProgress], None]) -> "Pipeline":
        """Places, starts, loads and joins all stages.

        `on_progress` is called on the caller's loop whenever a stage gets on. Raises ClusterError, PlacementError,
        or StartError naming stage, host and cause; a CheckpointError, CacheError, PlanError or DeviceError of a stage
        is raised as itself. Whatever was started is ended before it raises.
        """
        prepare_environment(options.ray_address)
        # Importing Ray takes most of a second; the caller's loop has other work.
        await asyncio.to_thread(_import_ray)
        from actors.launch import Launch  # noqa: PLC0415 - imports Ray, which reads what `prepare_environment` has set

        pipeline = cls(next(_epochs), options.step_timeout_s)
        launch = Launch(options, pipeline.engine_end(), on_progress)
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

    def engine_end(self) -> EngineEnd:
        """This side of the links of the present epoch, with a secret of its own."""
        secret = secrets.token_bytes(32)
        return EngineEnd(epoch=self.epoch, secret=secret, inlet=_Inlet(self), outlet=_Outlet(self))

    async def submit(self, step: Step) -> None:
        """Sends a step to the first stage; waits while the pipeline is full.

        Raises PipelineError once the pipeline has failed.
        """
        if self._failed.done():
            raise self._failed.result()
        if self._inlet is None:
            raise PipelineError("The pipeline was not started.")
        submitted_at = self._loop.time()
        try:
            await self._inlet.send(step)
        except LinkError as error:
            self.lose(error)
            raise await asyncio.shield(self._failed) from error
        # Not before: a step that never got into the pipeline has no part in its failures.
        self._outstanding[step.step_id] = submitted_at
        if self._timer is None:
            self._timer = self._loop.call_at(submitted_at + self._deadline.allowed_s, self._check_deadline)

    async def receive(self) -> StepResult:
        """The next result, in the order of submission; waits for it, for ever if no step is outstanding.

        Raises PipelineError naming stage, host, step and cause when a stage fails, dies or loses its link, or when
        the oldest outstanding step has passed its deadline; and the same error on every call until `recover`.
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

    async def recover(self) -> None:
        """Brings a pipeline that has failed back, as another epoch: what was outstanding is forgotten.

        A stage whose process is gone or stuck, or that was to blame twice with no result between, gets another one;
        the others keep theirs, and their weights. Raises PlacementError or StartError, or what loading has to object;
        it may be called again then.
        """
        if self._running is None:
            raise PipelineError("The pipeline was not started.")
        given_up = self._given_up()
        self._begin_epoch()
        try:
            self._inlet = await self._running.mend(self.engine_end(), given_up)
        except GalaxylineError as error:
            self._fail(error)
            raise

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
            submitted_at = self._outstanding.pop(message.step_id, None)
            if submitted_at is None:
                arrival.release()
                self._diagnose(f"the last stage gave a result for step {message.step_id}, which is not outstanding")
                return
            self._deadline.note(self._loop.time() - submitted_at)
            self._blamed_before = None
            self._results.append(arrival)
            self._changed.set()
            return
        arrival.release()
        if isinstance(message, StageFailure):
            self._diagnose(message.cause, message)

    def lose(self, error: LinkError) -> None:
        """One of the engine's own links is lost."""
        self._diagnose(str(error))

    def _diagnose(self, cause: str, failure: StageFailure | None = None, *, is_late: bool = False) -> None:
        """Something is wrong: finds out what, once, and fails the pipeline."""
        if self._diagnosing is None and not self._failed.done():
            symptom = Symptom(outstanding=list(self._outstanding), cause=cause, failure=failure, is_late=is_late)
            self._diagnosing = asyncio.ensure_future(self._judge(symptom))

    async def _judge(self, symptom: Symptom) -> None:
        found = self._verdict = verdict(symptom, await self.health())
        self._fail(PipelineError(found.sentence, found.stage, found.step_id))

    def _given_up(self) -> set[int]:
        """The stages that need another process."""
        found, self._verdict = self._verdict, None
        if found is None or found.stage is None:
            return set()
        was_blamed, self._blamed_before = self._blamed_before == found.stage, found.stage
        return {found.stage} if found.is_lost or was_blamed else set()

    def _begin_epoch(self) -> None:
        self.epoch = next(_epochs)
        self._inlet = None
        self._outstanding.clear()
        for arrival in self._results:
            arrival.release()
        self._results.clear()
        self._deadline.forget()
        self._failed = self._loop.create_future()
        if self._diagnosing is not None:
            self._diagnosing.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self._diagnosing = self._timer = None

    def _fail(self, error: GalaxylineError) -> None:
        if not self._failed.done():
            self._failed.set_result(error)
            self._changed.set()

    def _check_deadline(self) -> None:
        self._timer = None
        if self._failed.done() or not self._outstanding:
            return
        allowed_s = self._deadline.allowed_s
        deadline = next(iter(self._outstanding.values())) + allowed_s
        if deadline > self._loop.time():
            self._timer = self._loop.call_at(deadline, self._check_deadline)
            return
        self._diagnose(f"it did not come out within {allowed_s:.3g} s", is_late=True)


class _Inlet:
    """What the link to the first stage calls: nothing but credits comes back by it."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._epoch = pipeline.epoch

    def arrived(self, arrival: Arrival) -> None:
        arrival.release()

    def lost(self, error: LinkError) -> None:
        if self._epoch == self._pipeline.epoch:
            self._pipeline.lose(error)


class _Outlet:
    """What the link from the last stage calls. Of a former epoch nobody hears any more."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._epoch = pipeline.epoch

    def arrived(self, arrival: Arrival) -> None:
        if self._epoch == self._pipeline.epoch:
            self._pipeline.take(arrival)
        else:
            arrival.release()

    def lost(self, error: LinkError) -> None:
        if self._epoch == self._pipeline.epoch:
            self._pipeline.lose(error)


def _import_ray() -> None:
    import ray  # noqa: F401, PLC0415 - not before `prepare_environment` has set what it reads
