"""The clock that all processes of a pipeline read their time stamps from."""

import time

READINGS = 16


def _offset_ns() -> int:
    """How far the wall clock is ahead of the monotonic one, by the shortest reading: longer ones were interrupted."""
    readings = []
    for _ in range(READINGS):
        before = time.monotonic_ns()
        wall = time.time_ns()
        after = time.monotonic_ns()
        readings.append((after - before, wall - (before + after) // 2))
    return min(readings)[1]


_OFFSET_NS = _offset_ns()


def now_ns() -> int:
    """Returns nanoseconds since 1970 that never jump within a process.

    Stamps of two processes on one host agree to a few microseconds, as long as nobody sets its clock between their
    starts; those of two hosts agree as far as their clocks do.
    """
    return time.monotonic_ns() + _OFFSET_NS
