"""The chain of stages as the engine sees it: start, steps in, results out, health, recovery, close."""

import asyncio
import itertools
import math
import secrets
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import structlog

from actors.cluster.environment import prepare_environment
from actors.diagnosis import Diagnosis, FailureReport, ReportKind, diagnose
from actors.errors import LinkError, PipelineError
from actors.options import PipelineOptions
from actors.sockets.link import Arrival, EngineLinks, EpochEvents, Link
from actors.stage.health import StageHealth, StageProgress
from actors.workspace import Workspace
from stages.kv.inventory import Inventory
from stages.step import StageFailure, Step, StepResult
from weights.errors import GalaxylineError

RECENT_STEPS = 32
DEADLINE_FACTOR = 50.0
"""A step of prompt tokens alone takes some twenty times as long as a step of one token for each user."""
DEADLINE_LEAST_S = 5.0
PAUSE_TURN_S = 0.5
PAUSE_LEAST_S = 1.0
PAUSE_RECENT_S = 5.0
"""After a pause it takes moments to hear of links that were given up, and a second to ask stages about them."""

_epochs = itertools.count(1)
_log = structlog.get_logger()


class StepDeadline:
    """How long a step may take before a stage is considered stuck.

    It is DEADLINE_FACTOR times the longest of the last RECENT_STEPS steps, but at least DEADLINE_LEAST_S and at most
    `most_s` seconds. Until so many steps are known it is `most_s`: the first ones may compile, or capture a trace.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._took_s: deque[float] = deque(maxlen=RECENT_STEPS)

    def note(self, took_s: float) -> None:
        """Records the seconds from a step's submission to its result."""
        self._took_s.append(took_s)

    def forget(self) -> None:
        """Drops all records, as the next steps may be slower: a stage is new."""
        self._took_s.clear()

    @property
    def allowed_s(self) -> float:
        """Seconds from a step's submission to its result."""
        if len(self._took_s) < RECENT_STEPS:
            return self._most_s
        return min(self._most_s, max(DEADLINE_LEAST_S, DEADLINE_FACTOR * max(self._took_s)))


