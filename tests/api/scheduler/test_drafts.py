"""When requests draft, and what that costs or brings in simulated time, beside always and never drafting."""

import itertools
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.messages.engine import AddRequest, DraftCounts
from api.scheduler.drafts import OFF_STEPS, PLAIN_STEPS, RETRY_STEPS, TRIAL_STEPS, BatchSize
from stages.step import Step
from tests.support.draft_line import Accuracy, DraftLine, StepTimes, drafts_asked, lanes
from tests.support.scheduling import request, scheduler_options

STEPS = 10_000
ANSWER = 200


def requests(answer: int = ANSWER, **changes: Any) -> Iterator[AddRequest]:
    """Requests without end, each with a first token of its own."""
    for number in itertools.count():
        made = request(number, [number, *range(1, 64)], answer)
        yield msgspec.structs.replace(made, **changes)


def line(drafts: int, times: StepTimes, accuracy: float | Accuracy, users: int = 1, stages: int = 1) -> DraftLine:
    in_flight = stages + 1 if stages > 1 else 1
    options = scheduler_options(
        stages=stages,
        slots=-(-users // in_flight) * in_flight,
        blocks=1 << 12,
        max_model_len=1 << 14,
        num_speculative_tokens=drafts,
        enable_prefix_caching=False,
    )
    if isinstance(accuracy, float):
        return DraftLine(options, times, lambda _request, _position: accuracy)
    return DraftLine(options, times, accuracy)


def seconds_per_token(drafts: int, times: StepTimes, accuracy: float, users: int, stages: int) -> float:
    made = line(drafts, times, accuracy, users, stages)
    made.run(requests(), users, STEPS)
    assert len(made.decode_steps) >= STEPS
    return made.seconds / made.tokens


def share_that_asks(steps: list[Step]) -> float:
    return sum(drafts_asked(step) > 0 for step in steps) / len(steps)


# What it costs, and what it brings


@pytest.mark.parametrize(
    ("drafts", "accuracy", "times", "users", "stages"),
    [
        (1, 0.0, StepTimes(fixed=1.0, draft=0.3), 1, 1),
        (1, 0.8, StepTimes(fixed=0.1, each=0.9, draft=0.3), 1, 4),
        (1, 0.0, StepTimes(fixed=1.0, draft=0.3), 8, 1),
        (1, 0.8, StepTimes(fixed=0.2, each=0.1, draft=0.5), 8, 1),
        pytest.param(3, 0.2, StepTimes(fixed=0.5, each=0.06, draft=0.2), 8, 1, marks=pytest.mark.slow),
        pytest.param(2, 0.5, StepTimes(fixed=0.1, each=0.14, draft=0.2), 32, 4, marks=pytest.mark.slow),
        pytest.param(1, 0.8, StepTimes(fixed=0.2, each=0.025, draft=0.6), 32, 1, marks=pytest.mark.slow),
    ],
)
def test_drafts_that_never_pay_cost_little(
    drafts: int, accuracy: float, times: StepTimes, users: int, stages: int
) -> None:
    """Over 10^4 steps, in which requests end and others begin."""
    without, with_drafts = (seconds_per_token(count, times, accuracy, users, stages) for count in (0, drafts))
    assert with_drafts < 1.03 * without


def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchSize, "step_done", lambda _self, _pays, **_others: None)
    monkeypatch.setattr(BatchSize, "ratio", lambda _self, _microbatches: None)


