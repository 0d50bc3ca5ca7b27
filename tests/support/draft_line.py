"""A scheduler joined to stages without a model that say how long steps take, for what its drafts cost and bring."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from api.messages.engine import AddRequest
from api.scheduler.options import SchedulerOptions
from api.scheduler.scheduler import Scheduler
from stages.step import Segment, StageTiming, Step, StepResult

VOCABULARY = 1 << 20

Accuracy = Callable[[int, int], float]
"""How likely the draft of a request is right at a position; a request is named by its prompt's first token."""

StepTime = Callable[[Step], float]
"""The seconds that each stage takes for a step."""


def lanes(step: Step) -> int:
    """The tokens of a decode step, drafts among them."""
    return sum(len(segment.tokens) for segment in step.segments)


def drafts_asked(step: Step) -> int:
    """The passes of the draft layer that a step asks for."""
    return max((segment.drafts for segment in step.segments), default=0)


@dataclass(frozen=True)
class StepTimes:
    """A step's time in each stage: a share that is always the same, one for each token, and one for a draft pass."""

    fixed: float = 1.0
    each: float = 0.0
    draft: float = 0.2

    def __call__(self, step: Step) -> float:
        """The time of a step; 64 tokens of a prompt take as long as one that decodes."""
        tokens = lanes(step) if step.mode == "decode" else step.token_count / 64
        return self.fixed + self.each * tokens + self.draft * drafts_asked(step)


class DraftLine:
    """Runs requests through a pipeline in simulated time.

    A token is a number made of the request and the position, so that answers are the same however they come about.
    """

    def __init__(self, options: SchedulerOptions, times: StepTime, accuracy: Accuracy) -> None:
        self.scheduler = Scheduler(options, epoch=0)
        self.steps: list[Step] = []
        self.results: list[StepResult] = []
        self.seconds = 0.0
        self.answers: dict[int, list[int]] = {}
        self._times = times
        self._accuracy = accuracy
        self._free = [0.0] * options.stages
        self._requests: dict[int, int] = {}
        self._in_flight: deque[tuple[float, StepResult]] = deque()

    def run(self, requests: Iterator[AddRequest], users: int, decode_steps: int = 1 << 60) -> None:
        """Runs requests, so many at a time, to their ends; begins no other after so many decode steps."""
        going, done = 0, 0
        while True:
            while going < users and done < decode_steps and (request := next(requests, None)):
                self.scheduler.add_request(request)
                self.answers[request.request_id] = []
                going += 1
            while step := self.scheduler.next_step():
                self._submit(step)
                done += step.mode == "decode"
            if not self._in_flight:
                return
            ended, result = self._in_flight.popleft()
            self.seconds = max(self.seconds, ended)
            for output in self.scheduler.on_result(result):
                self.answers[output.request_id] += output.tokens
                going -= output.finish_reason is not None

    @property
    def decode_steps(self) -> list[Step]:
        """The decode steps so far."""
        return [step for step in self.steps if step.mode == "decode"]

    @property
    def tokens(self) -> int:
        """The number of tokens of all answers."""
        return sum(len(answer) for answer in self.answers.values())

    def _submit(self, step: Step) -> None:
        self.steps.append(step)
        timings: list[StageTiming] = []
        now = self.seconds
        for stage, free in enumerate(self._free):
            began = max(now, free)
            now = self._free[stage] = began + self._times(step)
            times = [round(1e9 * at) for at in (began, began, now)]
            timings.append(StageTiming(received_ns=times[0], began_ns=times[1], ended_ns=times[2]))
        result = msgspec.structs.replace(self._compute(step), timings=timings)
        self.results.append(result)
        self._in_flight.append((now, result))

    def _compute(self, step: Step) -> StepResult:
        tokens: list[int] = []
        accepted: list[int] = []
        drafts: list[list[int]] = []
        for segment in step.segments:
            if segment.start == 0:
                self._requests[segment.slot] = segment.tokens[0]
            if segment.sample:
                answer = self._answer(segment, step.mode == "decode")
                tokens += answer
                accepted.append(len(answer) - 1)
                begin = segment.start + (0 if step.mode == "decode" else len(segment.tokens) - 1) + len(answer) + 1
                drafts.append([self._draft(segment.slot, begin + place) for place in range(segment.drafts)])
        has_drafts = step.mode == "decode" and lanes(step) > len(step.segments)
        return StepResult(
            epoch=step.epoch,
            step_id=step.step_id,
            tokens=tokens,
            accepted=accepted if has_drafts else [],
            drafts=drafts if any(drafts) else [],
        )

    def _answer(self, segment: Segment, decode: bool) -> list[int]:
        after = segment.start + (1 if decode else len(segment.tokens))
        answer = [self._token(segment.slot, after)]
        for draft in segment.tokens[1:] if decode else []:
            if draft != answer[-1]:
                break
            answer.append(self._token(segment.slot, after + len(answer)))
        return answer

    def _token(self, slot: int, position: int) -> int:
        return _number(self._requests[slot], position) % VOCABULARY

    def _draft(self, slot: int, position: int) -> int:
        request, token = self._requests[slot], self._token(slot, position)
        is_right = _number(request, position, 1) < self._accuracy(request, position) * 2**32
        return token if is_right else token + 1


def _number(*names: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=4).digest(), "little")