class PauseMeter:
    """How long this process has stood still: it was stopped, or got no processor. Belongs to one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._paused_s, self._paused_at = 0.0, -math.inf
        self._turned_at = self._loop.time()
        self._timer = self._loop.call_later(PAUSE_TURN_S, self._turn)

    @property
    def recent_s(self) -> float:
        """Seconds of a pause that ended just now; 0 where there was none of PAUSE_LEAST_S."""
        self._note()
        return self._paused_s if self._loop.time() - self._paused_at < PAUSE_RECENT_S else 0.0

    def close(self) -> None:
        """Ends the measurement."""
        self._timer.cancel()

    def _turn(self) -> None:
        self._note()
        self._timer = self._loop.call_later(PAUSE_TURN_S, self._turn)

    def _note(self) -> None:
        now = self._loop.time()
        paused_s, self._turned_at = now - self._turned_at - PAUSE_TURN_S, now
        if paused_s > PAUSE_LEAST_S:
            self._paused_s, self._paused_at = paused_s, now


class PipelineStages(Protocol):
    """The stages of a pipeline, wherever they run."""

    async def health(self) -> list[StageHealth]:
        """Returns the health of every stage, in order, within about a second."""

    async def inventories(self, versions: Sequence[int]) -> list[Inventory | None]:
        """Returns what every stage keeps beside its device since the versions; None for one that does not answer."""

    async def rejoin(self, links: EngineLinks, kill: Collection[int]) -> Link:
        """Joins the stages for another epoch; those to `kill`, and others that are lost, get new processes.

        Returns the link to the first stage.
        """

    async def close(self) -> None:
        """Ends everything."""


class Pipeline:
    """A running pipeline, made by `start` and usable until `close`.

    After a PipelineError it cannot be used until `recover` has brought it back, as another `epoch`.
    """

    def __init__(self, epoch: int, step_timeout_s: float) -> None:
        """Makes a pipeline without stages: `attach` adds them."""
        self.epoch = epoch
        self._deadline = StepDeadline(step_timeout_s)
        self._loop = asyncio.get_running_loop()
        self._stages: PipelineStages | None = None
        self._downstream: Link | None = None
        # When each step was submitted, by the loop's clock.
        self._outstanding: dict[int, float] = {}
        self._results: deque[Arrival] = deque()
        self._changed = asyncio.Event()
        self._failed: asyncio.Future[GalaxylineError] = self._loop.create_future()
        self._diagnosis: Diagnosis | None = None
        self._failed_before: int | None = None
        self._diagnosing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._pauses = PauseMeter()

    @classmethod
    async def start(cls, options: PipelineOptions, on_progress: Callable[[StageProgress], None]) -> "Pipeline":
        """Places, starts, loads and joins all stages.

        `on_progress` is called on the caller's loop whenever a stage has come further. Raises ClusterError,
        PlacementError, or StartError naming stage, host and cause; a CheckpointError, CacheError, PlanError or
        DeviceError of a stage is raised as it is. Whatever was started is ended before it raises.
        """
        prepare_environment(options.cluster.ray_address)
        # First of all: its imports go on while Ray is imported and started here.
        workspace = Workspace.open(options)
        try:
            # Importing Ray takes most of a second; the caller's loop has other work.
            await asyncio.to_thread(_import_ray)
            from actors.deployment import Deployment  # noqa: PLC0415 - imports Ray, which reads the environment

            pipeline = cls(next(_epochs), options.cluster.step_timeout_s)
            deployment = await Deployment.start(options, workspace, pipeline.engine_links(), on_progress)
        except BaseException:
            await asyncio.shield(workspace.close())
            raise
        pipeline.attach(deployment, deployment.downstream)
        return pipeline

    def attach(self, stages: PipelineStages, downstream: Link) -> None:
        """Takes over stages that are ready; `downstream` is the link to the first one."""
        self._stages = stages
        self._downstream = downstream

    def engine_links(self) -> EngineLinks:
        """Returns this side of the links of the present epoch, with a secret of its own."""
        return EngineLinks(
            epoch=self.epoch,
            secret=secrets.token_bytes(32),
            downstream=EpochEvents(self._current_epoch, self.handle_lost_link),
            upstream=EpochEvents(self._current_epoch, self.handle_lost_link, self.handle_arrival),
        )

    async def submit(self, step: Step) -> None:
        """Sends a step to the first stage; waits while the pipeline is full.

        Raises PipelineError once the pipeline has failed.
        """
        if self._failed.done():
            raise self._failed.result()
        if self._downstream is None:
            raise PipelineError("The pipeline was not started.")
        submitted_at = self._loop.time()
        try:
            await self._downstream.send(step)
        except LinkError as error:
            self.handle_lost_link(error)
            raise await asyncio.shield(self._failed) from error
        # Not before: a step that never got into the pipeline has no part in its failures.
        self._outstanding[step.step_id] = submitted_at
        if self._timer is None:
            self._timer = self._loop.call_at(submitted_at + self._deadline.allowed_s, self._check_deadline)

    async def receive(self) -> StepResult:
        """Returns the next result, in the order of submission; waits for it, for ever if no step is outstanding.

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
        """Brings a pipeline that has failed back, as another epoch; steps that were outstanding are forgotten.

        A stage whose process is gone or stuck, or that failed twice with no result between, gets another one; the
        others keep theirs, and their weights. Raises PlacementError or StartError, or what loading raises; it may be
        called again then.
        """
        if self._stages is None:
            raise PipelineError("The pipeline was not started.")
        kill = self._stages_to_kill()
        self._begin_epoch()
        try:
            self._downstream = await self._stages.rejoin(self.engine_links(), kill)
        except GalaxylineError as error:
            self._fail(error)
            raise

    async def health(self) -> list[StageHealth]:
        """Returns the health of every stage, in order; one that does not answer is "silent", or "dead"."""
        return [] if self._stages is None else await self._stages.health()

    async def inventories(self, versions: Sequence[int]) -> list[Inventory | None]:
        """Returns what each stage keeps beside its device since its version; None for one that does not answer."""
        return [] if self._stages is None else await self._stages.inventories(versions)

    async def close(self) -> None:
        """Ends all stages and removes every socket; ends the Ray cluster if `start` started it. May be repeated."""
        self._fail(PipelineError("The pipeline is closed."))
        if self._diagnosing is not None:
            self._diagnosing.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self._pauses.close()
        if self._stages is not None:
            await self._stages.close()

    def handle_arrival(self, arrival: Arrival) -> None:
        """Takes a message from the last stage."""
        message = arrival.message
        if isinstance(message, StepResult):
            submitted_at = self._outstanding.pop(message.step_id, None)
            if submitted_at is None:
                arrival.release()
                cause = f"the last stage gave a result for step {message.step_id}, which is not outstanding"
                self._begin_diagnosis("stray_result", cause)
                return
            self._deadline.note(self._loop.time() - submitted_at)
            self._failed_before = None
            self._results.append(arrival)
            self._changed.set()
            return
        arrival.release()
        if isinstance(message, StageFailure):
            self._begin_diagnosis("stage_failure", message.cause, message)

    def handle_lost_link(self, error: LinkError) -> None:
        """Fails the pipeline because one of the engine's own links is lost."""
        self._begin_diagnosis("lost_link", str(error))

    def _current_epoch(self) -> int:
        return self.epoch

    def _begin_diagnosis(self, kind: ReportKind, cause: str, failure: StageFailure | None = None) -> None:
        """Finds out what failed, once, and fails the pipeline with it."""
        if self._diagnosing is None and not self._failed.done():
            report = FailureReport(
                kind=kind,
                outstanding=list(self._outstanding),
                cause=cause,
                failure=failure,
                engine_paused_s=self._pauses.recent_s,
            )
            self._diagnosing = asyncio.ensure_future(self._diagnose(report))

    async def _diagnose(self, report: FailureReport) -> None:
        found = self._diagnosis = diagnose(report, await self.health())
        self._fail(PipelineError(found.sentence, found.stage, found.step_id))

    def _stages_to_kill(self) -> set[int]:
        """The stages that need another process."""
        found, self._diagnosis = self._diagnosis, None
        if found is None or found.stage is None:
            return set()
        has_failed_before, self._failed_before = self._failed_before == found.stage, found.stage
        return {found.stage} if found.is_lost or has_failed_before else set()

    def _begin_epoch(self) -> None:
        self.epoch = next(_epochs)
        self._downstream = None
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
        self._begin_diagnosis("late_step", f"it did not come out within {allowed_s:.3g} s")


def _import_ray() -> None:
    import ray  # noqa: F401, PLC0415 - not before `prepare_environment` has set what it reads
