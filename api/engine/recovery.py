"""Recovery of a pipeline that has failed, tried again as long as there is hope."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from actors.clock import now_ns
from actors.errors import ClusterError, PipelineError, PlacementError, ProtocolError
from actors.stage.health import StageHealth
from api.engine.meters import NS, EngineMeters
from api.engine.step_watch import StepWatch
from api.messages.engine import FromEngine, Outputs, recovering_state
from api.scheduler.scheduler import Scheduler
from stages.kv.inventory import Inventory
from stages.step import Step, StepResult
from weights.errors import GalaxylineError

RETRY_S = 1.0
"""The pause between two attempts to bring the pipeline back."""

log = structlog.get_logger()


class EnginePipeline(Protocol):
    """A pipeline that has started: actors.pipeline.Pipeline is one, and so are the tests' fakes."""

    epoch: int

    async def submit(self, step: Step) -> None:
        """Sends a step to the first stage. Raises PipelineError."""

    async def receive(self) -> StepResult:
        """Returns the next result, in the order of submission. Raises PipelineError."""

    async def health(self) -> list[StageHealth]:
        """Returns the health of every stage, in order, within about a second."""

    async def inventories(self, versions: Sequence[int]) -> list[Inventory | None]:
        """Returns what each stage keeps beside its device since its version; None for one that does not answer."""

    async def recover(self) -> None:
        """Brings the pipeline back after a failure, as another epoch.

        Raises GalaxylineError; it may be called again then.
        """

    async def close(self) -> None:
        """Ends all stages."""


class RestartLimit:
    """Counts how often each stage, or the pipeline, failed since a token was made."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._failures: Counter[int | None] = Counter()

    def record_token(self) -> None:
        """Begins to count anew, as a token was made."""
        self._failures.clear()

    def record_failure(self, error: GalaxylineError, *, is_explained: bool = False) -> None:
        """Counts a failure of the pipeline, or of an attempt to bring it back.

        Raises PipelineError when it is not to be tried again. A failure that `is_explained` by a request that has ended
        with it counts, but raises nothing.
        """
        stage = error.stage if isinstance(error, PipelineError) else None
        self._failures[stage] += 1
        if self._failures[stage] > self._most and not is_explained:
            who = "The pipeline" if stage is None else f"Stage {stage}"
            what = f"{who} failed {self._failures[stage]} times with no token made in between"
            raise PipelineError(f"{what}; the last time: {error}", stage, public=f"{what}.") from error


class Recovery:
    """Does what lies between the failure of a pipeline and the first step of its next epoch."""

    def __init__(
        self,
        scheduler: Scheduler,
        watch: StepWatch,
        meters: EngineMeters,
        limit: RestartLimit,
        send: Callable[[FromEngine], None],
    ) -> None:
        self.is_under_way = False
        self._scheduler = scheduler
        self._watch = watch
        self._meters = meters
        self._limit = limit
        self._send = send

    def record_token(self) -> None:
        """Notes that the pipeline made a token: failures before it no longer count."""
        self._limit.record_token()

    async def bring_back(self, pipeline: EnginePipeline, failure: PipelineError | ProtocolError) -> None:
        """Returns when the pipeline can take steps again; the scheduler is then to be reset.

        Raises PipelineError where it fails too often, PlacementError where no rows are left, and ClusterError where
        Ray itself is gone.
        """
        began_ns = now_ns()
        self.is_under_way = True
        self._report(failure)
        is_explained = self._end_culprit(failure)
        self._watch.pipeline_lost()
        self._limit.record_failure(failure, is_explained=is_explained)
        while True:
            try:
                await pipeline.recover()
                break
            except (ClusterError, PlacementError):
                raise
            except GalaxylineError as error:
                self._report(error)
                self._limit.record_failure(error)
                await asyncio.sleep(RETRY_S)
        self.is_under_way = False
        seconds = (now_ns() - began_ns) * NS
        self._meters.recovered(seconds)
        log.info("the pipeline is back", epoch=pipeline.epoch, seconds=round(seconds, 3))

    def _end_culprit(self, failure: PipelineError | ProtocolError) -> bool:
        """Ends the request that alone makes steps fail, once it is found; returns whether it was."""
        step_id = failure.step_id if isinstance(failure, PipelineError) else None
        ended = self._scheduler.on_failure(step_id, failure)
        if ended:
            self._send(Outputs(outputs=ended))
            self._watch.requests_ended(ended)
        return bool(ended)

    def _report(self, error: GalaxylineError) -> None:
        log.error("the pipeline failed", kind=type(error).__name__, error=str(error))
        self._send(recovering_state(error))
