"""The average times of steps, by which drafts are found to pay or not, beside steps that take far too long."""

import pytest

from api.scheduler.drafts import Average, BatchSize
from stages.step import StageTiming

PLAIN_MS, DRAFTED_MS = 50, 60


def took(milliseconds: float) -> list[StageTiming]:
    return [StageTiming(received_ns=0, began_ns=0, ended_ns=int(milliseconds * 1e6))]


@pytest.mark.parametrize("outlier_ms", [500, 10_000, 600_000])
def test_one_step_that_takes_long_does_not_switch_drafts_off(outlier_ms: float) -> None:
    """A number of lanes may be new, and its trace be captured."""
    size = BatchSize()
    for step in range(2_000):
        usual = DRAFTED_MS if size.drafts else PLAIN_MS
        (size.drafted if size.drafts else size.plain).add(took(outlier_ms if step == 100 else usual))
        ratio = size.ratio(1)
        size.step_done(None if ratio is None else ratio <= 1.8, can_try=True)
        assert size.is_on


def test_steps_that_take_longer_from_now_on_are_believed_soon() -> None:
    average = Average()
    for _ in range(100):
        average.add(took(PLAIN_MS))
    for _ in range(60):
        average.add(took(10 * PLAIN_MS))
    assert average.interval_ns(1) == pytest.approx(10 * PLAIN_MS * 1e6, rel=0.05)


def test_the_first_step_does_not_count() -> None:
    average = Average()
    average.add(took(60_000))
    for _ in range(3):
        average.add(took(PLAIN_MS))
    assert average.interval_ns(1) == pytest.approx(PLAIN_MS * 1e6)
