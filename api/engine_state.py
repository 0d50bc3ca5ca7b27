"""An error as the engine's state, and back: it keeps its class on the way, and with it its exit code."""

from api.errors import EXIT_CODE, EngineError
from api.messages import EngineState
from weights.errors import GalaxylineError

KINDS = {kind.__name__: kind for kind in EXIT_CODE}


def failed_state(error: GalaxylineError) -> EngineState:
    """The state of an engine that failed with this error, as the nearest class that has an exit code."""
    kind = next(kind for kind in type(error).__mro__ if kind in EXIT_CODE)
    return EngineState(phase="failed", detail=str(error), error_kind=kind.__name__)


def error_of(state: EngineState) -> GalaxylineError:
    """The error that a failed engine failed with."""
    return KINDS.get(state.error_kind, EngineError)(state.detail)
