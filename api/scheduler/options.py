"""What the scheduler is told: the shape of the pipeline and of its cache."""

import msgspec

from api.errors import OptionError
from stages.options import CacheOptions
from stages.plan import default_microbatches

DEFAULT_PREFILL_WAIT = 4.0
"""A prompt of 512 tokens takes as long as four decode steps of 32 users on the machines this was measured on."""


class SchedulerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The pipeline as the scheduler sees it.

    At most `microbatches` steps are in flight: by default one for every stage and one more, so that no stage waits
    for the way back, and a single one where there is one stage. The cache's slots are shared evenly by the
    microbatches: slot = microbatch * slots_per_microbatch + lane. A prefill step holds at most `prefill_chunk` tokens;
    where it holds up requests that decode, it takes no longer than `prefill_wait` decode steps, but for one block.
    Raises OptionError when these do not fit together.
    """

    stages: int
    cache: CacheOptions
    prefill_chunk: int
    microbatches: int | None = None
    prefill_wait: float = DEFAULT_PREFILL_WAIT

    def __post_init__(self) -> None:
        if self.stages < 1 or self.steps_in_flight < 1:
            raise OptionError(f"{self.stages} stages with {self.microbatches} microbatches: give at least one of each.")
        if self.cache.slots % self.steps_in_flight:
            raise OptionError(
                f"{self.cache.slots} slots cannot be shared evenly by {self.steps_in_flight} microbatches: choose a "
                f"multiple of {self.steps_in_flight} slots."
            )
        if self.prefill_chunk < self.cache.block_size or self.prefill_chunk % self.cache.block_size:
            raise OptionError(
                f"A prefill chunk of {self.prefill_chunk} tokens is no multiple of the block size "
                f"{self.cache.block_size}."
            )

    @property
    def steps_in_flight(self) -> int:
        """How many steps may be in flight: the number of microbatches."""
        return default_microbatches(self.stages) if self.microbatches is None else self.microbatches

    @property
    def slots_per_microbatch(self) -> int:
        """Requests that run in one microbatch at most."""
        return self.cache.slots // self.steps_in_flight
