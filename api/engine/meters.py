"""The engine's measurements: how long requests wait, and how long each step takes in every stage."""

from collections.abc import Sequence
from dataclasses import dataclass

from actors.clock import now_ns
from actors.errors import ProtocolError
from api.messages.engine import Counts, DraftCounts, EngineMetrics, PrefixCounts, RequestOutput, StageMetrics
from api.messages.histogram import LATENCY_BOUNDS_S, Histogram
from api.messages.pipeline_view import TierBytes
from api.scheduler.sequence import Tallies
from stages.step import MODES, Mode, StageTiming, Step, StepResult

NS_PER_S = 1_000_000_000
NS = 1e-9
"""One nanosecond in seconds."""

RECENT_SECONDS = 10
"""The length of the window in which the share of time that a stage computes is measured."""

STEP_BOUNDS_S = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""The bounds for everything that is measured of a step: from a hop within a host to a long prefill."""


STEP_TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""vLLM's bounds for the tokens of a step."""


def _by_mode() -> dict[Mode, Histogram]:
    return {mode: Histogram.of(STEP_BOUNDS_S) for mode in MODES}


@dataclass(slots=True)
class RequestTimes:
    """When a request got its slot, its first token and its latest one; 0 before."""

    admitted_ns: int
    first_ns: int = 0
    last_ns: int = 0


@dataclass(slots=True, frozen=True)
class StepRecord:
    """A step, when the engine submitted it (`actors.clock.now_ns`), and the requests whose tokens it holds.

    `request_ids` are in the order of the step's segments, and empty where neither trace nor log needs them.
    """

    step: Step
    submitted_ns: int
    request_ids: list[int]


class BusyWindow:
    """The time spent computing in each of the last RECENT_SECONDS whole seconds of the clock."""

    def __init__(self) -> None:
        self._by_second: dict[int, int] = {}

    def add_step(self, began_ns: int, ended_ns: int) -> None:
        """Adds the time of a step; none may begin before the former one ended."""
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
        """The share of time spent computing, in [0, 1], since the beginning of the second RECENT_SECONDS ago."""
        first = now_ns // NS_PER_S - RECENT_SECONDS
        busy_ns = sum(busy_ns for second, busy_ns in self._by_second.items() if second >= first)
        return min(busy_ns / (now_ns - first * NS_PER_S), 1.0)


class StageMeter:
    """Adds up the times of all steps in one stage.

    A bubble is time in which the pipeline has a step in flight and the stage computes none. Steps come back in the
    order in which every stage runs them, so the timing of each gives the wait before it. Whenever no step is in flight,
    bubbles and busy time together are the time in which one was.

    Times of two hosts differ by their clocks; where that would make a time negative, it counts as 0.
    """

    def __init__(self) -> None:
        self.busy_ns = 0
        self.bubble_ns = 0
        self.sampling_ns = 0
        self.cpu_ns = 0
        self.sampling_cpu_ns = 0
        self.step_times = _by_mode()
        self.hops = Histogram.of(STEP_BOUNDS_S)
        self.queues = Histogram.of(STEP_BOUNDS_S)
        self.recent = BusyWindow()
        self._waits_since_ns = 0

    def pipeline_fills(self, now_ns: int) -> None:
        """Notes that a step enters the pipeline, which was empty."""
        self._waits_since_ns = now_ns

    def step_done(self, mode: Mode, sent_ns: int, timing: StageTiming) -> None:
        """Adds a step that came back; the stage before, or the engine, had sent it to this stage at `sent_ns`."""
        began_ns, ended_ns = timing.began_ns, timing.ended_ns
        self.hops.observe(max(timing.received_ns - sent_ns, 0) * NS)
        self.queues.observe((began_ns - timing.received_ns) * NS)
        self.step_times[mode].observe((ended_ns - began_ns) * NS)
        self.busy_ns += ended_ns - began_ns
        self.sampling_ns += timing.left_ns - ended_ns
        self.cpu_ns += timing.cpu_ns
        self.sampling_cpu_ns += timing.sampling_cpu_ns
        self.recent.add_step(began_ns, ended_ns)
        self.bubble_ns += max(began_ns - self._waits_since_ns, 0)
        self._waits_since_ns = ended_ns

    def pipeline_empties(self, now_ns: int) -> None:
        """Notes that the last step in flight is back."""
        self.bubble_ns += max(now_ns - self._waits_since_ns, 0)

    def metrics(self, stage: int, host: str, tier: TierBytes, now_ns: int) -> StageMetrics:
        """The sums so far, and what the stage keeps beside its device."""
        return StageMetrics(
            stage=stage,
            host=host,
            busy_seconds=self.busy_ns * NS,
            busy_share=self.recent.share(now_ns),
            bubble_seconds=self.bubble_ns * NS,
            sampling_seconds=self.sampling_ns * NS,
            cpu_seconds=self.cpu_ns * NS,
            sampling_cpu_seconds=self.sampling_cpu_ns * NS,
            steps=self.step_times,
            hops=self.hops,
            queues=self.queues,
            host_tier_bytes=tier.host,
            disk_tier_bytes=tier.disk,
        )


