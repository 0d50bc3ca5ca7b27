"""The engine's options, which the front end or the command line gives it at its start."""

from typing import Annotated

import msgspec
from msgspec import Meta

from actors.options import PipelineOptions
from api.scheduler.options import ScheduleOptions, SchedulerOptions
from stages.options import VocabularyOptions

DEFAULT_MAX_RESTARTS = 10
"""Enough to find the one request of 256 in a step that makes a stage fail: it fails twice with all others, seven times
with ever fewer, and once alone; the second time alone, it ends."""

PIPELINE_START = "actors.pipeline:Pipeline.start"


class RecoveryOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How often a pipeline that fails is brought back."""

    max_restarts: Annotated[
        int,
        Meta(
            ge=0,
            description="Failures in a row, with no token made in between, from which the pipeline is brought back.",
        ),
    ] = DEFAULT_MAX_RESTARTS


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the engine process needs; it travels over the engine's socket, never through argv.

    `prefill_chunk` and `schedule` are the scheduler's (see `SchedulerOptions`). `pipeline_start` is the import path
    "module:attribute" of an async function (PipelineOptions, on_progress) -> pipeline. `close_timeout_s` bounds how
    long stages get to end before the engine leaves without them. `timeline` is the file that a trace of all steps is
    written to.
    """

    pipeline: PipelineOptions
    prefill_chunk: int
    schedule: ScheduleOptions = ScheduleOptions()
    recovery: RecoveryOptions = RecoveryOptions()
    close_timeout_s: float = 30.0
    pipeline_start: str = PIPELINE_START
    timeline: str | None = None

    def with_vocabulary(self, vocabulary: VocabularyOptions | None) -> "EngineOptions":
        """The same options, with what the last stage needs for grammars."""
        stage = msgspec.structs.replace(self.pipeline.stage, vocabulary=vocabulary)
        return msgspec.structs.replace(self, pipeline=msgspec.structs.replace(self.pipeline, stage=stage))

    @property
    def scheduler(self) -> SchedulerOptions:
        """The scheduler's options. Raises OptionError as SchedulerOptions does."""
        return SchedulerOptions(
            stages=len(self.pipeline.specs),
            cache=self.pipeline.stage.cache,
            prefill_chunk=self.prefill_chunk,
            schedule=self.schedule,
            num_speculative_tokens=self.pipeline.stage.drafts.num_speculative_tokens,
        )
