"""The bound on how many requests may wait: more are refused before they begin, with the time to try again."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping

from api.errors import OverloadedError, RequestError
from api.settings.server import QueueLimits

RETRY_AFTER_S = 2
"""The seconds in Retry-After while too few ends have been measured."""

RETRY_AFTER_S_MAX = 60
ENDS_MEASURED = 64


class AdmissionControl:
    """Counts the open completions, and refuses those beyond its limits. Belongs to one event loop."""

    def __init__(self, limits: QueueLimits, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is in seconds."""
        self._limits = limits
        self._clock = clock
        self._open = 0
        self._unbegun_tokens = 0
        self._ends: deque[float] = deque(maxlen=ENDS_MEASURED)

    @property
    def open(self) -> int:
        """The number of completions that have not ended."""
        return self._open

    @property
    def queued(self) -> int:
        """The number of completions beyond the slots: they wait, as do more where the cache has no room for them."""
        return max(self._open - self._limits.slots, 0)

    def refuse_if_full(self) -> None:
        """Raises OverloadedError where even the smallest request is refused, so that its body need not be read."""
        if self._is_full(1, 1):
            raise self._refusal()

    def admit(self, prompt_tokens: Mapping[int, int]) -> "Ticket":
        """Admits a request, given the number of prompt tokens of each of its completions by the completion's index.

        All its completions are admitted or none. While a slot is free, there may be any number of them. Raises
        OverloadedError where too much waits already, RequestError for a request that is always too large.
        """
        tokens = sum(prompt_tokens.values())
        self.check_size(len(prompt_tokens), tokens)
        if self._is_full(len(prompt_tokens), tokens):
            raise self._refusal()
        return Ticket(self, prompt_tokens)

    def check_size(self, completions: int, tokens: int) -> None:
        """Raises RequestError for a request that is always too large: `tokens` are those of its prompts together.

        May be called on any thread.
        """
        if completions > 1 and tokens > self._limits.tokens:
            raise RequestError(
                f"{completions} completions have {tokens} tokens of prompts together, more than the "
                f"{self._limits.tokens} that may wait at once: send several requests.",
                "prompt",
            )

    def change_open(self, completions: int, tokens: int) -> None:
        """Changes the numbers of open completions and of prompt tokens not begun; for `Ticket`."""
        self._open += completions
        self._unbegun_tokens += tokens

    def record_end(self) -> None:
        """Records that a completion has ended; for `Ticket`."""
        self._ends.append(self._clock())

    def retry_after_s(self) -> int:
        """The whole seconds until all that waits now has begun, at the rate at which the latest completions ended."""
        if len(self._ends) < 2:
            return RETRY_AFTER_S
        per_completion = (self._clock() - self._ends[0]) / len(self._ends)
        return min(max(math.ceil(self.queued * per_completion), 1), RETRY_AFTER_S_MAX)

    def _is_full(self, completions: int, tokens: int) -> bool:
        limits = self._limits
        if self._open < limits.slots or not completions:
            return False
        return self.queued + completions > limits.requests or self._unbegun_tokens + tokens > limits.tokens

    def _refusal(self) -> OverloadedError:
        return OverloadedError(
            f"{self.queued} completions wait already, with {self._unbegun_tokens} tokens of prompts: try again later.",
            self.retry_after_s(),
        )


class Ticket:
    """The place that one request takes up until its completions end. Release it in any case."""

    def __init__(self, admission: AdmissionControl, prompt_tokens: Mapping[int, int]) -> None:
        self._admission = admission
        self._unbegun = dict(prompt_tokens)
        self._open = set(prompt_tokens)
        admission.change_open(len(self._open), sum(prompt_tokens.values()))

    def began(self, index: int) -> None:
        """Notes the first chunk of a completion. Completions that are not admitted are ignored."""
        self._admission.change_open(0, -self._unbegun.pop(index, 0))

    def ended(self, index: int) -> None:
        """Notes the last chunk of a completion."""
        if index in self._open:
            self._open.remove(index)
            self._admission.change_open(-1, -self._unbegun.pop(index, 0))
            self._admission.record_end()

    def release(self) -> None:
        """Gives back what is left of the place. May be repeated."""
        self._admission.change_open(-len(self._open), -sum(self._unbegun.values()))
        self._open.clear()
        self._unbegun.clear()