class EngineMeters:
    """Adds up times for the life of the engine; `metrics` gives the sums. The clock is `actors.clock.now_ns`."""

    def __init__(self, stages: int) -> None:
        self.stages = [StageMeter() for _ in range(stages)]
        self._queue_times = Histogram.of(LATENCY_BOUNDS_S)
        self._step_times = _by_mode()
        self._result_hops = Histogram.of(STEP_BOUNDS_S)
        self._recoveries = Histogram.of(LATENCY_BOUNDS_S)
        self._prefill_times = Histogram.of(LATENCY_BOUNDS_S)
        self._decode_times = Histogram.of(LATENCY_BOUNDS_S)
        self._inference_times = Histogram.of(LATENCY_BOUNDS_S)
        self._step_tokens = Histogram.of(STEP_TOKEN_BOUNDS)
        self._waiting_since_ns: dict[int, int] = {}
        self._running: dict[int, RequestTimes] = {}
        self._inference_ns: dict[Mode, int] = dict.fromkeys(MODES, 0)
        self._returned_ns = 0
        self.sampling_fallbacks = 0

    def request_waits(self, request_id: int, came_ns: int) -> None:
        """Notes that a request has come."""
        self._waiting_since_ns[request_id] = came_ns

    def request_runs(self, request_id: int, admitted_ns: int) -> None:
        """Notes that a request has got a slot; only its first one counts."""
        since_ns = self._waiting_since_ns.pop(request_id, None)
        if since_ns is not None:
            self._queue_times.observe((admitted_ns - since_ns) * NS)
            self._running[request_id] = RequestTimes(admitted_ns)

    def outputs_came(self, outputs: Sequence[RequestOutput], came_ns: int) -> None:
        """Notes what a step gave to requests, and the ends among it."""
        for output in outputs:
            times = self._running.get(output.request_id)
            if times is not None and (output.tokens or output.finish_reason == "length"):
                times.first_ns = times.first_ns or came_ns
                times.last_ns = came_ns
            if output.finish_reason is not None:
                self.request_leaves(output.request_id)

    def request_leaves(self, request_id: int) -> None:
        """Notes that a request has ended, perhaps before it got a slot."""
        self._waiting_since_ns.pop(request_id, None)
        times = self._running.pop(request_id, None)
        if times is not None and times.first_ns:
            self._prefill_times.observe((times.first_ns - times.admitted_ns) * NS)
            self._decode_times.observe((times.last_ns - times.first_ns) * NS)
            self._inference_times.observe((times.last_ns - times.admitted_ns) * NS)

    def recovered(self, seconds: float) -> None:
        """Adds the time that it took to bring the pipeline back."""
        self._recoveries.observe(seconds)

    def pipeline_fills(self, submitted_ns: int) -> None:
        """Notes that a step is submitted while none is in flight."""
        for meter in self.stages:
            meter.pipeline_fills(submitted_ns)

    def step_done(self, record: StepRecord, result: StepResult, returned_ns: int) -> None:
        """Adds the oldest step in flight, which is back. Raises ProtocolError if the times of a stage are missing."""
        if len(result.timings) != len(self.stages):
            raise ProtocolError(
                f"Step {result.step_id} came back with the times of {len(result.timings)} stages; there are "
                f"{len(self.stages)}."
            )
        mode = record.step.mode
        sent_ns = record.submitted_ns
        self._step_times[mode].observe((returned_ns - sent_ns) * NS)
        if mode == "prefill":
            self._step_tokens.observe(record.step.token_count)
        elif mode == "decode":
            # Not the drafts that were rejected, as vLLM counts.
            self._step_tokens.observe(len(result.tokens))
        self._inference_ns[mode] += returned_ns - max(sent_ns, self._returned_ns)
        self._returned_ns = returned_ns
        for meter, timing in zip(self.stages, result.timings, strict=True):
            meter.step_done(mode, sent_ns, timing)
            sent_ns = timing.left_ns
        self._result_hops.observe(max(returned_ns - sent_ns, 0) * NS)
        self.sampling_fallbacks += result.fallbacks

    def pipeline_empties(self, returned_ns: int) -> None:
        """Notes that no step is in flight any more."""
        for meter in self.stages:
            meter.pipeline_empties(returned_ns)

    def busy_share(self, stage: int) -> float:
        """The share of the last RECENT_SECONDS that a stage computed in."""
        return self.stages[stage].recent.share(now_ns())

    def metrics(
        self,
        counts: Counts,
        tallies: Tallies,
        prefix: PrefixCounts,
        drafts: DraftCounts,
        hosts: Sequence[str],
        tiers: Sequence[TierBytes],
    ) -> EngineMetrics:
        """The sums so far, with those of the scheduler; `hosts` and `tiers` have those of each stage."""
        asked_ns = now_ns()
        return EngineMetrics(
            counts=counts,
            preemptions=tallies.preemptions,
            non_finite_logits=tallies.non_finite_logits,
            grammar_failures=tallies.grammar_failures,
            sampling_fallbacks=self.sampling_fallbacks,
            prefill_seconds=self._inference_ns["prefill"] * NS,
            decode_seconds=self._inference_ns["decode"] * NS,
            queue_times=self._queue_times,
            steps=self._step_times,
            result_hops=self._result_hops,
            recoveries=self._recoveries,
            prefill_times=self._prefill_times,
            decode_times=self._decode_times,
            inference_times=self._inference_times,
            step_tokens=self._step_tokens,
            stages=[
                meter.metrics(stage, host, tier, asked_ns)
                for stage, (meter, host, tier) in enumerate(zip(self.stages, hosts, tiers, strict=True))
            ],
            prefix=prefix,
            drafts=drafts,
        )
