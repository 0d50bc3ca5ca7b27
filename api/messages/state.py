"""What engines' states stand for: errors, which keep their class on their way, refusals of requests, a common state."""

from collections.abc import Sequence

import msgspec

from api.errors import EXIT_CODE, EngineError, NotReadyError
from api.messages.engine import EngineState
from weights.errors import GalaxylineError

KINDS = {kind.__name__: kind for kind in EXIT_CODE}


def failed_state(error: GalaxylineError) -> EngineState:
    """The state of an engine that failed with this error, as the nearest class that has an exit code."""
    kind = next(kind for kind in type(error).__mro__ if kind in EXIT_CODE)
    return EngineState(phase="failed", detail=str(error), error_kind=kind.__name__)


def error_of(state: EngineState) -> GalaxylineError:
    """The error that a failed engine failed with."""
    return KINDS.get(state.error_kind, EngineError)(state.detail)


def takes_requests(state: EngineState) -> bool:
    """Whether a request may come: while a stage is replaced it waits."""
    return state.phase in {"ready", "recovering"}


def not_ready(state: EngineState) -> NotReadyError:
    """What is told to who comes while an engine loads or recovers, or after it failed."""
    if state.phase == "failed":
        return NotReadyError(f"The engine failed: {state.detail}")
    if state.phase == "recovering":
        return NotReadyError(f"No token can be made until a stage is replaced: {state.detail}")
    return NotReadyError(f"The model is still loading: {state.detail or 'try again in a moment.'}")


def named_state(state: EngineState, replica: int) -> EngineState:
    """The state of one of several engines, whose sentence says which one it is."""
    return msgspec.structs.replace(state, detail=f"Replica {replica}: {state.detail}")


def common_state(states: Sequence[EngineState]) -> EngineState:
    """What engines that do the same work are together: what the best of them is, and failed when all of them failed.

    Its detail names those that are not ready. A single engine's state stays as it is.
    """
    if len(states) == 1:
        return states[0]
    named = [named_state(state, replica) for replica, state in enumerate(states) if state.phase != "ready"]
    detail = " ".join(state.detail for state in named)
    if len(named) < len(states):
        return EngineState(phase="ready", detail=detail)
    unready = max(states, key=lambda state: ("failed", "loading", "recovering").index(state.phase))
    return msgspec.structs.replace(unready, detail=detail)
