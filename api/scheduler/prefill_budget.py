"""How many tokens a prefill step may hold, as measured, so that nobody waits for it longer than is stated."""

import math
from collections.abc import Callable, Sequence

from api.scheduler.options import SchedulerOptions
from stages.step import Mode, StageTiming

WEIGHT = 0.25
"""The share of the newest measurement in the average.

It is enough to follow a machine that becomes slower, and too little for one slow step of a busy machine to matter for
long."""

UNMEASURED_TOKENS = 256
"""The tokens of a step while nothing is known of what they take."""

SECONDS_MAX = 5.0
"""The longest that a prefill step is to take: a request that comes after it has begun waits for its end."""

STALL_SECONDS = 2.0
"""The longest that requests wait for their next token, however many others wait for their first one.

A step of `prefill_wait` decode steps may be longer, where decode steps are."""

FILL = 8
"""Steps that a burst of prompts is divided into for each stage after the first.

Until its first step has come to the last stage, some stages have nothing to do: an eighth of the time at most, then."""

DISTINCT = 0.05
"""The part of its length by which what the measured steps attended to has to differ from their tokens, taken as
vectors: below, the two cannot be told apart as causes."""


class PromptCost:
    """The time that prompts take: so much for each token, and for each pair of a token and one that it attends to.

    Both are fitted to the measured steps by least squares, of which the latest count most.
    """

    def __init__(self) -> None:
        self._tokens = self._pairs = self._both = self._tokens_ns = self._pairs_ns = 0.0

    def record(self, tokens: int, pairs: float, ns: int) -> None:
        """Takes in how long a step took."""
        kept = 1 - WEIGHT
        self._tokens = kept * self._tokens + tokens * tokens
        self._pairs = kept * self._pairs + pairs * pairs
        self._both = kept * self._both + tokens * pairs
        self._tokens_ns = kept * self._tokens_ns + tokens * ns
        self._pairs_ns = kept * self._pairs_ns + pairs * ns

    @property
    def is_known(self) -> bool:
        """Whether a step was measured."""
        return self._tokens > 0

    def ns(self, start: int, tokens: int) -> float:
        """The time of so many tokens, the first of which is at position `start`."""
        by_token, by_pair = self._fit()
        return by_token * tokens + by_pair * pairs(start, tokens)

    def within(self, ns: float, start: int) -> int:
        """The most tokens from position `start` on that take no longer than `ns`."""
        by_token, by_pair = self._fit()
        linear = by_token + by_pair * start
        if by_pair:
            return int((math.sqrt(linear * linear + 2 * by_pair * ns) - linear) / by_pair)
        return int(ns / linear)

    def _fit(self) -> tuple[float, float]:
        determinant = self._tokens * self._pairs - self._both * self._both
        if determinant > DISTINCT * self._tokens * self._pairs:
            by_token = (self._tokens_ns * self._pairs - self._pairs_ns * self._both) / determinant
            by_pair = (self._pairs_ns * self._tokens - self._tokens_ns * self._both) / determinant
            if by_token > 0 and by_pair > 0:
                return by_token, by_pair
        return self._tokens_ns / self._tokens, 0.0


def pairs(start: int, tokens: int) -> float:
    """Pairs of a token and one that it attends to, for so many tokens from position `start` on."""
    return tokens * (start + tokens / 2)


class StepBudget:
    """What is left of the tokens and of the time of one prefill step, `ns` where that is bounded and known."""

    def __init__(self, tokens: int, ns: float, cost: PromptCost, block_size: int) -> None:
        self._tokens = tokens
        self._ns = ns
        self._cost = cost
        self._block_size = block_size
        self.taken = 0
        self.pairs = 0.0

    @property
    def tokens(self) -> int:
        """The tokens that a prompt may begin with in this step: a block at least where it is the first."""
        return self._left(0)

    def take(self, start: int, remaining: int) -> int:
        """Takes the next chunk of a prompt, whose `remaining` tokens begin at position `start`; returns its tokens.

        Only the last chunk of a prompt may end within a block. The first chunk of a step has a block at least.
        """
        left = self._left(start)
        count = remaining if remaining <= left else left - left % self._block_size
        self.taken += count
        self.pairs += pairs(start, count)
        self._tokens -= count
        if self._cost.is_known:
            self._ns -= self._cost.ns(start, count)
        return count

    def _left(self, start: int) -> int:
        within = self._cost.within(max(self._ns, 0.0), start) if self._cost.is_known else self._tokens
        least = 0 if self.taken else self._block_size
        return min(max(within, least), self._tokens)


class PrefillBudget:
    """Measures what prompts and decode steps take, and bounds prefill steps by it.

    A step's time is that of its slowest stage, which all steps behind it wait for.
    """

    def __init__(self, options: SchedulerOptions) -> None:
        self._tokens_max = options.prefill_chunk
        self._block_size = options.cache.block_size
        self._wait = options.schedule.prefill_wait
        self._later_stages = options.stages - 1
        self._burst = self._left = 0
        self._decode_step_ns: float | None = None
        self._cost = PromptCost()

    def begin_step(self, decoding: int, waiting: int, waiting_tokens: Callable[[], int]) -> StepBudget:
        """The budget of a step while `decoding` requests decode and `waiting` have prompts to be computed.

        Where some decode, it is as long as `prefill_wait` decode steps, and longer by as much as those who wait
        outnumber them, up to STALL_SECONDS. Where none does, it has as many tokens as are allowed within SECONDS_MAX;
        several stages share a burst of prompts in steps that take equally long however long the context is.
        """
        if not self._cost.is_known:
            return self._budget(UNMEASURED_TOKENS, math.inf)
        if decoding and self._decode_step_ns is not None:
            allowed = self._wait * self._decode_step_ns
            longer = min(allowed * max(waiting / decoding, 1.0), max(STALL_SECONDS * 1e9, allowed))
            return self._budget(self._tokens_max, longer)
        if decoding:
            return self._budget(UNMEASURED_TOKENS, STALL_SECONDS * 1e9)
        return self._of_burst(waiting_tokens)

    def record_step(self, mode: Mode, tokens: int, attended: float, timings: Sequence[StageTiming]) -> None:
        """Takes in how long the stages worked on a step of so many tokens; empty `timings` change nothing.

        A prefill step has so many `attended` pairs of a token and one that it attends to.
        """
        slowest = max((timing.ended_ns - timing.began_ns for timing in timings), default=0)
        if slowest <= 0:
            return
        if mode == "prefill":
            self._cost.record(tokens, attended, slowest)
        elif mode == "decode":
            before = self._decode_step_ns
            self._decode_step_ns = slowest if before is None else before + WEIGHT * (slowest - before)

    def _of_burst(self, waiting_tokens: Callable[[], int]) -> StepBudget:
        longest = SECONDS_MAX * 1e9
        if not self._later_stages:
            return self._budget(self._tokens_max, longest)
        waiting = waiting_tokens()
        if waiting > self._left:
            # Otherwise it is divided as before, so that its steps do not become smaller with what is left of it.
            self._burst = waiting
        self._left = waiting
        tokens = min(max(self._burst // (FILL * self._later_stages), UNMEASURED_TOKENS), self._tokens_max)
        return self._budget(tokens, min(self._cost.ns(0, tokens), longest))

    def _budget(self, tokens: int, ns: float) -> StepBudget:
        # Whole blocks, of which one is always allowed.
        within = min(tokens, self._tokens_max)
        return StepBudget(within - within % self._block_size or self._block_size, ns, self._cost, self._block_size)
