"""Runs of steps through a pipeline whose times, in whole nanoseconds, are chosen by hypothesis."""

from dataclasses import dataclass

import msgspec
from hypothesis import strategies as st

from api.engine.meters import StepRecord
from stages.step import Mode, Segment, StageTiming, Step, StepResult

EPOCH = 3


@dataclass(frozen=True)
class Flow:
    """All steps of a run in order, each with its result and the time at which the result came."""

    stages: int
    transfers: list[tuple[StepRecord, StepResult, int]]

    @property
    def events(self) -> list[tuple[int, int, bool]]:
        """(time, index in `transfers`, whether the step comes back), in the order in which the engine sees them."""
        sent = [(record.submitted_ns, place, False) for place, (record, _, _) in enumerate(self.transfers)]
        returned = [(returned_ns, place, True) for place, (_, _, returned_ns) in enumerate(self.transfers)]
        # A step that comes back makes room for the next one, so it comes first if the times are equal.
        return sorted(sent + returned, key=lambda event: (event[0], not event[2], event[1]))


def step_of(step_id: int, mode: Mode, tokens: int) -> Step:
    """Makes a step with one segment for every token."""
    segments = [Segment(slot=slot, start=0, tokens=[1], new_blocks=[], sample=True) for slot in range(tokens)]
    return Step(epoch=EPOCH, step_id=step_id, mode=mode, segments=segments, admissions=[], ended=[])


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    """Runs of steps of a pipeline.

    Stages run one step at a time, in order; results come in order, and at most as many steps as microbatches are in
    flight."""
    stages = draw(st.integers(1, 4))
    microbatches = draw(st.integers(1, 4))
    duration = st.integers(0, 30)
    free_ns = [0] * stages
    submitted_ns = 100
    transfers: list[tuple[StepRecord, StepResult, int]] = []
    for step_id in range(draw(st.integers(1, 12))):
        submitted_ns += draw(duration)
        if step_id >= microbatches:
            submitted_ns = max(submitted_ns, transfers[step_id - microbatches][2])
        sent_ns = submitted_ns
        timings = []
        for stage in range(stages):
            received_ns = sent_ns + draw(duration)
            began_ns = max(received_ns, free_ns[stage])
            sent_ns = free_ns[stage] = began_ns + draw(st.integers(1, 30))
            cpu_ns = draw(st.integers(0, sent_ns - began_ns))
            timings.append(StageTiming(received_ns=received_ns, began_ns=began_ns, ended_ns=sent_ns, cpu_ns=cpu_ns))
        if draw(st.booleans()):
            sampled_ns = sent_ns + draw(duration)
            sampling_cpu_ns = draw(st.integers(0, sampled_ns - sent_ns))
            timings[-1] = msgspec.structs.replace(timings[-1], sampled_ns=sampled_ns, sampling_cpu_ns=sampling_cpu_ns)
            sent_ns = sampled_ns
        returned_ns = max(sent_ns + draw(duration), transfers[-1][2] if transfers else 0)
        step = step_of(step_id, draw(st.sampled_from(["prefill", "decode"])), draw(st.integers(1, 3)))
        result = StepResult(epoch=EPOCH, step_id=step_id, tokens=[], timings=timings, fallbacks=draw(st.integers(0, 2)))
        transfers.append((StepRecord(step, submitted_ns, [step_id]), result, returned_ns))
    return Flow(stages, transfers)
