"""How many tokens a prefill step may hold, as measured, so that the decode steps behind it do not wait long."""

from collections.abc import Sequence

from api.scheduler.options import SchedulerOptions
from stages.step import Mode, StageTiming

WEIGHT = 0.25
"""The share of the newest measurement in the average.

It is enough to follow a prompt whose later chunks take longer, and too little for one slow step of a busy machine to
matter for long."""


class PrefillBudget:
    """Measures how many prompt tokens take as long as `prefill_wait` decode steps.

    A step's time is that of its slowest stage, which all steps behind it wait for.
    """

    def __init__(self, options: SchedulerOptions) -> None:
        self._chunk_max = options.prefill_chunk
        self._block_size = options.cache.block_size
        self._wait = options.schedule.prefill_wait
        self._decode_step_ns: float | None = None
        self._prompt_token_ns: float | None = None

    @property
    def tokens(self) -> int:
        """The tokens that a prefill step may hold: whole blocks, at least one; all while nothing is measured."""
        if self._decode_step_ns is None or self._prompt_token_ns is None:
            return self._chunk_max
        within = int(self._wait * self._decode_step_ns / self._prompt_token_ns)
        return min(max(within - within % self._block_size, self._block_size), self._chunk_max)

    def chunk(self, remaining: int, budget: int) -> int:
        """The tokens of a prompt's next chunk within the budget: only its last chunk may end within a block."""
        return remaining if remaining <= budget else budget - budget % self._block_size

    def record_step(self, mode: Mode, tokens: int, timings: Sequence[StageTiming]) -> None:
        """Takes in how long the stages worked on a step of so many tokens; empty `timings` change nothing."""
        slowest = max((timing.ended_ns - timing.began_ns for timing in timings), default=0)
        if slowest <= 0:
            return
        if mode == "prefill":
            self._prompt_token_ns = _average(self._prompt_token_ns, slowest / tokens)
        elif mode == "decode":
            self._decode_step_ns = _average(self._decode_step_ns, slowest)


def _average(before: float | None, measured: float) -> float:
    return measured if before is None else before + WEIGHT * (measured - before)
