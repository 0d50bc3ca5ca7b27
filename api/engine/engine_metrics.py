"""What the engine measures: its requests' waits and its steps' ways through the stages. One pass for each step."""

from collections.abc import Sequence

from actors.clock import now_ns
from actors.errors import ProtocolError
from api.client.request_metrics import LATENCY_BOUNDS_S
from api.engine.stage_meter import NS, STEP_BOUNDS_S, StageMeter
from api.engine.step_record import StepRecord
from api.messages.engine import Counts, EngineMetrics
from api.messages.histogram import Histogram
from stages.step import Mode, StepResult


class EngineMeters:
    """Adds up, for the life of the engine; `metrics` gives the sums. Times are of `actors.clock.now_ns`."""

    def __init__(self, stages: int) -> None:
        self.stages = [StageMeter() for _ in range(stages)]
        self._queue_times = Histogram.of(LATENCY_BOUNDS_S)
        self._step_times: dict[Mode, Histogram] = {
            "prefill": Histogram.of(STEP_BOUNDS_S),
            "decode": Histogram.of(STEP_BOUNDS_S),
        }
        self._result_hops = Histogram.of(STEP_BOUNDS_S)
        self._recoveries = Histogram.of(LATENCY_BOUNDS_S)
        self._waiting_since_ns: dict[int, int] = {}
        self._inference_ns: dict[Mode, int] = {"prefill": 0, "decode": 0}
        self._returned_ns = 0

    def request_waits(self, request_id: int, came_ns: int) -> None:
        """A request has come."""
        self._waiting_since_ns[request_id] = came_ns

    def request_runs(self, request_id: int, admitted_ns: int) -> None:
        """A request has got a slot; only its first one counts."""
        since_ns = self._waiting_since_ns.pop(request_id, None)
        if since_ns is not None:
            self._queue_times.observe((admitted_ns - since_ns) * NS)

    def request_leaves(self, request_id: int) -> None:
        """A request has ended, perhaps before it got a slot."""
        self._waiting_since_ns.pop(request_id, None)

    def recovered(self, seconds: float) -> None:
        """The pipeline is back, so long after it failed."""
        self._recoveries.observe(seconds)

    def pipeline_fills(self, submitted_ns: int) -> None:
        """A step is submitted while none is in flight."""
        for meter in self.stages:
            meter.pipeline_fills(submitted_ns)

    def step_done(self, record: StepRecord, result: StepResult, returned_ns: int) -> None:
        """The oldest step in flight is back. Raises ProtocolError unless every stage has said its times."""
        if len(result.timings) != len(self.stages):
            raise ProtocolError(
                f"Step {result.step_id} came back with the times of {len(result.timings)} stages; there are "
                f"{len(self.stages)}."
            )
        mode = record.step.mode
        sent_ns = record.submitted_ns
        self._step_times[mode].observe((returned_ns - sent_ns) * NS)
        self._inference_ns[mode] += returned_ns - max(sent_ns, self._returned_ns)
        self._returned_ns = returned_ns
        for meter, timing in zip(self.stages, result.timings, strict=True):
            meter.step_done(mode, sent_ns, timing)
            sent_ns = timing.ended_ns
        self._result_hops.observe(max(returned_ns - sent_ns, 0) * NS)

    def pipeline_empties(self, returned_ns: int) -> None:
        """No step is in flight any more."""
        for meter in self.stages:
            meter.pipeline_empties(returned_ns)

    def busy_share(self, stage: int) -> float:
        """The share of the last seconds that a stage computed in."""
        return self.stages[stage].recent.share(now_ns())

    def metrics(self, counts: Counts, preemptions: int, hosts: Sequence[str]) -> EngineMetrics:
        """The sums as they stand; `hosts` says where each stage is."""
        asked_ns = now_ns()
        return EngineMetrics(
            counts=counts,
            preemptions=preemptions,
            prefill_seconds=self._inference_ns["prefill"] * NS,
            decode_seconds=self._inference_ns["decode"] * NS,
            queue_times=self._queue_times,
            prefill_steps=self._step_times["prefill"],
            decode_steps=self._step_times["decode"],
            result_hops=self._result_hops,
            recoveries=self._recoveries,
            stages=[
                meter.metrics(stage, host, asked_ns)
                for stage, (meter, host) in enumerate(zip(self.stages, hosts, strict=True))
            ],
        )
