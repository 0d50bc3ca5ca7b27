"""Requests that alone make a stage fail end, and no others do."""

import math
from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import PipelineError
from api.messages.engine import AddRequest, RequestOutput
from api.scheduler.quarantine import REPEATED, Quarantine
from api.scheduler.scheduler import Scheduler
from stages.step import Mode, StepResult
from tests.support.engine_fakes import PoisonedStage, PoisonedStepError, reference_answer
from tests.support.scheduling import nothing_in_use, request, scheduler_options

POISON = 6000
SENTENCE = "Stage 1 on host-a failed at step 9: DeviceError: no such address."
MODES: list[Mode] = ["prefill", "decode"]


@dataclass
class Company:
    """A scheduler whose pipeline is brought back after each failure, as the engine does it."""

    mode: Mode
    slots: int
    lost_results: st.DataObject
    failures: int = 0
    innocent_failures: int = 0
    epoch: int = 0
    tokens: dict[int, list[int]] = field(default_factory=dict)
    endings: dict[int, tuple[str, str | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.options = scheduler_options(stages=2, slots=self.slots, blocks=4 * self.slots, prefill_chunk=256)
        self.scheduler = Scheduler(self.options, epoch=0)
        self.results: deque[StepResult] = deque()
        self.stage = self.new_stage()

    def new_stage(self) -> PoisonedStage:
        return PoisonedStage(self.options.cache, self.options.prefill_chunk, POISON, self.mode)

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            assert output.request_id not in self.endings
            self.tokens.setdefault(output.request_id, []).extend(output.tokens)
            if output.finish_reason is not None:
                self.endings[output.request_id] = output.finish_reason, output.error

    def fail(self, step_id: int | None) -> None:
        """Fails the stage: some of the results on their way to the engine still arrive."""
        for _ in range(self.lost_results.draw(st.integers(0, len(self.results)), label="results that arrive")):
            self.take(self.scheduler.on_result(self.results.popleft()))
        self.results.clear()
        self.take(self.scheduler.on_failure(step_id, PipelineError(SENTENCE)))
        self.epoch += 1
        self.scheduler.reset(self.epoch)
        self.stage = self.new_stage()

    def run(self, results: float = math.inf) -> None:
        """Runs until nothing is left to do, or so many results have come."""
        while results > 0:
            self.fill()
            if not self.results:
                return
            results -= 1
            self.take(self.scheduler.on_result(self.results.popleft()))

    def fill(self) -> None:
        """Submits what there is to submit, in as many epochs as that takes."""
        while step := self.scheduler.next_step():
            try:
                self.results.append(self.stage.run(step))
            except PoisonedStepError:
                self.failures += 1
                self.fail(step.step_id)


def prompt_of(number: int, length: int, *, is_poisoned: bool) -> list[int]:
    prompt = request(number, length, 1).tokens
    return [*prompt[:-1], POISON] if is_poisoned else prompt


def has_its_answer(company: Company, asked: AddRequest) -> bool:
    answer = reference_answer(asked.tokens, asked.max_tokens, asked.stop_token_ids)
    reason, error = company.endings[asked.request_id]
    return (company.tokens[asked.request_id], reason, error) == (*answer, None)


@settings(max_examples=80, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=24),
    poisoned=st.sets(st.integers(0, 23), max_size=3),
    slots=st.sampled_from([3, 6, 24]),
    data=st.data(),
)
def test_poisoned_requests_end_with_the_reason_and_their_neighbours_with_their_answers(
    mode: Mode, lengths: list[int], poisoned: set[int], slots: int, data: st.DataObject
) -> None:
    company = Company(mode, slots, data)
    asked = [
        request(number, prompt_of(number, length, is_poisoned=number in poisoned), 20)
        for number, length in enumerate(lengths)
    ]
    for added in asked:
        company.scheduler.add_request(added)
    company.run()
    condemned = {added.request_id for added in asked if POISON in added.tokens}
    assert {request_id for request_id, (reason, _) in company.endings.items() if reason == "error"} == condemned
    assert all(company.endings[request_id] == ("error", SENTENCE) for request_id in condemned)
    assert all(has_its_answer(company, added) for added in asked if added.request_id not in condemned)
    # It fails twice with all others, then with half of them each time, then once more alone.
    assert company.failures <= len(condemned) * (REPEATED + math.ceil(math.log2(len(asked))) + REPEATED)
    assert company.scheduler.counts() == nothing_in_use(company.options)


@settings(max_examples=50, deadline=None)
@given(
    pauses=st.lists(st.integers(0, 40), max_size=12),
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=12),
    data=st.data(),
)
def test_failures_between_steps_are_nobodys_fault(pauses: list[int], lengths: list[int], data: st.DataObject) -> None:
    company = Company("decode", 6, data)
    asked = [request(number, length, 20) for number, length in enumerate(lengths)]
    for added in asked:
        company.scheduler.add_request(added)
    for pause in pauses:
        company.run(pause)
        company.fail(None)
    company.run()
    assert all(has_its_answer(company, added) for added in asked)
    assert company.scheduler.counts() == nothing_in_use(company.options)


