"""A scheduler joined to a stage without a model."""

from collections import deque

from api.messages.engine import RequestOutput
from api.scheduler.options import SchedulerOptions
from api.scheduler.scheduler import Scheduler
from stages.step import Step, StepResult
from tests.support.engine_fakes import FakeStage


class FakeLine:
    """A scheduler joined to a stage; results wait here until they are delivered."""

    def __init__(self, options: SchedulerOptions) -> None:
        self.options = options
        self.scheduler = Scheduler(options, epoch=0)
        self.stage = FakeStage(options.cache, options.prefill_chunk)
        self.results: deque[StepResult] = deque()
        self.steps: list[Step] = []

    def submit(self) -> Step | None:
        """Runs the scheduler's next step, if it has one."""
        step = self.scheduler.next_step()
        if step is not None:
            self.steps.append(step)
            self.results.append(self.stage.run(step))
        return step

    def deliver(self) -> list[RequestOutput]:
        """Hands the oldest result back."""
        return self.scheduler.on_result(self.results.popleft())

    def drain(self) -> dict[int, tuple[list[int], str]]:
        """Runs until nothing is in flight; returns every finished request's tokens and reason."""
        tokens: dict[int, list[int]] = {}
        ended: dict[int, tuple[list[int], str]] = {}
        while True:
            while self.submit():
                pass
            if not self.results:
                return ended
            for output in self.deliver():
                tokens.setdefault(output.request_id, []).extend(output.tokens)
                if output.finish_reason:
                    ended[output.request_id] = tokens[output.request_id], output.finish_reason

    def microbatch(self, slot: int) -> int:
        return slot // self.options.slots_per_microbatch
