"""How one stage's time is spent: computing, or waiting while the pipeline has work."""

from api.messages.engine import StageMetrics
from api.messages.histogram import Histogram
from stages.step import Mode, StageTiming

NS_PER_S = 1_000_000_000
NS = 1e-9

RECENT_SECONDS = 10
"""What "recent" means for the share of time that a stage computes."""

STEP_BOUNDS_S = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Bounds for everything that is measured of a step: from a hop within a host to a long prefill."""


class BusyWindow:
    """Time spent computing, by whole seconds of the clock, for the last RECENT_SECONDS of them."""

    def __init__(self) -> None:
        self._by_second: dict[int, int] = {}

    def add(self, began_ns: int, ended_ns: int) -> None:
        """Takes a step; none may begin before the former one ended."""
        by_second = self._by_second
        second = began_ns // NS_PER_S
        while began_ns < ended_ns:
            second_ends_ns = min(ended_ns, (second + 1) * NS_PER_S)
            by_second[second] = by_second.get(second, 0) + second_ends_ns - began_ns
            began_ns = second_ends_ns
            second += 1
        while len(by_second) > RECENT_SECONDS + 1:
            del by_second[next(iter(by_second))]

    def share(self, now_ns: int) -> float:
        """Share of the time since the beginning of the second RECENT_SECONDS ago, in [0, 1]."""
        first = now_ns // NS_PER_S - RECENT_SECONDS
        busy_ns = sum(busy_ns for second, busy_ns in self._by_second.items() if second >= first)
        return min(busy_ns / (now_ns - first * NS_PER_S), 1.0)


class StageMeter:
    """Adds up what the timings of all steps say of one stage.

    A bubble is time in which the pipeline has a step in flight and the stage computes none. Steps come back in the
    order in which every stage runs them, so that each one's timing tells of the wait before it: bubbles and busy
    time together are the time in which a step is in flight, whenever none is.

    Times of two hosts differ by their clocks; where that would make a time negative, it counts as 0.
    """

    def __init__(self) -> None:
        self.busy_ns = 0
        self.bubble_ns = 0
        self.step_times: dict[Mode, Histogram] = {
            "prefill": Histogram.of(STEP_BOUNDS_S),
            "decode": Histogram.of(STEP_BOUNDS_S),
        }
        self.hops = Histogram.of(STEP_BOUNDS_S)
        self.queues = Histogram.of(STEP_BOUNDS_S)
        self.recent = BusyWindow()
        self._waits_since_ns = 0

    def pipeline_fills(self, now_ns: int) -> None:
        """A step enters the pipeline, which was empty."""
        self._waits_since_ns = now_ns

    def step_done(self, mode: Mode, sent_ns: int, timing: StageTiming) -> None:
        """A step came back, which the stage before, or the engine, had sent off at `sent_ns`."""
        began_ns, ended_ns = timing.began_ns, timing.ended_ns
        self.hops.observe(max(timing.received_ns - sent_ns, 0) * NS)
        self.queues.observe((began_ns - timing.received_ns) * NS)
        self.step_times[mode].observe((ended_ns - began_ns) * NS)
        self.busy_ns += ended_ns - began_ns
        self.recent.add(began_ns, ended_ns)
        self.bubble_ns += max(began_ns - self._waits_since_ns, 0)
        self._waits_since_ns = ended_ns

    def pipeline_empties(self, now_ns: int) -> None:
        """The last step in flight is back."""
        self.bubble_ns += max(now_ns - self._waits_since_ns, 0)

    def metrics(self, stage: int, host: str, now_ns: int) -> StageMetrics:
        """The sums as they stand."""
        return StageMetrics(
            stage=stage,
            host=host,
            busy_seconds=self.busy_ns * NS,
            busy_share=self.recent.share(now_ns),
            bubble_seconds=self.bubble_ns * NS,
            prefill_steps=self.step_times["prefill"],
            decode_steps=self.step_times["decode"],
            hops=self.hops,
            queues=self.queues,
        )