def test_a_request_that_gets_on_between_two_failures_goes_free() -> None:
    company = Company("decode", 3, None)  # type: ignore[arg-type] # no results are on their way
    company.scheduler.add_request(asked := request(0, 10, 20))
    for _ in range(8):
        while step := company.scheduler.next_step():
            company.take(company.scheduler.on_result(company.stage.run(step)))
            if step.mode == "decode":
                break
        lone = company.scheduler.next_step()
        assert lone is not None
        company.take(company.scheduler.on_failure(lone.step_id, PipelineError(SENTENCE)))
        company.epoch += 1
        company.scheduler.reset(company.epoch)
        company.stage = company.new_stage()
    company.run()
    assert has_its_answer(company, asked)


@given(count=st.integers(1, 300), culprit=st.integers(0, 299), mode=st.sampled_from(MODES))
def test_halving_finds_one_among_many_and_the_default_limit_suffices(count: int, culprit: int, mode: Mode) -> None:
    quarantine = Quarantine()
    requests = list(range(count))
    guilty = culprit % count
    step = requests
    for _failures in range(1, 20):
        if quarantine.record_failure(step, mode) is not None:
            break
        assert guilty in step
        group = quarantine.group_of(guilty)
        for one in requests:
            if quarantine.group_of(one) != group:
                quarantine.release(one, mode)
        step = [one for one in requests if quarantine.group_of(one) == group]
    assert step == [guilty]
    assert _failures <= REPEATED + math.ceil(math.log2(count)) + 1


@dataclass(frozen=True)
class Past:
    """A step of these requests that came back, or failed."""

    members: frozenset[int]
    mode: Mode
    is_failure: bool


PASTS = st.lists(
    st.builds(
        Past,
        members=st.frozensets(st.integers(0, 5), min_size=1, max_size=4),
        mode=st.sampled_from(MODES),
        is_failure=st.booleans(),
    ),
    max_size=40,
)


def failures_in_a_row(past: list[Past], member: int) -> list[Past]:
    """The last failures of a request with no step between them that came back in the mode of the failure before it."""
    row: list[Past] = []
    for step in (step for step in past if member in step.members):
        if step.is_failure:
            row.append(step)
        elif row and row[-1].mode == step.mode:
            row = []
    return row


@given(past=PASTS)
def test_only_who_was_alone_in_two_failures_after_the_first_is_condemned(past: list[Past]) -> None:
    quarantine = Quarantine()
    for now, step in enumerate(past, start=1):
        if step.is_failure:
            condemned = quarantine.record_failure(sorted(step.members), step.mode)
            rows = {member: failures_in_a_row(past[:now], member) for member in step.members}
            alone = {member: sum(len(each.members) == 1 for each in row[1:]) for member, row in rows.items()}
            expected = [member for member in step.members if len(step.members) == 1 and alone[member] >= REPEATED]
            assert ([] if condemned is None else [condemned]) == expected
        else:
            for member in step.members:
                quarantine.release(member, step.mode)


@given(past=PASTS)
def test_requests_that_failed_twice_are_set_apart_in_halves_and_share_with_no_others(past: list[Past]) -> None:
    quarantine = Quarantine()
    for now, step in enumerate(past, start=1):
        for member in step.members:
            if not step.is_failure:
                quarantine.release(member, step.mode)
        if step.is_failure:
            quarantine.record_failure(sorted(step.members), step.mode)
            apart = {m for m in step.members if len(failures_in_a_row(past[:now], m)) >= REPEATED}
            assert {m for m in step.members if quarantine.group_of(m) is not None} == apart
            groups = [quarantine.group_of(member) for member in apart]
            sizes = sorted(groups.count(group) for group in set(groups))
            assert sum(sizes) == len(apart)
            assert len(sizes) == min(2, len(apart))
            assert not sizes or sizes[-1] - sizes[0] <= 1
            others = {quarantine.group_of(member) for member in range(6) if member not in step.members}
            assert not others & set(groups)
