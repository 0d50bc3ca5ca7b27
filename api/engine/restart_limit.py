"""When to stop bringing a pipeline back."""

from collections import Counter

from actors.errors import PipelineError
from weights.errors import GalaxylineError

DEFAULT_MAX_RESTARTS = 10
"""Enough to find the one request of 256 in a step that makes a stage fail: it fails twice with all others, seven times
with ever fewer, and once alone; the second time alone, it ends."""


class RestartLimit:
    """Counts how often the pipeline failed since it last made a token."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._failures: Counter[int | None] = Counter()

    def progress(self) -> None:
        """A token was made."""
        self._failures.clear()

    def note(self, error: GalaxylineError, *, is_explained: bool = False) -> None:
        """The pipeline failed, or could not be brought back. Raises PipelineError when it is not to be tried again.

        A failure `is_explained` by a request that has ended with it counts, but is no reason to end: the next may be.
        """
        stage = error.stage if isinstance(error, PipelineError) else None
        self._failures[stage] += 1
        if self._failures[stage] > self._most and not is_explained:
            who = "The pipeline" if stage is None else f"Stage {stage}"
            raise PipelineError(
                f"{who} failed {self._failures[stage]} times with no token made in between; the last time: {error}",
                stage,
            ) from error
