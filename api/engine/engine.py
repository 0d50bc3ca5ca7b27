"""The engine, which joins the scheduler to the pipeline."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import structlog

from actors.clock import now_ns
from actors.errors import PipelineError, ProtocolError
from actors.options import PipelineOptions
from actors.stage.health import StageProgress
from api.engine.kv_tiers import KVTiers
from api.engine.meters import EngineMeters
from api.engine.options import EngineOptions
from api.engine.recovery import EnginePipeline, Recovery, RestartLimit
from api.engine.step_watch import StepWatch
from api.engine.timeline import Timeline, open_timeline
from api.errors import EngineError, OptionError, RequestError
from api.messages.engine import (
    AbortRequest,
    AddRequest,
    EngineMetrics,
    EngineState,
    FromEngine,
    GetCounts,
    GetMetrics,
    GetPipelineReport,
    Outputs,
    PipelineReport,
    PrefixCacheReset,
    PrefixCounts,
    ResetPrefixCache,
    ToEngine,
    failed_output,
    failed_state,
    loading_state,
)
from api.messages.pipeline_view import StageRoster
from api.scheduler.scheduler import Scheduler
from weights.errors import GalaxylineError

StartPipeline = Callable[[PipelineOptions, Callable[[StageProgress], None]], Awaitable[EnginePipeline]]
"""`Pipeline.start` of actors/pipeline.py, or what a test has in its stead."""

INVENTORY_SECONDS = 5.0
"""How often stages are asked what they keep; of what left the device since then they are believed to have it."""

log = structlog.get_logger()


class Engine:
    """Keeps the pipeline full of the scheduler's steps, and gives what they sample to `send`."""

    def __init__(
        self, options: EngineOptions, start_pipeline: StartPipeline, send: Callable[[FromEngine], None]
    ) -> None:
        self._options = options
        self._start_pipeline = start_pipeline
        self._send = send
        self._scheduler = Scheduler(options.scheduler, epoch=0)
        self._tiers = KVTiers(options.pipeline.stage.tiers, len(options.pipeline.specs), self._scheduler.cache)
        self._meters = EngineMeters(len(options.pipeline.specs))
        self._watch = StepWatch(self._scheduler, self._meters)
        self._reports = PipelineReports(options, self._scheduler, self._meters, self._tiers, send)
        self._recovery = Recovery(
            self._scheduler, self._watch, self._meters, RestartLimit(options.recovery.max_restarts), send
        )
        self._changed = asyncio.Event()
        self._pipeline: EnginePipeline | None = None

    @property
    def close_timeout_s(self) -> float:
        """The seconds that the stages get to end."""
        return self._options.close_timeout_s

    def handle_message(self, message: ToEngine) -> None:
        """Handles a message from the front end. Requests may come while the pipeline starts: they wait."""
        if isinstance(message, AddRequest):
            self._add_request(message)
        elif isinstance(message, AbortRequest):
            self._scheduler.abort(message.request_id)
            self._watch.request_aborted(message.request_id)
        elif isinstance(message, ResetPrefixCache):
            self._send(self._reset_prefix_cache())
        elif isinstance(message, GetCounts):
            counts = self._scheduler.counts()
            self._send(msgspec.structs.replace(counts, tasks=len(asyncio.all_tasks())))
        elif isinstance(message, GetMetrics):
            self._send(self._reports.metrics())
        elif isinstance(message, GetPipelineReport):
            self._reports.send_report(self._pipeline)

    async def run(self) -> None:
        """Starts the pipeline and serves until the task is cancelled; `close` is to follow in any case.

        A pipeline that fails is brought back, and the requests in it go on where they were. Raises what
        `Pipeline.start` raises, or PipelineError or PlacementError where it cannot be brought back: every request has
        ended with it then, and the front end has been sent the state "failed".
        """
        self._send(loading_state("The stages are being placed."))
        try:
            if self._options.timeline is not None:
                self._watch.timeline = Timeline(open_timeline(Path(self._options.timeline)))
            # A directory on a network may not answer, which the start's deadline is for.
            await asyncio.to_thread(self._tiers.open)
            self._pipeline = await self._start_pipeline(self._options.pipeline, self._send_progress)
            while True:
                # The stages of a new epoch have no requests: those that wait, or ran in a former one, begin anew.
                await self._tiers.refresh(self._pipeline)
                self._scheduler.reset(self._pipeline.epoch)
                if self._watch.timeline is not None:
                    self._watch.timeline.name_stages(self._reports.roster.hosts)
                self._send(EngineState(phase="ready"))
                failure = await self._serve(self._pipeline)
                await self._recovery.bring_back(self._pipeline, failure)
        except asyncio.CancelledError:
            self._fail(EngineError.for_clients("The engine was stopped."))
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

    async def _serve(self, pipeline: EnginePipeline) -> PipelineError | ProtocolError:
        """Serves until the pipeline fails; returns what it failed with."""
        self._changed.set()
        loops = [asyncio.create_task(self._feed(pipeline)), asyncio.create_task(self._collect(pipeline))]
        if self._options.pipeline.stage.tiers.are_any:
            loops.append(asyncio.create_task(self._ask_for_tiers(pipeline)))
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

    async def _feed(self, pipeline: EnginePipeline) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            while step := self._scheduler.next_step():
                self._watch.step_issued(step)
                await pipeline.submit(step)

    async def _collect(self, pipeline: EnginePipeline) -> None:
        while True:
            result = await pipeline.receive()
            returned_ns = now_ns()
            outputs = self._scheduler.on_result(result)
            self._changed.set()
            if outputs:
                self._recovery.record_token()
                self._send(Outputs(outputs=outputs))
            self._watch.step_returned(result, outputs, returned_ns)

    async def _ask_for_tiers(self, pipeline: EnginePipeline) -> None:
        while True:
            await asyncio.sleep(INVENTORY_SECONDS)
            await self._tiers.refresh(pipeline)

    def _add_request(self, request: AddRequest) -> None:
        try:
            self._scheduler.add_request(request)
        except RequestError as error:
            self._send(Outputs(outputs=[failed_output(request.request_id, error)]))
        else:
            self._watch.request_came(request.request_id)
            self._changed.set()

    def _reset_prefix_cache(self) -> PrefixCacheReset:
        try:
            self._tiers.reset()
        except OptionError as error:
            # A full disk, or one that is gone, does not end the requests that run.
            log.warning("what the directory keeps may be found again after the next start", error=str(error))
            return PrefixCacheReset(problem=str(error))
        log.info("the prefix cache was reset")
        return PrefixCacheReset()

    def _send_progress(self, progress: StageProgress) -> None:
        self._reports.roster.record_progress(progress)
        if not self._recovery.is_under_way:
            self._send(EngineState(phase="loading", progress=progress))

    def _fail(self, error: GalaxylineError) -> None:
        self._send(failed_state(error))
        outputs = self._scheduler.fail(error)
        self._send(Outputs(outputs=outputs))
        self._watch.pipeline_lost()
        self._watch.requests_ended(outputs)


