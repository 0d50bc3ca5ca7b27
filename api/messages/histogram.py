"""Histograms of measured values, in the form that Prometheus has them, and their bounds."""

from bisect import bisect_left
from collections.abc import Sequence

import msgspec

FIRST_TOKEN_BOUNDS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BOUNDS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY_BOUNDS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)
"""These three are the bounds of vLLM's histograms (its v1/metrics/loggers.py), so that its dashboards fit."""


class Histogram(msgspec.Struct, array_like=True):
    """A histogram: `counts[i]` values are at most `bounds[i]` and more than the bound before; the last count is of all
    above. `total` is the sum of the values.

    Prometheus' own class takes four times as long for a value (2 us), counts behind locks that one loop does not need,
    and cannot travel from process to process.
    """

    bounds: tuple[float, ...]
    counts: list[int]
    total: float = 0.0

    @classmethod
    def of(cls, bounds: Sequence[float]) -> "Histogram":
        """An empty histogram; `bounds` must rise."""
        return cls(bounds=tuple(bounds), counts=[0] * (len(bounds) + 1))

    def observe(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


def one_two_five(maximum: int) -> list[int]:
    """The numbers 1, 2, 5, 10, 20, 50, ... up to `maximum`, which are vLLM's bounds for counts of tokens."""
    bounds: list[int] = []
    power = 1
    while power <= maximum:
        bounds += [digit * power for digit in (1, 2, 5) if digit * power <= maximum]
        power *= 10
    return bounds
