"""Trials of steps without drafts: few steps are sent for one, however many are in flight."""

import pytest

from api.scheduler.drafts import PLAIN_EVERY, PLAIN_STEPS, WARM_UP, BatchSize, DraftPolicy


def in_trial() -> BatchSize:
    """A size of batch that has drafted long enough to try without."""
    size = BatchSize()
    for _ in range(WARM_UP):
        assert size.next_drafts()
        size.step_done(pays=None, can_try=True)
    assert size.in_trial
    return size


@pytest.mark.parametrize("in_flight", [1, 17, 65])
def test_no_more_steps_do_without_drafts_than_are_counted(in_flight: int) -> None:
    size = in_trial()
    sent = [size.next_drafts() for _ in range(in_flight)]
    assert sent.count(False) == min(in_flight, PLAIN_STEPS)
    for _ in range(PLAIN_STEPS):
        assert not size.drafts
        size.step_done(pays=True, can_try=True)
    assert (size.drafts, size.in_trial, size.left) == (True, False, PLAIN_EVERY)
    assert size.next_drafts()


def test_a_trial_whose_steps_do_not_come_back_is_sent_anew() -> None:
    policy = DraftPolicy(1)
    size = policy._sizes[1] = in_trial()
    assert [size.next_drafts() for _ in range(PLAIN_STEPS + 1)] == [False] * PLAIN_STEPS + [True]
    policy.begin_epoch()
    assert not size.next_drafts()


def test_while_drafts_are_off_all_steps_do_without() -> None:
    size = in_trial()
    for _ in range(PLAIN_STEPS):
        size.step_done(pays=False, can_try=True)
    assert not size.is_on
    assert [size.next_drafts() for _ in range(20)] == [False] * 20
