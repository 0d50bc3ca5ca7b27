"""Errors of placing, starting and running a pipeline."""

from weights.errors import GalaxylineError


class ClusterError(GalaxylineError):
    """The Ray cluster cannot be reached or started."""


class PlacementError(GalaxylineError):
    """The cluster cannot hold the stages; the sentence says what is there and what is missing."""


class ReleaseError(GalaxylineError):
    """A host runs another release than the engine; the sentence says which, what it has and what is wanted."""


class StartError(GalaxylineError):
    """A stage did not come up within its deadline; the sentence names stage, host and cause."""


class ProtocolError(GalaxylineError):
    """A peer sent bytes that are no frame of this pipeline: wrong magic, version, secret, epoch or length."""


class LinkError(GalaxylineError):
    """A connection between two stages was lost or did not answer within its deadline."""


class PipelineError(GalaxylineError):
    """A running pipeline lost a stage; the sentence names stage, host, step and cause.

    `stage` is the one to blame and `step_id` the step that it worked on, None where that is not known or there is none.
    """

    def __init__(self, message: str, stage: int | None = None, step_id: int | None = None) -> None:
        super().__init__(message)
        self.stage = stage
        self.step_id = step_id
