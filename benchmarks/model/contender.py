"""What completes prompts in the model benchmark, and when the tokens of its completions came."""

import statistics
from collections.abc import Sequence
from random import Random
from typing import Protocol

import msgspec

ANSWER_SECONDS = 900.0
FIRST_ID = 3
"""The first id that is not special in the sample model's tokenizer."""


class TokenTimes(msgspec.Struct, frozen=True):
    """The times of a batch of completions: for each, the seconds until each of its tokens came."""

    completions: list[list[float]]

    @property
    def first_token_s(self) -> float:
        """Seconds until the first token, the median of the completions."""
        return statistics.median(times[0] for times in self.completions)

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens a second of all completions, in the time in which all of them were being decoded."""
        begin = max(times[0] for times in self.completions)
        end = min(times[-1] for times in self.completions)
        count = sum(begin < time <= end for times in self.completions for time in times)
        return count / (end - begin)


class Contender(Protocol):
    """A program that completes prompts greedily, all at once."""

    async def complete(self, prompts: Sequence[list[int]], new_tokens: int) -> TokenTimes:
        """Generates exactly `new_tokens` tokens for each prompt."""


def random_prompts(count: int, tokens: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Makes `count` prompts of `tokens` token ids each, the same for the same seed."""
    random = Random(seed)
    return [[random.randrange(FIRST_ID, vocabulary) for _ in range(tokens)] for _ in range(count)]


def prefill_tokens_per_s(prompts: Sequence[Sequence[int]], times: TokenTimes) -> float:
    """Prompt tokens a second until the last completion has its first token."""
    return sum(map(len, prompts)) / max(completion[0] for completion in times.completions)
