"""Alarms end on time: as little late as possible, and never early."""

import time

from stages.timed.stage import RECENT, Alarm


def test_no_wait_ends_early() -> None:
    alarm = Alarm()
    for _ in range(2 * RECENT):
        began = time.monotonic()
        alarm.set(0.002)
        alarm.wait()
        assert time.monotonic() - began >= 0.002


def test_what_takes_longer_than_the_time_is_not_waited_for() -> None:
    alarm = Alarm()
    alarm.set(0.0)
    time.sleep(0.001)
    before = alarm._late_s.copy()
    alarm.wait()
    assert alarm._late_s == before
