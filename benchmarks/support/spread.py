"""The spread of a figure over several turns."""

import statistics
from collections.abc import Sequence

import msgspec


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """The median of some measurements, and the quartiles between which the middle half of them lies."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(median=values[0], low=values[0], high=values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=median, low=low, high=high)

    def scaled(self, factor: float) -> "Spread":
        """The spread in another unit: all values times `factor`."""
        return Spread(median=self.median * factor, low=self.low * factor, high=self.high * factor)

    def __str__(self) -> str:
        return f"{_digits(self.median)} ({_digits(self.low)} .. {_digits(self.high)})"


def ratios(values: Sequence[float], others: Sequence[float]) -> Spread:
    """The spread of the ratios of each value to the other one of its turn."""
    return Spread.of([value / other for value, other in zip(values, others, strict=True)])


def _digits(value: float) -> str:
    """Formats three significant digits, or all before the point."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
