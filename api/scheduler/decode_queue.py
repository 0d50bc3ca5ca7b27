"""The requests that wait for their next tokens, by microbatch: each has one decode step in flight at most."""

from collections.abc import Iterator

from api.scheduler.quarantine import Quarantine
from api.scheduler.sequence import Run

Runs = list[Run]


class DecodeQueue:
    """Lets microbatches decode in the order of their last decode step."""

    def __init__(self, quarantine: Quarantine, last_decode: list[int]) -> None:
        """`last_decode` has the step in which each microbatch decoded last, and is kept up to date."""
        self._quarantine = quarantine
        self._last_decode = last_decode
        self._waiting: list[Runs] = [[] for _ in last_decode]
        self._decoding = [False for _ in last_decode]

    @property
    def is_empty(self) -> bool:
        """Whether no request decodes, or waits to."""
        return not any(self._waiting) and not any(self._decoding)

    @property
    def ready(self) -> list[int]:
        """The microbatches that could decode now."""
        waiting = enumerate(self._waiting)
        return [m for m, runs in waiting if not self._decoding[m] and any(run.active for run in runs)]

    def put(self, run: Run) -> None:
        """Lets a run wait for its next tokens."""
        self._waiting[run.microbatch].append(run)

    def take(self) -> Iterator[tuple[int, Runs]]:
        """Yields each microbatch that is not decoding, with the runs that may share its next step.

        They are in the order of arrival, and are taken out of the queue.
        """
        ready = [m for m, runs in enumerate(self._waiting) if runs and not self._decoding[m]]
        for microbatch in sorted(ready, key=self._last_decode.__getitem__):
            runs, self._waiting[microbatch] = self._quarantine.split(self._waiting[microbatch])
            runs.sort(key=lambda run: run.arrival)
            yield microbatch, runs

    def step_issued(self, microbatch: int, step_id: int) -> None:
        """Notes that the microbatch decodes in this step."""
        self._decoding[microbatch] = True
        self._last_decode[microbatch] = step_id

    def step_returned(self, microbatch: int) -> None:
        """Notes that the microbatch's step is back."""
        self._decoding[microbatch] = False
