"""How many requests may wait: what is more is refused before any of it begins, and told when to come back."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping

from api.errors import OverloadedError, RequestError
from api.settings.server import QueueLimits

RETRY_AFTER_S = 2
"""What a client is told while nothing has been measured."""

RETRY_AFTER_S_MAX = 60
ENDS_MEASURED = 64


class Admission:
    """The books of what is open. Belongs to one event loop."""

    def __init__(self, limits: QueueLimits, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is in seconds."""
        self._limits = limits
        self._clock = clock
        self._open = 0
        self._unbegun_tokens = 0
        self._ends: deque[float] = deque(maxlen=ENDS_MEASURED)

    @property
    def open(self) -> int:
        """Completions that have not ended."""
        return self._open

    @property
    def queued(self) -> int:
        """Completions that wait for a slot, or will have to where the cache has room for fewer."""
        return max(self._open - self._limits.slots, 0)

    def refuse_if_full(self) -> None:
        """Raises OverloadedError where not even the smallest request is taken: its body need not be read then."""
        if self._is_full(1, 1):
            raise self._refusal()

    def admit(self, prompt_tokens: Mapping[int, int]) -> "Ticket":
        """Takes a request: the tokens of the prompt of each of its completions, by the completion's index.

        All of it is taken or nothing. While a slot is free, it may have any number of completions. Raises
        OverloadedError where too much waits already, RequestError for what is never taken at once.
        """
        tokens = sum(prompt_tokens.values())
        if len(prompt_tokens) > 1 and tokens > self._limits.tokens:
            raise RequestError(
                f"{len(prompt_tokens)} completions have {tokens} tokens of prompts together, more than the "
                f"{self._limits.tokens} that may wait at once: send several requests.",
                "prompt",
            )
        if self._is_full(len(prompt_tokens), tokens):
            raise self._refusal()
        return Ticket(self, prompt_tokens)

    def add(self, completions: int, tokens: int) -> None:
        """For `Ticket`: so many more, or fewer, are open, with so many tokens of prompts not begun."""
        self._open += completions
        self._unbegun_tokens += tokens

    def note_end(self) -> None:
        """For `Ticket`: a completion has ended."""
        self._ends.append(self._clock())

    def retry_after_s(self) -> int:
        """Seconds until all that waits now will have begun, as fast as the latest completions ended; whole ones."""
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
    """What one request takes up until its completions end. Release it however the request ends."""

    def __init__(self, admission: Admission, prompt_tokens: Mapping[int, int]) -> None:
        self._admission = admission
        self._unbegun = dict(prompt_tokens)
        self._open = set(prompt_tokens)
        admission.add(len(self._open), sum(prompt_tokens.values()))

    def began(self, index: int) -> None:
        """The first of a completion has come. Those that nothing is generated for are fine."""
        self._admission.add(0, -self._unbegun.pop(index, 0))

    def ended(self, index: int) -> None:
        """The last of a completion has come."""
        if index in self._open:
            self._open.remove(index)
            self._admission.add(-1, -self._unbegun.pop(index, 0))
            self._admission.note_end()

    def release(self) -> None:
        """Gives up what is left. May be repeated."""
        self._admission.add(-len(self._open), -sum(self._unbegun.values()))
        self._open.clear()
        self._unbegun.clear()
