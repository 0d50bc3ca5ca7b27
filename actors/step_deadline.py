"""How long a step may take before a stage is taken to be stuck."""

from collections import deque

RECENT = 32
FACTOR = 50.0
"""A step of prompt tokens where nobody waits takes some twenty times as long as a step of one token for each user."""
LEAST_S = 5.0


class StepDeadline:
    """FACTOR times the longest of the last RECENT steps, but LEAST_S at least and `most_s` at most.

    Until so many are known it is `most_s`: the first steps may compile, or capture a trace.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._took_s: deque[float] = deque(maxlen=RECENT)

    def note(self, took_s: float) -> None:
        """A step has come out, so long after it was submitted."""
        self._took_s.append(took_s)

    def forget(self) -> None:
        """What comes next may be slower: a stage is new."""
        self._took_s.clear()

    @property
    def allowed_s(self) -> float:
        """Seconds from a step's submission to its result."""
        if len(self._took_s) < RECENT:
            return self._most_s
        return min(self._most_s, max(LEAST_S, FACTOR * max(self._took_s)))