@pytest.mark.parametrize(
    ("drafts", "accuracy", "times", "users", "stages"),
    [
        (1, 0.8, StepTimes(fixed=1.0, draft=0.1), 1, 1),
        (1, 0.6, StepTimes(fixed=0.9, each=0.1, draft=0.3), 1, 4),
        pytest.param(2, 0.9, StepTimes(fixed=0.7, each=0.03, draft=0.1), 8, 1, marks=pytest.mark.slow),
        pytest.param(1, 0.8, StepTimes(fixed=0.8, each=0.03, draft=0.1), 32, 4, marks=pytest.mark.slow),
    ],
)
def test_drafts_that_pay_bring_what_always_drafting_brings(
    drafts: int, accuracy: float, times: StepTimes, users: int, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    without, with_drafts = (seconds_per_token(count, times, accuracy, users, stages) for count in (0, drafts))
    always(monkeypatch)
    best = seconds_per_token(drafts, times, accuracy, users, stages)
    assert best < 0.9 * without
    assert with_drafts < 1.02 * best


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 3),
    st.floats(0, 1),
    st.builds(StepTimes, fixed=st.just(1.0), each=st.floats(0, 0.2), draft=st.floats(0, 0.4)),
    st.sampled_from([(1, 1), (3, 1), (6, 2)]),
)
def test_answers_are_the_same_and_hardly_slower_than_the_better_of_two(
    drafts: int, accuracy: float, times: StepTimes, shape: tuple[int, int]
) -> None:
    lines = [line(count, times, accuracy, *shape) for count in (0, drafts)]
    for made in lines:
        made.run(itertools.islice(requests(), 20 * shape[0]), shape[0])
    without, with_drafts = lines
    assert without.answers == with_drafts.answers
    with pytest.MonkeyPatch.context() as patch:
        always(patch)
        best = line(drafts, times, accuracy, *shape)
        best.run(itertools.islice(requests(), 20 * shape[0]), shape[0])
    # Drafts that hardly pay may be taken for some that do not.
    assert with_drafts.seconds < 1.05 * without.seconds
    assert with_drafts.seconds < 1.2 * best.seconds


# Off and on


def test_a_batch_whose_drafts_do_not_pay_tries_again_after_twice_as_long_each_time() -> None:
    made = line(1, StepTimes(fixed=1.0, draft=0.5), 0.2)
    made.run(requests(), 1, STEPS)
    asks = [drafts_asked(step) > 0 for step in made.decode_steps]
    lengths = [(on, len(list(group))) for on, group in itertools.groupby(asks)]
    trials = [length for on, length in lengths[3:] if on]
    # The first steps without drafts only measure their time.
    gaps = [length for on, length in lengths[1:] if not on and length > PLAIN_STEPS]
    assert lengths[0][0]
    assert all(length <= TRIAL_STEPS + 1 for length in trials)
    assert 4 <= len(trials) <= 6
    # A trial waits for the next request, which uses the layer from its prompt on.
    for number, gap in enumerate(gaps[:-1]):
        assert OFF_STEPS << number <= gap <= (OFF_STEPS << number) + ANSWER
    assert not made.scheduler.drafts.counts().are_on


def test_drafts_that_begin_to_pay_are_switched_on_again() -> None:
    """The texts that are asked for become easier."""
    made = line(1, StepTimes(fixed=1.0, draft=0.4), lambda request, _position: 0.1 if request < 20 else 0.9)
    made.run(requests(), 1, STEPS)
    steps = made.decode_steps
    assert share_that_asks(steps[100:3000]) < 0.05
    assert share_that_asks(steps[-2000:]) > 0.9
    assert made.scheduler.drafts.counts().are_on


def test_drafts_that_cease_to_pay_are_switched_off_within_a_few_steps() -> None:
    hard = 4

    def accuracy(request: int, _position: int) -> float:
        return 0.9 if request < hard else 0.0

    made = line(1, StepTimes(fixed=1.0, draft=0.4), accuracy)
    made.run(requests(), 1, 2000)
    steps = made.decode_steps
    first = next(number for number, step in enumerate(steps) if len(made.answers[hard]) and is_of(made, step, hard))
    assert share_that_asks(steps[10:first]) > 0.9
    assert share_that_asks(steps[first + 60 :]) < 0.05


def is_of(made: DraftLine, step: Step, number: int) -> bool:
    """Whether a step comes after the prompt of a request that runs alone."""
    admitted = [other for other in made.steps if other.mode == "prefill"][number]
    return step.step_id > admitted.step_id


def test_a_few_requests_with_drafts_do_not_say_how_long_steps_with_many_take() -> None:
    """Their steps are hardly longer than those without drafts, and not worth it for all the others."""
    made = line(1, StepTimes(fixed=0.1, each=0.06, draft=0.15), 0.6, users=16)
    made.run(requests(), 16, 4000)
    off = [step for step in made.decode_steps[200:] if len(step.segments) == 16]
    assert share_that_asks(off) < 0.05


