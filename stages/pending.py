"""What a stage makes of a step, which on the last one may be a result whose tokens are still to be drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from stages.step import SentHidden, StepResult

Result = TypeVar("Result")


class OnDevice(Protocol):
    """Calls a function where the device may be used, and returns what it returns."""

    def __call__(self, function: Callable[[], Result], /) -> Result:
        """Raises what the function raises, or StepError where it cannot be called."""


def at_once(function: Callable[[], Result]) -> Result:
    """Calls the function, on the thread that has the device. It is an `OnDevice`."""
    return function()


@dataclass(frozen=True, slots=True)
class PendingResult:
    """The result of a step that is computed and not sampled yet, so that the next one can be computed meanwhile.

    `draw` is called once, by any thread, after that of every step before it has returned. It raises StepError where the
    step contradicts the sampler's state. Where it `needs_device`, it is called before the next step is computed; else
    it may ask for the device by the function that it is given, which can take as long as a step.
    """

    draw: Callable[[OnDevice], StepResult]
    needs_device: bool = False


StageOutput = memoryview | SentHidden | StepResult | PendingResult
"""Hidden states for the next stage, what was sent of them by a mesh socket, or a result: drawn already, or not yet."""


def drawn(output: StageOutput) -> memoryview | SentHidden | StepResult:
    """Returns the output with its tokens drawn, for those who run one step after the other. Raises StepError."""
    return output.draw(at_once) if isinstance(output, PendingResult) else output
