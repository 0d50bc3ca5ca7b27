"""A pipeline on a clock of its own, in which nothing but its stages takes time.

The scheduler is the real one, and so are the timed device's times, tokens and drafts; engine, actors and sockets are
not there. So it runs as fast as a processor can, and always the same.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import msgspec

from api.engine.options import EngineOptions
from api.messages.engine import AddRequest, RequestOutput
from api.scheduler.scheduler import Scheduler
from stages.options import GivenTimes, StageOptions
from stages.plan import StageSpec
from stages.step import StageTiming, Step, StepResult
from stages.timed.stage import TimedStage, durations
from weights.model_config import ModelConfig

NS = 1e-9


class Simulation:
    """The engine's scheduler over stages that take the timed device's times."""

    def __init__(self, options: EngineOptions, config: ModelConfig) -> None:
        pipeline = options.pipeline
        self.scheduler = Scheduler(options.scheduler, epoch=0)
        self._times = [durations(config, spec, pipeline.stage) for spec in pipeline.specs]
        self._last = _untimed(pipeline.specs[-1], pipeline.stage)
        self._free_ns = [0] * len(pipeline.specs)
        self._now_ns = 0
        self._returning: deque[tuple[int, StepResult]] = deque()

    def run(self, requests: Sequence[AddRequest]) -> Iterator[tuple[float, RequestOutput]]:
        """Runs requests that all come at once; yields their outputs, each with the seconds until it came."""
        for request in requests:
            self.scheduler.add_request(request)
        while True:
            while (step := self.scheduler.next_step()) is not None:
                self._send(step)
            if not self._returning:
                return
            self._now_ns, result = self._returning.popleft()
            for output in self.scheduler.on_result(result):
                yield self._now_ns * NS, output

    def _send(self, step: Step) -> None:
        """Sends a step through all stages: each begins once it has the step, and is done with those before."""
        result = self._last.step(step, memoryview(b""))
        if not isinstance(result, StepResult):
            raise TypeError("The last stage made no result.")
        at_ns, timings = self._now_ns, []
        for stage, times in enumerate(self._times):
            began_ns = max(at_ns, self._free_ns[stage])
            ended_ns = began_ns + round(times.seconds(step) / NS)
            timings.append(StageTiming(received_ns=at_ns, began_ns=began_ns, ended_ns=ended_ns))
            at_ns = self._free_ns[stage] = ended_ns
        self._returning.append((at_ns, msgspec.structs.replace(result, timings=timings)))


def _untimed(spec: StageSpec, options: StageOptions) -> TimedStage:
    """A stage that makes its results at once."""
    timed = options.timed
    if timed is not None:
        timed = msgspec.structs.replace(timed, times=GivenTimes(step_s=[0.0]))
    return TimedStage.load(spec, msgspec.structs.replace(options, timed=timed), lambda _, __: None)
