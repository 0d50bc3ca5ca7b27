"""The scheduler's options: the shape of the pipeline and of its cache, and how steps share it."""

from typing import Annotated

import msgspec
from msgspec import Meta

from api.errors import OptionError
from stages.options import CacheOptions
from stages.plan import default_microbatches

DEFAULT_PREFILL_WAIT = 4.0
"""A prompt of 512 tokens takes as long as four decode steps of 32 users on the machines this was measured on."""


class ScheduleOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How many steps are in flight at once, and how prefills give way to decodes."""

    microbatches: (
        Annotated[
            int,
            Meta(
                ge=1,
                description="Steps in flight at once.",
                extra={"default": "one more than stages, or 1 for 1"},
            ),
        ]
        | None
    ) = None
    prefill_wait: Annotated[
        float,
        Meta(
            gt=0,
            description="Decode steps that a step of prompt tokens may take as long as where others decode, or so many "
            "times longer as those who wait outnumber them, up to 2 s; it has a block at least.",
        ),
    ] = DEFAULT_PREFILL_WAIT
    enable_prefix_caching: Annotated[
        bool, Meta(description="Begin a prompt with what is cached of it, from other requests or turns before.")
    ] = True
    always_draft: Annotated[
        bool, Meta(description="Verify drafts in every step, and not only as far as they are found to pay.")
    ] = False


class SchedulerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The pipeline as the scheduler sees it.

    At most `schedule.microbatches` steps are in flight: by default one for every stage and one more, so that no stage
    waits for the way back, and a single one where there is one stage. The cache's slots are shared evenly by the
    microbatches: slot = microbatch * slots_per_microbatch + lane. A prefill step holds at most `prefill_chunk` tokens;
    where it holds up requests that decode, it takes about as long as `schedule.prefill_wait` decode steps, unless it is
    a single block (see `PrefillBudget`). A request has up to `num_speculative_tokens` drafts in a decode step.
    Raises OptionError when these do not fit together.
    """

    stages: int
    cache: CacheOptions
    prefill_chunk: int
    schedule: ScheduleOptions = ScheduleOptions()
    num_speculative_tokens: int = 0

    def __post_init__(self) -> None:
        if self.stages < 1 or self.steps_in_flight < 1:
            raise OptionError(
                f"{self.stages} stages with {self.schedule.microbatches} microbatches: give at least one of each."
            )
        if self.cache.slots % self.steps_in_flight:
            raise OptionError(
                f"{self.cache.slots} slots cannot be shared evenly by {self.steps_in_flight} microbatches: choose a "
                f"multiple of {self.steps_in_flight} slots."
            )
        if self.prefill_chunk < self.cache.block_size or self.prefill_chunk % self.cache.block_size:
            raise OptionError(
                f"A prefill chunk of {self.prefill_chunk} tokens is not a multiple of the block size "
                f"{self.cache.block_size}."
            )

    @property
    def steps_in_flight(self) -> int:
        """The number of microbatches: how many steps may be in flight."""
        microbatches = self.schedule.microbatches
        return default_microbatches(self.stages) if microbatches is None else microbatches

    @property
    def slots_per_microbatch(self) -> int:
        """How many requests run in one microbatch at most."""
        return self.cache.slots // self.steps_in_flight
