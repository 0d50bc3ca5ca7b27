"""What a stage makes of a step, which on the last one may be a result whose tokens are still to be drawn."""

from collections.abc import Callable
from dataclasses import dataclass

from stages.step import SentHidden, StepResult


@dataclass(frozen=True, slots=True)
class PendingResult:
    """The result of a step that is computed and not sampled yet, so that the next one can be computed meanwhile.

    `draw` is called once, by any thread, after that of every step before it has returned. It raises StepError where the
    step contradicts the sampler's state. Where it `needs_device`, it is called before the next step is computed.
    """

    draw: Callable[[], StepResult]
    needs_device: bool = False


StageOutput = memoryview | SentHidden | StepResult | PendingResult
"""Hidden states for the next stage, what was sent of them by a mesh socket, or a result: drawn already, or not yet."""


def drawn(output: StageOutput) -> memoryview | SentHidden | StepResult:
    """Returns the output with its tokens drawn, for those who run one step after the other. Raises StepError."""
    return output.draw() if isinstance(output, PendingResult) else output
