"""The clock that all processes of a pipeline stamp their times with."""

import time

_OFFSET_NS = time.time_ns() - time.monotonic_ns()


def now_ns() -> int:
    """Nanoseconds since 1970 that never jump within a process.

    Stamps of two processes on one host compare to a few microseconds, those of two hosts as far as their clocks agree.
    """
    return time.monotonic_ns() + _OFFSET_NS
