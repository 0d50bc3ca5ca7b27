"""The pipeline as the engine uses it: the one interface between api/engine and actors.pipeline.Pipeline."""

from typing import Protocol

from actors.stage.health import StageHealth
from stages.step import Step, StepResult


class EnginePipeline(Protocol):
    """A pipeline that has started: actors.pipeline.Pipeline is one, and so are the tests' fakes."""

    epoch: int

    async def submit(self, step: Step) -> None:
        """Sends a step to the first stage. Raises PipelineError."""

    async def receive(self) -> StepResult:
        """Returns the next result, in the order of submission. Raises PipelineError."""

    async def health(self) -> list[StageHealth]:
        """Returns the health of every stage, in order, within about a second."""

    async def recover(self) -> None:
        """Brings the pipeline back after a failure, as another epoch.

        Raises GalaxylineError; it may be called again then.
        """

    async def close(self) -> None:
        """Ends all stages."""
