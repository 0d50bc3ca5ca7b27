"""Which request makes the pipeline fail, where the same one is there each time: halves of a step are tried apart.

A stage may die of anything, so a first failure of a step says nothing of its requests. Those that are in a failing
step again before they have got on are suspects; they run apart from all others, in groups that are halved with each
failure, until the one that fails by itself twice is found. A suspect that gets through a step of the kind that failed
is none any more.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from stages.step import Mode

REPEATED = 2


@dataclass(slots=True)
class Suspicion:
    """Failures of a request's steps of one `mode` since it last got through one.

    `failures_alone` are those in which it was alone, but for the very first, of which a stage may have died anyhow.
    Requests of a `group` share steps with each other and nobody else; None may share them with all that have none.
    """

    mode: Mode
    failures: int = 0
    failures_alone: int = 0
    group: int | None = None


class Suspect(Protocol):
    """A request, as far as it can be suspected."""

    suspicion: Suspicion | None


class Suspects:
    """Draws the groups."""

    def __init__(self) -> None:
        self._groups = itertools.count()

    def blame(self, requests: Sequence[Suspect], mode: Mode) -> bool:
        """A step of these requests has failed. Whether there was but one, and it is to be given up."""
        repeated = []
        for request in requests:
            suspicion = request.suspicion = request.suspicion or Suspicion(mode)
            suspicion.mode = mode
            suspicion.failures_alone += len(requests) == 1 and suspicion.failures > 0
            suspicion.failures += 1
            if suspicion.failures >= REPEATED:
                repeated.append(suspicion)
        half = (len(repeated) + 1) // 2
        for part in (repeated[:half], repeated[half:]):
            group = next(self._groups)
            for suspicion in part:
                suspicion.group = group
        return len(requests) == 1 and repeated != [] and repeated[0].failures_alone >= REPEATED


def acquit(request: Suspect, mode: Mode) -> None:
    """A step of this mode has gone through."""
    if request.suspicion is not None and request.suspicion.mode == mode:
        request.suspicion = None


def group_of(request: Suspect) -> int | None:
    """The group with which alone a request may share a step."""
    return None if request.suspicion is None else request.suspicion.group
