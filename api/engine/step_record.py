"""A step on its way through the pipeline, as whoever watches it sees it."""

from dataclasses import dataclass

from stages.step import Step


@dataclass(slots=True, frozen=True)
class StepRecord:
    """A step, when the engine submitted it (`actors.clock.now_ns`), and the requests whose tokens it holds.

    `request_ids` are in the order of the step's segments, and empty where nobody asks for them.
    """

    step: Step
    submitted_ns: int
    request_ids: list[int]
