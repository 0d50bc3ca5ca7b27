"""The chain of stages as the engine sees it: start, steps in, results out, health, close."""

from collections.abc import Callable

from actors.health import StageHealth, StageProgress
from actors.options import PipelineOptions
from stages.step import Step, StepResult


class Pipeline:
    """A running pipeline. Made by `start`; usable until `close`, or until the first PipelineError."""

    epoch: int

    @classmethod
    async def start(cls, options: PipelineOptions, on_progress: Callable[[StageProgress], None]) -> "Pipeline":
        """Places, starts, loads and joins all stages.

        `on_progress` is called on the caller's loop whenever a stage gets on. Raises ClusterError, PlacementError,
        or StartError naming stage, host and cause; a CheckpointError, CacheError, PlanError or DeviceError of a stage
        is raised as itself. Whatever was started is ended before it raises.
        """
        raise NotImplementedError

    async def submit(self, step: Step) -> None:
        """Sends a step to the first stage; waits while the pipeline is full.

        Raises PipelineError once the pipeline has failed.
        """
        raise NotImplementedError

    async def receive(self) -> StepResult:
        """The next result, in the order of submission; waits for it, for ever if no step is outstanding.

        Raises PipelineError naming stage, host, step and cause when a stage fails, dies or loses its link, or when
        the oldest outstanding step has passed `step_timeout_s`; and the same error on every call after that.
        """
        raise NotImplementedError

    async def health(self) -> list[StageHealth]:
        """What every stage says of itself, in order; one that does not answer is "silent", or "dead"."""
        raise NotImplementedError

    async def close(self) -> None:
        """Ends all stages and removes every socket; ends the Ray cluster if `start` started it. May be repeated."""
        raise NotImplementedError
