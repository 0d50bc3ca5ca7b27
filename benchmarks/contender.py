"""What completes prompts in the model benchmark: this program, and those it is measured beside."""

from collections.abc import Sequence
from typing import Protocol

from benchmarks.token_times import TokenTimes

ANSWER_SECONDS = 900.0


class Contender(Protocol):
    """Completes prompts greedily, all at once."""

    async def complete(self, prompts: Sequence[list[int]], new_tokens: int) -> TokenTimes:
        """Exactly so many new tokens for each prompt."""
