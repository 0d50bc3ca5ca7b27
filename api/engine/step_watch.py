"""The record of every step from its submission to its result, for the metrics, the timeline and the log."""

import logging
from collections import deque
from collections.abc import Sequence

import structlog

from actors.clock import now_ns
from api.engine.meters import EngineMeters, StepRecord
from api.engine.timeline import Timeline
from api.messages.engine import RequestOutput
from api.scheduler.scheduler import Scheduler
from stages.step import Step, StepResult

log = structlog.get_logger()


class StepWatch:
    """Passes on what the engine does with requests and steps to meters, timeline and log.

    `timeline` may be set before the first step. Which requests a step holds is looked up only for the timeline, or
    where the log's level is "debug".
    """

    def __init__(self, scheduler: Scheduler, meters: EngineMeters) -> None:
        self.timeline: Timeline | None = None
        self._scheduler = scheduler
        self._meters = meters
        self._in_flight: deque[StepRecord] = deque()
        self._is_debugging = logging.getLogger(__name__).isEnabledFor(logging.DEBUG)

    def request_came(self, request_id: int) -> None:
        """Notes that the scheduler has queued a request."""
        self._meters.request_waits(request_id, now_ns())

    def request_aborted(self, request_id: int) -> None:
        """Notes that the front end aborted a request, which may have ended before."""
        self._meters.request_leaves(request_id)
        if self._is_debugging:
            log.debug("request aborted", request_id=request_id)

    def step_issued(self, step: Step) -> None:
        """Notes a step that is about to be submitted; call it before the scheduler gives the next one."""
        issued_ns = now_ns()
        request_ids: list[int] = []
        if step.admissions or self._is_debugging or self.timeline is not None:
            request_ids = self._scheduler.requests_in(step)
        if step.admissions:
            self._note_admissions(step, request_ids, issued_ns)
        if not self._in_flight:
            self._meters.pipeline_fills(issued_ns)
        self._in_flight.append(StepRecord(step, issued_ns, request_ids))
        if self._is_debugging:
            log.debug("step issued", step_id=step.step_id, mode=step.mode, request_ids=request_ids)

    def step_returned(self, result: StepResult, outputs: Sequence[RequestOutput], returned_ns: int) -> None:
        """Notes the oldest step's result, which came at `returned_ns`, and the `outputs` made of it."""
        if not self._in_flight or result.epoch != self._in_flight[0].step.epoch:
            return  # The step is of a former epoch, and was counted as lost.
        record = self._in_flight.popleft()
        self._meters.step_done(record, result, returned_ns)
        self._meters.outputs_came(outputs, returned_ns)
        for output in outputs:
            if output.finish_reason == "error":
                log.error("a request has no token", request_id=output.request_id, error=output.error)
        if not self._in_flight:
            self._meters.pipeline_empties(returned_ns)
        if self.timeline is not None:
            self.timeline.step_done(record, result.timings, returned_ns)
        if self._is_debugging:
            self.requests_ended(outputs)

    def requests_ended(self, outputs: Sequence[RequestOutput]) -> None:
        """Notes the ends of the requests whose last output is among these."""
        for output in outputs:
            if output.finish_reason is not None:
                self._meters.request_leaves(output.request_id)
                if self._is_debugging:
                    log.debug("request ended", request_id=output.request_id, reason=output.finish_reason)

    def pipeline_lost(self) -> None:
        """Notes that no result of the steps in flight will come."""
        if self.timeline is not None:
            for record in self._in_flight:
                self.timeline.step_lost(record, now_ns())
        self._in_flight.clear()

    def _note_admissions(self, step: Step, request_ids: list[int], issued_ns: int) -> None:
        by_slot = {segment.slot: request_id for segment, request_id in zip(step.segments, request_ids, strict=True)}
        for admission in step.admissions:
            request_id = by_slot[admission.slot]
            self._meters.request_runs(request_id, issued_ns)
            if self._is_debugging:
                log.debug("request admitted", request_id=request_id, slot=admission.slot, step_id=step.step_id)
