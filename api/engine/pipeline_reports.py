"""The reports on the pipeline that the engine sends when it is asked for them."""

import asyncio
from collections.abc import Callable

from api.engine.meters import EngineMeters
from api.engine.options import EngineOptions
from api.engine.recovery import EnginePipeline
from api.messages.engine import FromEngine, PipelineReport
from api.messages.pipeline_view import StageRoster
from api.scheduler.scheduler import Scheduler


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
