"""Which requests draft their next tokens, and when: as far as it pays, by what was measured.

A decode step with drafts takes longer than one without, and yields as many tokens more as drafts are right. Both times
are measured for each size of batch, and how many drafts are right for each request. A batch drafts as long as

    (1 + accepted drafts of a request and step) / (time with drafts) > 1 / (time without),

and a request of it only while the same holds for its own drafts. What is switched off is tried again: a batch after
OFF_STEPS of its steps, each time after twice as many, and a request after RETRY_STEPS. Requests that begin while their
batch does without drafts leave the draft layer out, until a trial is due. All take part in it, as its steps are to take
the time of others with drafts; how often drafts are right is said by those that had the layer from their prompt on.
"""

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass, field

from api.messages.engine import DraftCounts
from api.scheduler.sequence import PRIOR, Acceptance, Run
from api.scheduler.step_in_flight import StepInFlight
from stages.step import StageTiming, StepResult

WEIGHT = 0.1
"""The share of the newest step in an average of times: many steps, as single ones are noisy on shared machines."""

LONGEST = 2
"""So many times the average a step may take to count as it is. Longer ones capture a trace, or the machine had others
to run: a single one of seconds would switch drafts off for thousands of steps."""

WARM_UP = 8
"""Steps with drafts from which on their time counts, and after which a batch is tried without for the first time."""

PLAIN_STEPS = 4
PLAIN_EVERY = 512
"""How many steps without drafts measure their time, and how often: each costs a gap in the draft layer's cache."""

OFF_STEPS = 256
OFF_STEPS_MAX = 8192
TRIAL_STEPS = 16
"""Steps without drafts before they are tried again, doubled up to the most, and the steps of a trial."""

CLOSE = 0.05
"""Tokens of a request and step: what is known as closely as this is decided."""

RETRY_STEPS = 64
"""Steps after which a request whose drafts do not pay makes one again, by which it is judged anew."""


@dataclass(slots=True)
class Average:
    """An average of the seconds that all stages and the slowest one take for a step, in which new ones count more."""

    count: int = 0
    total_ns: float = 0.0
    slowest_ns: float = 0.0

    def add(self, timings: Collection[StageTiming]) -> None:
        """Takes in a step. The very first is left out, as it may have compiled what it ran."""
        stages = [timing.ended_ns - timing.began_ns for timing in timings]
        if self.count == 1:
            self.total_ns, self.slowest_ns = sum(stages), max(stages)
        elif self.count:
            share = max(WEIGHT, 1 / self.count)
            self.total_ns += share * (min(sum(stages), LONGEST * self.total_ns) - self.total_ns)
            self.slowest_ns += share * (min(max(stages), LONGEST * self.slowest_ns) - self.slowest_ns)
        self.count += 1

    def interval_ns(self, microbatches: int) -> float:
        """The time between a microbatch's steps: each passes all stages, and the slowest one runs all microbatches."""
        return max(self.total_ns, microbatches * self.slowest_ns)


@dataclass(slots=True)
class BatchSize:
    """What is known of decode steps of about as many requests, and which kind comes next.

    Another `left` steps come before the other kind is tried, or before its trial is over, in which so many were `sent`.
    """

    plain: Average = field(default_factory=Average)
    drafted: Average = field(default_factory=Average)
    is_on: bool = True
    in_trial: bool = False
    left: int = WARM_UP
    off_steps: int = OFF_STEPS
    sent: int = 0

    @property
    def drafts(self) -> bool:
        """Whether the steps that count now draft."""
        return self.is_on != self.in_trial

    def next_drafts(self) -> bool:
        """Whether the step that is sent now drafts."""
        if self.is_on and self.in_trial:
            # As many as are in flight would be sent before the first of them is back.
            self.sent += 1
            return self.sent > PLAIN_STEPS
        return self.drafts

    @property
    def is_due(self) -> bool:
        """Whether a trial waits for a request that drafts from its prompt on."""
        return not self.is_on and not self.in_trial and self.left <= 1

    def ratio(self, microbatches: int) -> float | None:
        """How much longer a step with drafts takes; None where one of the two was not measured."""
        if min(self.plain.count, self.drafted.count) <= 1:
            return None
        plain = self.plain.interval_ns(microbatches)
        return self.drafted.interval_ns(microbatches) / plain if plain else None

    def step_done(self, pays: bool | None, can_try: bool) -> None:
        """Goes on to the next step. It is known whether drafts pay, or None, and whether they can be tried."""
        self.left -= 1
        if self.is_on and not self.in_trial and pays is False:
            self._switch_off()
        elif self.left > 0:
            return
        elif self.in_trial and (pays is False or not (self.is_on or pays)):
            self._switch_off()
        elif self.in_trial:
            self._go_on()
        elif self.is_on or can_try:
            self.in_trial, self.sent, self.left = True, 0, PLAIN_STEPS if self.is_on else TRIAL_STEPS
        else:
            self.left = 1

    def _switch_off(self) -> None:
        self.is_on, self.in_trial, self.left = False, False, self.off_steps
        self.off_steps = min(2 * self.off_steps, OFF_STEPS_MAX)

    def _go_on(self) -> None:
        """Goes on with drafts; only where they pay for the second time are they not judged by a few requests alone."""
        if self.is_on:
            self.off_steps = OFF_STEPS
        self.is_on, self.in_trial, self.left = True, False, PLAIN_EVERY


