"""What the engine is told at its start, by the front end or the command line."""

import msgspec

from actors.options import PipelineOptions
from api.engine.recovery import DEFAULT_MAX_RESTARTS
from api.scheduler.options import DEFAULT_PREFILL_WAIT, SchedulerOptions

PIPELINE_START = "actors.pipeline:Pipeline.start"


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the engine process needs; it travels over the engine's socket, never through argv.

    `microbatches`, `prefill_chunk` and `prefill_wait` are the scheduler's (see `SchedulerOptions`). `pipeline_start`
    is the import path "module:attribute" of an async function (PipelineOptions, on_progress) -> pipeline.
    The pipeline is brought back up to `max_restarts` times in a row with no token made in between. `close_timeout_s`
    bounds how long stages get to end before the engine leaves without them. `timeline` is the file that a trace of all
    steps is written to.
    """

    pipeline: PipelineOptions
    prefill_chunk: int
    microbatches: int | None = None
    prefill_wait: float = DEFAULT_PREFILL_WAIT
    close_timeout_s: float = 30.0
    max_restarts: int = DEFAULT_MAX_RESTARTS
    pipeline_start: str = PIPELINE_START
    timeline: str | None = None

    @property
    def scheduler(self) -> SchedulerOptions:
        """The scheduler's part. Raises OptionError as SchedulerOptions does."""
        return SchedulerOptions(
            stages=len(self.pipeline.specs),
            cache=self.pipeline.stage.cache,
            prefill_chunk=self.prefill_chunk,
            microbatches=self.microbatches,
            prefill_wait=self.prefill_wait,
        )
