"""The tokens that the timed device makes: of each the last token and its position alone decide, so that a request gets
the same ones however it is scheduled, preempted or replayed."""

from array import array
from collections.abc import Sequence

from stages.step import TokenLogprobs

MULTIPLIER = 0x9E3779B1
"""The prime next to 2**32 over the golden ratio, which scatters products over all bits (Knuth, TAOCP 3, 6.4)."""
OTHER_MULTIPLIER = 0x85EBCA6B
"""Of the finalizer of MurmurHash3."""
WORD = 0xFFFFFFFF


class TokenMaker:
    """Makes ids below `vocabulary`, but none of `never`."""

    def __init__(self, vocabulary: int, never: Sequence[int]) -> None:
        """Raises ValueError where that leaves none."""
        absent = frozenset(never)
        self._tokens = array("I", (token for token in range(vocabulary) if token not in absent))
        if not self._tokens:
            raise ValueError(f"A vocabulary of {vocabulary} tokens leaves none but {len(absent)} that never come.")

    def after(self, token: int, position: int) -> int:
        """The token after `token`, which stands at `position`."""
        mixed = ((token + 1) * MULTIPLIER ^ (position + 1) * OTHER_MULTIPLIER) & WORD
        mixed = ((mixed ^ mixed >> 15) * MULTIPLIER) & WORD
        return self._tokens[(mixed >> 7) % len(self._tokens)]


def certain(token: int) -> TokenLogprobs:
    """The device knows what comes: a token has the probability 1, and there is no other."""
    return TokenLogprobs(logprob=0.0, rank=1, top_tokens=[token], top_logprobs=[0.0])
