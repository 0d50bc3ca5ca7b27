"""The pipeline as the engine needs it, and reports of what its stages do."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from actors.stage.health import StageHealth
from api.engine.meters import EngineMeters
from api.engine.options import EngineOptions
from api.messages.engine import FromEngine, PipelineReport
from api.messages.pipeline_view import StageRoster
from api.scheduler.scheduler import Scheduler
from stages.step import Step, StepResult


class EnginePipeline(Protocol):
    """A pipeline that has started: actors.pipeline.Pipeline is one, and so are the tests' fakes."""

    epoch: int

    async def submit(self, step: Step) -> None:
        """Sends a step to the first stage. Raises PipelineError."""

    async def receive(self) -> StepResult:
        """Returns the next result, in the order of submission. Raises PipelineError."""

    async def health(self) -> list[StageHealth]:
        """Returns the health of every stage, in order, within about a second."""

    async def recover(self) -> None:
        """Brings the pipeline back after a failure, as another epoch.

        Raises GalaxylineError; it may be called again then.
        """

    async def close(self) -> None:
        """Ends all stages."""


class PipelineReports:
    """Makes reports from the state of scheduler, meters and stages. Nothing is looked at unless one is asked for."""

    def __init__(
        self, options: EngineOptions, scheduler: Scheduler, meters: EngineMeters, send: Callable[[FromEngine], None]
    ) -> None:
        self.roster = StageRoster(options.pipeline.specs)
        self._microbatches = options.scheduler.steps_in_flight
        self._scheduler = scheduler
        self._meters = meters
        self._send = send
        self._owed = 0
        self._is_closed = False
        self._looking: asyncio.Task[None] | None = None

    def send_report(self, pipeline: EnginePipeline | None) -> None:
        """Sends a report soon; `pipeline` is None while there is none.

        One look at the stages serves all the reports that are asked for before it is over.
        """
        if self._is_closed:
            return
        self._owed += 1
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._report(pipeline))

    def close(self) -> None:
        """Sends no more reports, as the stages are gone."""
        self._is_closed = True
        if self._looking is not None:
            self._looking.cancel()

    async def _report(self, pipeline: EnginePipeline | None) -> None:
        healths = [] if pipeline is None else await pipeline.health()
        counts = self._scheduler.counts()
        report = PipelineReport(
            epoch=None if pipeline is None else pipeline.epoch,
            microbatches=self._microbatches,
            counts=counts,
            preemptions=self._scheduler.preemptions,
            stages=self.roster.views(healths, self._meters.busy_share, counts.blocks - counts.free_blocks),
        )
        while self._owed:
            self._owed -= 1
            self._send(report)
