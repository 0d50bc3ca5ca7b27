"""Durations of a stage's steps: given by the user, or predicted."""

import functools
from typing import Protocol

from stages.capacity.step_time import StageTimes
from stages.errors import PlanError
from stages.options import StageOptions
from stages.plan import StageSpec
from stages.step import Step
from stages.timed.options import GivenTimes, PredictedTimes
from weights.model_config import ModelConfig
from weights.sizes import ceil_div, round_up

CONTEXT_TOKENS = 64
"""Cached tokens are rounded up to a multiple of this, as predicting every length anew takes longer than a step may."""


class Durations(Protocol):
    """How long the steps of one stage take."""

    def seconds(self, step: Step) -> float:
        """The duration of `step` in seconds."""


class GivenDurations:
    """The same duration for every step, plus a given time for each token of a prompt."""

    def __init__(self, times: GivenTimes, stage: int) -> None:
        self._step_s = times.step_s[stage] if len(times.step_s) > 1 else times.step_s[0]
        self._prompt_token_s = times.prompt_token_s

    def seconds(self, step: Step) -> float:
        """See `Durations`."""
        if step.mode == "decode":
            return self._step_s
        return self._step_s + step.token_count * self._prompt_token_s


class PredictedDurations:
    """The durations of `StageTimes`, with users shared evenly by rows, and prompts one after the other."""

    def __init__(self, times: StageTimes, rows: int) -> None:
        self._rows = rows
        self._decode_s = functools.lru_cache(None)(lambda users, context: times.decode(users, context).total_s)
        self._prefill_s = functools.lru_cache(None)(lambda tokens, start: times.prefill(tokens, start).total_s)

    def seconds(self, step: Step) -> float:
        """See `Durations`."""
        if step.mode == "decode":
            context = max(segment.start for segment in step.segments) + 1
            return self._decode_s(ceil_div(len(step.segments), self._rows), round_up(context, CONTEXT_TOKENS))
        return sum(
            self._prefill_s(round_up(len(segment.tokens), CONTEXT_TOKENS // 2), segment.start)
            for segment in step.segments
        )


def durations(config: ModelConfig, spec: StageSpec, options: StageOptions) -> Durations:
    """The durations of a stage's steps. Raises PlanError if the options are not for the timed device."""
    timed = options.timed
    if timed is None:
        raise PlanError("The timed device was not told how long steps take.")
    if isinstance(timed.times, PredictedTimes):
        rows = timed.times.rows
        times = StageTimes(config, spec, rows, options.weights.weight_dtypes, traced=options.execution.enable_trace)
        return PredictedDurations(times, rows)
    timed.times.check(spec.stages)
    return GivenDurations(timed.times, spec.index)