class DraftPolicy:
    """Decides who drafts, and counts what came of it. It has no clock: the times of steps come with their results."""

    def __init__(self, tokens: int, *, always: bool = False) -> None:
        """`tokens` are the drafts that a request makes in a step; with 0 nobody makes any.

        `always`: all requests do in all steps, whether it pays or not.
        """
        self._tokens = tokens
        self._always = always
        self._sizes: dict[int, BatchSize] = {}
        self._all = Acceptance()
        self._latest = BatchSize()
        self._drafts = 0
        self._draft_tokens = 0
        self._accepted = [0] * tokens

    def counts(self) -> DraftCounts:
        """What drafts have come to, and whether batches as the latest one draft."""
        return DraftCounts(
            num_speculative_tokens=self._tokens,
            drafts=self._drafts,
            draft_tokens=self._draft_tokens,
            accepted_tokens=sum(self._accepted),
            accepted_per_position=self._accepted.copy(),
            are_on=self._tokens > 0 and (self._always or self._latest.is_on),
        )

    def begin_epoch(self) -> None:
        """Sends trials anew, as no step comes back that is in flight."""
        for size in self._sizes.values():
            size.sent = 0

    def begin(self, run: Run, users: int) -> None:
        """Decides whether a request that gets its slot, beside so many in its batch, uses the draft layer."""
        # What is forced is not what is sampled, by which drafts are judged.
        if run.sequence.forced or not self._wanted(run, 1):
            return
        size = self._size(users)
        run.drafting.is_possible = True
        run.drafting.from_prompt = self._always or size.is_on or size.is_due

    def in_prompt(self, run: Run, count: int) -> int:
        """The drafts that a chunk of `count` prompt tokens asks for."""
        if not run.drafting.from_prompt:
            run.drafting.without += count
            return 0
        return self._wanted(run, 1)

    def in_step(self, runs: Collection[Run]) -> bool:
        """Whether a decode step of these runs has drafts, and makes others."""
        if not self._tokens or not any(run.drafting.is_possible for run in runs):
            return False
        self._latest = self._size(len(runs))
        return self._always or self._latest.next_drafts()

    def wanted(self, run: Run, drafts: int, ratio: float | None) -> int:
        """The drafts that a run asks for in a step that has some of it, where such steps take `ratio` times as long."""
        drafting = run.drafting
        if not drafting.is_possible:
            return 0
        if ratio is not None and drafting.acceptance.steps >= PRIOR and 1 + self._mean([run]) < ratio:
            drafting.waited += 1
            if drafting.waited % RETRY_STEPS:
                return 0
        return self._wanted(run, 1 + drafts)

    def take(self, run: Run, drafts: list[int]) -> None:
        """Gives a run the drafts for its next step, as far as they are of use: none is behind one that ends it."""
        useful = itertools.takewhile(lambda token: token not in run.sequence.stop_token_ids, drafts)
        run.drafting.drafts = list(itertools.islice(useful, self._wanted(run, 0)))

    def step_returned(self, step: StepInFlight, result: StepResult, microbatches: int) -> None:
        """Takes in a decode step, where so many `microbatches` share the pipeline."""
        if not self._tokens:
            return
        size = self._size(len(step.sampled))
        had_drafts = any(step.drafts)
        if result.timings and had_drafts == step.asks:
            (size.drafted if had_drafts else size.plain).add(result.timings)
        for run, count, answer in zip(step.sampled, step.drafts, step.answers(result), strict=True):
            if count:
                self._note(run, count, len(answer.tokens) - 1)
            if not step.asks:
                run.drafting.without += 1
        if step.asks == size.drafts and not self._always:
            ready = [run for run in step.sampled if run.drafting.is_ready(len(run.sequence.tokens))]
            size.step_done(self._pay(ready, size.ratio(microbatches)), can_try=bool(ready))

    def ratio(self, users: int, microbatches: int) -> float | None:
        """How much longer a step of so many requests takes with drafts; None where that is not known, or no matter."""
        return None if self._always else self._size(users).ratio(microbatches)

    def _note(self, run: Run, count: int, right: int) -> None:
        self._drafts += 1
        self._draft_tokens += count
        for position in range(right):
            self._accepted[position] += 1
        run.drafting.acceptance.add(right)
        if run.drafting.is_ready(len(run.sequence.tokens)):
            self._all.add(right)

    def _pay(self, runs: Collection[Run], ratio: float | None) -> bool | None:
        """Whether the drafts of these runs pay; None where that is not certain."""
        if ratio is None or not runs or not self._all.steps:
            return None
        # The mean of n numbers between 0 and the tokens of a draft strays no further than that, mostly.
        count = max(self._all.steps, sum(run.drafting.acceptance.steps for run in runs))
        margin = self._tokens / 2 / math.sqrt(count)
        tokens = 1 + self._mean(runs)
        return None if abs(tokens - ratio) < margin and margin > CLOSE else tokens > ratio

    def _mean(self, runs: Collection[Run]) -> float:
        """The drafts that are right of a run and step."""
        return sum(run.drafting.acceptance.beside(self._all) for run in runs) / len(runs)

    def _wanted(self, run: Run, ahead: int) -> int:
        """The drafts that are of use `ahead` tokens further: the last token of an answer is never one."""
        return max(min(self._tokens, run.sequence.end - 1 - len(run.sequence.tokens) - ahead), 0)

    def _size(self, users: int) -> BatchSize:
        """Batches of 1, of 2 and 3, of 4 to 7 and so on are taken for alike."""
        return self._sizes.setdefault(users.bit_length(), BatchSize())
