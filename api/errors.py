"""Errors of requests and options, and the one table from error to HTTP status and exit code."""

import signal

from actors.errors import (
    ClusterError,
    LinkError,
    PipelineError,
    PlacementError,
    ProtocolError,
    ReleaseError,
    StartError,
)
from stages.errors import DeviceError, PlanError, StepError
from weights.errors import CacheError, CheckpointError, GalaxylineError, PublicError


class OptionError(GalaxylineError):
    """A command line option or environment variable that cannot be followed."""


class RequestError(PublicError):
    """A request that the client must change; `param` is the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModelError(RequestError):
    """The request names a model that this server does not serve."""


class NotReadyError(PublicError):
    """No token can be made now: stages load, or one is lost."""


class OverloadedError(PublicError):
    """Too many requests wait already; the client may try again in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(PublicError):
    """A request's time was over before its answer was complete."""


class EngineError(GalaxylineError):
    """The engine process ended or did not answer within its deadline."""

    @classmethod
    def for_clients(cls, sentence: str) -> "EngineError":
        """The error with a sentence that is fit for clients."""
        return cls(sentence, public=sentence)


class StoppedError(GalaxylineError):
    """A signal ended the command before its work was done; its exit code is 128 + `number`, as shells count."""

    def __init__(self, number: int) -> None:
        super().__init__(f"Stopped by {signal.Signals(number).name}.")
        self.number = number


class NoServerError(GalaxylineError):
    """No galaxyline server answers at an address."""


HTTP_STATUS: dict[type[GalaxylineError], int] = {
    UnknownModelError: 404,
    RequestError: 400,
    OverloadedError: 429,
    NotReadyError: 503,
    EngineError: 503,
    DeadlineError: 504,
    PipelineError: 503,
    GalaxylineError: 500,
}

EXIT_CODE: dict[type[GalaxylineError], int] = {
    OptionError: 2,
    RequestError: 2,
    CheckpointError: 2,
    PlanError: 2,
    PlacementError: 2,
    ReleaseError: 2,
    CacheError: 1,
    ClusterError: 1,
    StartError: 1,
    LinkError: 1,
    ProtocolError: 1,
    PipelineError: 1,
    EngineError: 1,
    NotReadyError: 1,
    DeviceError: 1,
    StepError: 1,
    GalaxylineError: 1,
}


SIGNAL_EXIT_CODE = 128


def http_status(error: GalaxylineError) -> int:
    """The HTTP status of an error: that of the nearest class in the table."""
    return _nearest(HTTP_STATUS, error)


def exit_code(error: GalaxylineError) -> int:
    """The exit code of an error, that of the nearest class in the table: 2 where the user can mend it, else 1."""
    if isinstance(error, StoppedError):
        return SIGNAL_EXIT_CODE + error.number
    return _nearest(EXIT_CODE, error)


def _nearest(table: dict[type[GalaxylineError], int], error: GalaxylineError) -> int:
    return next(table[kind] for kind in type(error).__mro__ if kind in table)