class PipelineReports:
    """Makes reports from the state of scheduler, meters and stages. Nothing is looked at unless one is asked for."""

    def __init__(
        self,
        options: EngineOptions,
        scheduler: Scheduler,
        meters: EngineMeters,
        tiers: KVTiers,
        send: Callable[[FromEngine], None],
    ) -> None:
        self.roster = StageRoster(options.pipeline.specs)
        self._microbatches = options.scheduler.steps_in_flight
        self._scheduler = scheduler
        self._meters = meters
        self._tiers = tiers
        self._send = send
        self._owed = 0
        self._is_closed = False
        self._looking: asyncio.Task[None] | None = None

    def metrics(self) -> EngineMetrics:
        """The measurements of the engine and its stages."""
        scheduler = self._scheduler
        return self._meters.metrics(
            scheduler.counts(),
            scheduler.tallies,
            self._prefix(),
            self._scheduler.drafts.counts(),
            self.roster.hosts,
            self._tiers.stage_bytes,
        )

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
            preemptions=self._scheduler.tallies.preemptions,
            stages=self.roster.views(
                healths, self._meters.busy_share, counts.blocks - counts.free_blocks, self._tiers.stage_bytes
            ),
            prefix=self._prefix(),
            drafts=self._scheduler.drafts.counts(),
            sampling_fallbacks=self._meters.sampling_fallbacks,
        )
        while self._owed:
            self._owed -= 1
            self._send(report)

    def _prefix(self) -> PrefixCounts:
        tallies = self._scheduler.tallies
        return PrefixCounts(
            blocks=self._scheduler.cache.findable,
            queries=tallies.prefix_queries,
            hits=tallies.prefix_hits,
            recomputed_tokens=tallies.recomputed_tokens,
        )
