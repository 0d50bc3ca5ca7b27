"""The stage of the timed device, which waits in place of computing; scaling tests and capacity planning run on it."""

import ctypes
import functools
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from stages.capacity.step_time import StageTimes
from stages.errors import PlanError
from stages.kv.inventory import Inventory
from stages.options import ITEM_BYTES, GivenTimes, PredictedTimes, StageOptions
from stages.plan import StageSpec
from stages.step import Admission, Segment, Step, StepResult, TokenLogprobs
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


PR_SET_TIMERSLACK = 29

"""linux/prctl.h: how late, in nanoseconds, the kernel may end a thread's sleep; 50 us unless told otherwise."""

RECENT = 32

"""Wake-ups that an alarm corrects itself by."""

MULTIPLIER = 0x9E3779B1

"""The prime next to 2**32 over the golden ratio, which scatters products over all bits (Knuth, TAOCP 3, 6.4)."""

OTHER_MULTIPLIER = 0x85EBCA6B

"""A multiplier of MurmurHash3's finalizer."""

WORD = 0xFFFFFFFF


class Alarm:
    """Waits that end on time, for the thread that creates the alarm.

    A thread wakes up some 0.1 ms late: the least delay of the latest RECENT wake-ups is taken off the next sleep, so
    that a wait ends on time if possible, and never early.
    """

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
        self._late_s: deque[float] = deque([0.0], maxlen=RECENT)
        self._ends_at = 0.0

    def set(self, seconds: float) -> None:
        """Starts a wait that ends in `seconds`."""
        self._ends_at = time.monotonic() + seconds

    def wait(self) -> None:
        """Returns at the end of the wait."""
        while (left := self._ends_at - time.monotonic()) > 0:
            asked = max(0.0, left - min(self._late_s))
            began = time.monotonic()
            time.sleep(asked)
            self._late_s.append(time.monotonic() - began - asked)


class TokenMaker:
    """Makes up token ids below `vocabulary`, except those of `never`."""

    def __init__(self, vocabulary: int, never: Sequence[int]) -> None:
        """Raises ValueError if `never` leaves no token."""
        absent = frozenset(never)
        self._tokens = array("I", (token for token in range(vocabulary) if token not in absent))
        if not self._tokens:
            raise ValueError(f"A vocabulary of {vocabulary} tokens leaves none but {len(absent)} that never come.")

    def after(self, token: int, position: int) -> int:
        """The token that follows `token` at `position`."""
        mixed = ((token + 1) * MULTIPLIER ^ (position + 1) * OTHER_MULTIPLIER) & WORD
        mixed = ((mixed ^ mixed >> 15) * MULTIPLIER) & WORD
        return self._tokens[(mixed >> 7) % len(self._tokens)]


def certain(token: int) -> TokenLogprobs:
    """Log-probabilities of a token that is certain: its probability is 1, and no other is listed."""
    return TokenLogprobs(logprob=0.0, rank=1, top_tokens=[token], top_logprobs=[0.0])


class TimedStage:
    """A `StageRunner` that does everything but compute. Hidden states are zeros of the right length."""

    def __init__(self, spec: StageSpec, times: Durations, bytes_per_token: int, tokens: TokenMaker) -> None:
        self._spec = spec
        self._times = times
        self._bytes_per_token = bytes_per_token
        self._tokens = tokens
        self._alarm = Alarm()
        self._zeros = memoryview(b"")
        self._admitted: dict[int, Admission] = {}

    @classmethod
    def load(cls, spec: StageSpec, options: StageOptions, on_progress: Callable[[int, int], None]) -> "TimedStage":
        """Loads a stage, for which it reads config.json alone. Raises CheckpointError or PlanError."""
        if options.timed is None:
            raise PlanError("The timed device was not told how long steps take.")
        config = ModelConfig.from_file(Path(options.model_path) / "config.json").changed(options.changes)
        bytes_per_token = config.hidden_size * ITEM_BYTES[options.dtype]
        tokens = TokenMaker(options.timed.vocabulary, options.timed.never)
        on_progress(len(spec.layers), len(spec.layers))
        return cls(spec, durations(config, spec, options), bytes_per_token, tokens)

    def step(self, step: Step, hidden: memoryview) -> memoryview | StepResult:
        """See `StageRunner`. Returns when the duration of the step is over."""
        self._alarm.set(self._times.seconds(step))
        output = self._output(step, hidden)
        self._alarm.wait()
        return output

    def load_blocks(self, step: Step) -> list[int]:
        """See `StageRunner`. Every block is there, as none holds anything."""
        return []

    def inventory(self, version: int) -> Inventory:
        """See `StageRunner`. It has no tiers."""
        return Inventory(version=version, is_whole=False, added=[], removed=[])

    def close(self) -> None:
        """See `StageRunner`. There is nothing to release."""

    def _output(self, step: Step, hidden: memoryview) -> memoryview | StepResult:
        if self._spec.is_last:
            return self._result(step)
        if not self._spec.is_first:
            return hidden
        length = step.token_count * self._bytes_per_token
        if length > len(self._zeros):
            self._zeros = memoryview(bytes(length))
        return self._zeros[:length]

    def _result(self, step: Step) -> StepResult:
        self._admitted.update((admission.slot, admission) for admission in step.admissions)
        sampled = [segment for segment in step.segments if segment.sample]
        tokens = [self._after(segment) for segment in sampled]
        asked = [self._admitted[segment.slot].sampling.logprobs is not None for segment in sampled]
        logprobs = [certain(token) if asks else None for token, asks in zip(tokens, asked, strict=True)]
        return StepResult(
            epoch=step.epoch,
            step_id=step.step_id,
            tokens=tokens,
            logprobs=logprobs if any(asked) else [],
            prompt_logprobs=[] if step.mode == "decode" else self._scores(step),
        )

    def _after(self, segment: Segment) -> int:
        return self._tokens.after(segment.tokens[-1], segment.start + len(segment.tokens) - 1)

    def _scores(self, step: Step) -> list[list[TokenLogprobs]]:
        """The log-probabilities of prompt tokens that the step scores, as in `StepResult`."""
        scores = []
        for segment in step.segments:
            admitted = self._admitted[segment.slot]
            if admitted.sampling.prompt_logprobs is not None:
                after = admitted.tokens[: admitted.prompt_tokens][segment.start + 1 :]
                scores.append([certain(token) for token in after[: len(segment.tokens)]])
        return scores
