"""The stage of the timed device, which waits in place of computing; scaling tests and capacity planning run on it."""

import bisect
import ctypes
import functools
import itertools
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
    """The same duration for every step, whatever its drafts, plus a given time for each token of a prompt."""

    def __init__(self, times: GivenTimes, stage: int) -> None:
        self._step_s = times.step_s[stage] if len(times.step_s) > 1 else times.step_s[0]
        self._prompt_token_s = times.prompt_token_s

    def seconds(self, step: Step) -> float:
        """See `Durations`."""
        if step.mode == "decode":
            return self._step_s
        return self._step_s + step.token_count * self._prompt_token_s


class PredictedDurations:
    """The durations of `StageTimes`, with users and drafts shared evenly by rows, and prompts one after the other."""

    def __init__(self, times: StageTimes, rows: int) -> None:
        self._rows = rows
        self._decode_s = functools.lru_cache(None)(
            lambda users, lanes, context, passes: times.decode_lanes(users, lanes, context, passes=passes).total_s
        )
        self._prefill_s = functools.lru_cache(None)(
            lambda tokens, start, drafts: times.prefill(tokens, start, drafts=drafts).total_s
        )

    def seconds(self, step: Step) -> float:
        """See `Durations`."""
        segments = step.segments
        if step.mode == "decode":
            context = max(segment.start for segment in segments) + 1
            return self._decode_s(
                ceil_div(len(segments), self._rows),
                ceil_div(step.token_count, self._rows),
                round_up(context, CONTEXT_TOKENS),
                max(segment.drafts for segment in segments),
            )
        return sum(
            self._prefill_s(round_up(len(segment.tokens), CONTEXT_TOKENS // 2), segment.start, _passes(segment))
            for segment in segments
        )


def _passes(segment: Segment) -> int:
    """How often a prompt's chunk passes the draft layer: once, but for the last chunk, behind which drafts are made."""
    return segment.drafts if segment.sample else min(segment.drafts, 1)


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

OTHER_MULTIPLIER, LAST_MULTIPLIER = 0x85EBCA6B, 0xC2B2AE35

"""The multipliers of MurmurHash3's finalizer."""

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

    def other(self, token: int) -> int:
        """A token that is not `token`, unless there is no other."""
        place = bisect.bisect_right(self._tokens, token)
        return self._tokens[place % len(self._tokens)]


class DraftMaker:
    """Makes drafts of which each is right with probability `acceptance`: the same ones for the same seed.

    It is drawn for each slot, as requests with equal tokens would be right and wrong together.
    """

    def __init__(self, tokens: TokenMaker, acceptance: float, seed: int) -> None:
        self._tokens = tokens
        self._bound = acceptance * (WORD + 1)
        self._seed = seed

    def after(self, slot: int, token: int, position: int, count: int) -> list[int]:
        """So many drafts of the tokens that follow `token` at `position` of the request in a slot."""
        drafts: list[int] = []
        for place in range(position, position + count):
            latest = drafts[-1] if drafts else token
            following = self._tokens.after(latest, place)
            is_right = draw(self._seed, slot, latest, place) < self._bound
            drafts.append(following if is_right else self._tokens.other(following))
        return drafts


def draw(*values: int) -> int:
    """A number below 2**32 that looks random, made of all `values` (MurmurHash3's finalizer after each)."""
    mixed = 0
    for value in values:
        mixed = ((mixed ^ value) + MULTIPLIER) & WORD
        mixed = ((mixed ^ (mixed >> 16)) * OTHER_MULTIPLIER) & WORD
        mixed = ((mixed ^ (mixed >> 13)) * LAST_MULTIPLIER) & WORD
        mixed ^= mixed >> 16
    return mixed


def certain(token: int) -> TokenLogprobs:
    """Log-probabilities of a token that is certain: its probability is 1, and no other is listed."""
    return TokenLogprobs(logprob=0.0, rank=1, top_tokens=[token], top_logprobs=[0.0])


class TimedStage:
    """A `StageRunner` that does everything but compute. Hidden states are zeros of the right length.

    Drafts are verified as on other devices: a token is what follows the one before it, whatever was drafted.
    """

    def __init__(
        self, spec: StageSpec, times: Durations, bytes_per_token: int, tokens: TokenMaker, drafts: DraftMaker
    ) -> None:
        self._spec = spec
        self._times = times
        self._bytes_per_token = bytes_per_token
        self._tokens = tokens
        self._drafts = drafts
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
        drafts = DraftMaker(tokens, options.timed.acceptance, options.seed)
        on_progress(len(spec.layers), len(spec.layers))
        return cls(spec, durations(config, spec, options), bytes_per_token, tokens, drafts)

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
        answers = [self._answer(step, segment) for segment in sampled]
        asked = [self._admitted[segment.slot].sampling.logprobs is not None for segment in sampled]
        logprobs = [
            certain(token) if asks else None for answer, asks in zip(answers, asked, strict=True) for token in answer
        ]
        has_drafts = step.mode == "decode" and any(len(segment.tokens) > 1 for segment in step.segments)
        wants_drafts = any(segment.drafts for segment in step.segments)
        return StepResult(
            epoch=step.epoch,
            step_id=step.step_id,
            tokens=list(itertools.chain.from_iterable(answers)),
            logprobs=logprobs if any(asked) else [],
            prompt_logprobs=[] if step.mode == "decode" else self._scores(step),
            accepted=[len(answer) - 1 for answer in answers] if has_drafts else [],
            drafts=[self._drafted(step, *pair) for pair in zip(sampled, answers, strict=True)] if wants_drafts else [],
        )

    def _answer(self, step: Step, segment: Segment) -> list[int]:
        """The token after a segment, behind those of its drafts that are right."""
        drafts = segment.tokens[1:] if step.mode == "decode" else []
        first = len(segment.tokens) - 1 - len(drafts)
        latest, answer = segment.tokens[first], []
        for place, draft in enumerate([*drafts, None], start=segment.start + first):
            latest = self._tokens.after(latest, place)
            answer.append(latest)
            if latest != draft:
                break
        return answer

    def _drafted(self, step: Step, segment: Segment, answer: list[int]) -> list[int]:
        """The drafts of what follows the `answer` to a segment."""
        behind = 1 if step.mode == "decode" else len(segment.tokens)
        position = segment.start + behind - 1 + len(answer)
        return self._drafts.after(segment.slot, answer[-1], position, segment.drafts)

    def _scores(self, step: Step) -> list[list[TokenLogprobs]]:
        """The log-probabilities of prompt tokens that the step scores, as in `StepResult`."""
        scores = []
        for segment in step.segments:
            admitted = self._admitted[segment.slot]
            if admitted.sampling.prompt_logprobs is not None:
                after = admitted.tokens[: admitted.prompt_tokens][segment.start + 1 :]
                scores.append([certain(token) for token in after[: len(segment.tokens)]])
        return scores
