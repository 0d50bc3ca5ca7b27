"""How long a step may take before a stage is considered stuck."""

from actors.pipeline import RECENT_STEPS, StepDeadline

MOST_S = 600.0


def deadline_after(*took_s: float) -> StepDeadline:
    deadline = StepDeadline(MOST_S)
    for seconds in took_s:
        deadline.note(seconds)
    return deadline


def test_a_step_may_take_a_multiple_of_the_longest_of_the_last_ones() -> None:
    some = [0.2] * (RECENT_STEPS - 1)
    assert deadline_after(*some).allowed_s == MOST_S
    deadline = deadline_after(*some, 0.4)
    assert deadline.allowed_s == 20.0
    for _ in range(RECENT_STEPS - 1):
        deadline.note(0.3)
    assert deadline.allowed_s == 20.0
    deadline.note(0.3)
    assert deadline.allowed_s == 15.0
    deadline.forget()
    assert deadline.allowed_s == MOST_S


def test_a_step_may_take_five_seconds_where_steps_are_short_and_no_more_than_the_limit_where_they_are_long() -> None:
    assert deadline_after(*[0.001] * RECENT_STEPS).allowed_s == 5.0
    assert deadline_after(*[100.0] * RECENT_STEPS).allowed_s == MOST_S