def test_times_that_were_taken_on_a_busy_machine_are_measured_again() -> None:
    """Steps with drafts took four times as long at first, and would pay since then."""

    class Busy(StepTimes):
        def __call__(self, step: Step) -> float:
            usual = super().__call__(step)
            return 4 * usual if step.step_id < 60 and drafts_asked(step) else usual

    made = line(1, Busy(fixed=1.0, draft=0.1), 0.8, users=8)
    made.run(requests(), 8, 2 * STEPS)
    assert share_that_asks(made.decode_steps[60:300]) < 0.1
    assert share_that_asks(made.decode_steps[-2000:]) > 0.9


def test_a_request_whose_drafts_do_not_pay_leaves_them_to_others_and_tries_one_now_and_then() -> None:
    made = line(
        1, StepTimes(fixed=1.0, each=0.02, draft=0.2), lambda request, _position: 0.0 if request == 2 else 0.9, users=4
    )
    made.run(itertools.islice(requests(1500), 4), 4)
    asked: dict[int, list[int]] = {slot: [] for slot in range(4)}
    for step in made.decode_steps[300:]:
        if len(step.segments) == 4:
            for segment in step.segments:
                asked[segment.slot].append(segment.drafts)
    shares = {slot: sum(counts) / len(counts) for slot, counts in asked.items()}
    hard = next(segment.slot for step in made.steps for segment in step.segments if segment.tokens[0] == 2)
    assert shares.pop(hard) == pytest.approx(1 / RETRY_STEPS, rel=0.3)
    assert min(shares.values()) > 0.9


# Which tokens are drafted


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.floats(0, 1), st.integers(1, 12), st.integers(1, 3))
def test_an_answers_last_token_and_what_follows_are_no_drafts(
    drafts: int, accuracy: float, answer: int, users: int
) -> None:
    made = line(drafts, StepTimes(), accuracy, users)
    made.run(itertools.islice(requests(answer), 3 * users), users)
    for step in made.steps:
        for segment in step.segments:
            end = segment.start + len(segment.tokens)
            assert end <= 64 + answer - 1
            assert segment.drafts <= min(drafts, max(64 + answer - 1 - end - 1, 0))
    assert {len(tokens) for tokens in made.answers.values()} == {answer}


def test_no_draft_stands_behind_a_token_that_ends_the_answer() -> None:
    plain = line(0, StepTimes(), 1.0)
    plain.run(itertools.islice(requests(), 1), 1)
    stop = plain.answers[0][40]
    made = line(3, StepTimes(draft=0.1), 1.0)
    made.run(itertools.islice(requests(stop_token_ids=[stop]), 1), 1)
    assert made.answers[0] == plain.answers[0][:41]
    assert any(lanes(step) == 4 for step in made.decode_steps)
    assert all(stop not in segment.tokens for step in made.decode_steps for segment in step.segments)


def test_forced_answers_draft_nothing() -> None:
    forced = [5, 6, 7] * 20
    made = line(2, StepTimes(draft=0.1), 0.9, users=2)
    first, second = itertools.islice(requests(60), 2)
    made.run(iter([msgspec.structs.replace(first, forced=forced), second]), 2)
    drafts = dict.fromkeys(range(2), 0)
    for step in made.steps:
        for segment in step.segments:
            drafts[segment.slot] += segment.drafts
    assert sorted(map(bool, drafts.values())) == [False, True]


def test_without_drafts_nothing_is_asked_or_counted() -> None:
    made = line(0, StepTimes(), 0.9, users=2)
    made.run(itertools.islice(requests(20), 3), 2)
    assert not any(drafts_asked(step) for step in made.steps)
    assert made.scheduler.drafts.counts() == DraftCounts()


@pytest.mark.parametrize("drafts", [1, 3])
def test_counts_are_those_of_the_steps(drafts: int) -> None:
    made = line(drafts, StepTimes(draft=0.1), 0.6, users=3)
    made.run(itertools.islice(requests(50), 9), 3)
    decodes = [(step, result) for step, result in zip(made.steps, made.results, strict=True) if step.mode == "decode"]
    sizes = [len(segment.tokens) - 1 for step, _ in decodes for segment in step.segments]
    accepted = [count for step, result in decodes for count in result.accepted or [0] * len(step.segments)]
    counts = made.scheduler.drafts.counts()
    assert counts.num_speculative_tokens == drafts
    assert counts.drafts == sum(map(bool, sizes))
    assert counts.draft_tokens == sum(sizes)
    assert counts.accepted_tokens == sum(accepted) > 0
    assert counts.accepted_per_position == [sum(count > place for count in accepted) for place in range(drafts)]
