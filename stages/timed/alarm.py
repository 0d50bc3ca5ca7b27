"""Waiting until a moment, as exactly as a thread can without keeping others from running."""

import ctypes
import time
from collections import deque

PR_SET_TIMERSLACK = 29
"""linux/prctl.h: how late, in nanoseconds, the kernel may end a thread's sleep; 50 us unless told otherwise."""
RECENT = 32


class Alarm:
    """For the thread that makes it.

    A thread wakes some 0.1 ms after it wanted to: what the latest wake-ups were late by at least is taken off the next
    sleep, so that a wait ends on time at best, and never before.
    """

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
        self._late_s: deque[float] = deque([0.0], maxlen=RECENT)
        self._ends_at = 0.0

    def set(self, seconds: float) -> None:
        """The wait is to end so long after this moment."""
        self._ends_at = time.monotonic() + seconds

    def wait(self) -> None:
        """Returns when the time is over."""
        while (left := self._ends_at - time.monotonic()) > 0:
            asked = max(0.0, left - min(self._late_s))
            began = time.monotonic()
            time.sleep(asked)
            self._late_s.append(time.monotonic() - began - asked)
