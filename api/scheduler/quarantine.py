"""The requests whose steps failed, kept apart from the others until the one that makes them fail is found.

A stage may die of anything, so the first failure of a step is evidence against none of its requests. Those that are in
a failing step again, before they have come through one, share steps with no others. They run in groups that are halved
with each failure, until the one request that fails alone twice is found. A request that comes through a step of the
mode that failed is released.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from api.scheduler.sequence import Run
from stages.step import Mode

REPEATED = 2
"""Failures that set a request apart, and failures alone, after its first, that end it."""


@dataclass(slots=True)
class Failures:
    """The failures of a request's steps of one `mode` since the request last came through one.

    `alone` counts those in which it was alone, but for the very first, of which a stage may have died anyhow. Requests
    with the same `group` share steps with each other only; those with None share steps with all that have None.
    """

    mode: Mode
    count: int = 0
    alone: int = 0
    group: int | None = None


class Quarantine:
    """Decides which requests may share a step, and which request ends because the pipeline fails with it."""

    def __init__(self) -> None:
        self._groups = itertools.count()
        self._failures: dict[int, Failures] = {}

    def record_failure(self, request_ids: Sequence[int], mode: Mode) -> int | None:
        """Records that a step of these requests failed; returns the one that makes it fail, once that is certain."""
        repeated: list[Failures] = []
        for request_id in request_ids:
            failures = self._failures.setdefault(request_id, Failures(mode))
            failures.mode = mode
            failures.alone += len(request_ids) == 1 and failures.count > 0
            failures.count += 1
            if failures.count >= REPEATED:
                repeated.append(failures)
        half = (len(repeated) + 1) // 2
        for part in (repeated[:half], repeated[half:]):
            group = next(self._groups)
            for failures in part:
                failures.group = group
        is_certain = len(request_ids) == 1 and repeated != [] and repeated[0].alone >= REPEATED
        return request_ids[0] if is_certain else None

    def release(self, request_id: int, mode: Mode) -> bool:
        """Forgets a request's failures as it came through a step of this mode; returns whether it had failed in one."""
        failures = self._failures.get(request_id)
        if failures is None or failures.mode != mode:
            return False
        del self._failures[request_id]
        return True

    def forget(self, request_id: int) -> None:
        """Forgets a request that has ended."""
        self._failures.pop(request_id, None)

    def group_of(self, request_id: int) -> int | None:
        """The group that a request shares its steps with; None where it is not set apart."""
        failures = self._failures.get(request_id)
        return None if failures is None else failures.group

    def split(self, runs: list[Run]) -> tuple[list[Run], list[Run]]:
        """The runs that may share a step with the first one, itself among them, and the others, in the given order."""
        if not self._failures:
            return runs, []
        groups = [self.group_of(run.request_id) for run in runs]
        together = [run for run, group in zip(runs, groups, strict=True) if group == groups[0]]
        return together, [run for run, group in zip(runs, groups, strict=True) if group != groups[0]]
