"""Errors of placing, starting and running a pipeline."""

from typing import Literal

from weights.errors import GalaxylineError, PublicError

LinkErrorKind = Literal["not_joined", "lost", "refused", "closed"]
"""Why a connection is missing: it was never made, it ended by itself, the peer broke the protocol, or we closed it."""


class ClusterError(GalaxylineError):
    """The Ray cluster cannot be reached or started."""


class PlacementError(PublicError):
    """The cluster cannot hold the stages; the sentence names what is there and what is missing."""


class ReleaseError(GalaxylineError):
    """A host runs another release than the engine; the sentence names the host, its release and the one needed."""


class StartError(GalaxylineError):
    """A stage did not come up within its deadline; the sentence names stage, host and cause."""


class ProtocolError(GalaxylineError):
    """A peer sent bytes that are not a frame of this pipeline: wrong magic, version, secret, epoch or length."""


class LinkError(GalaxylineError):
    """A connection between two stages was lost, or was not made within its deadline."""

    def __init__(self, message: str, kind: LinkErrorKind = "not_joined") -> None:
        super().__init__(message)
        self.kind: LinkErrorKind = kind


class PipelineError(GalaxylineError):
    """A running pipeline lost a stage; the sentence names stage, host, step and cause.

    `stage` is the one that failed and `step_id` the step that it worked on; either is None where it is not known, or
    where there is none.
    """

    def __init__(
        self, message: str, stage: int | None = None, step_id: int | None = None, *, public: str | None = None
    ) -> None:
        if public is None:
            where = "The pipeline" if stage is None else f"Stage {stage}"
            public = f"{where} failed." if step_id is None else f"{where} failed at step {step_id}."
        super().__init__(message, public=public)
        self.stage = stage
        self.step_id = step_id
