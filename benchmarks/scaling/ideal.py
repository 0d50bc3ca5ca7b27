"""The ideal of a pipeline, in which nothing but its stages takes time."""

import math
from collections.abc import Sequence

import msgspec


class Ideal(msgspec.Struct, frozen=True, kw_only=True):
    """A pipeline whose stages take `decode_s` and `prefill_s` seconds for a step, and whose hops take none.

    `microbatches` are in flight, of `users` requests each.
    """

    decode_s: list[float]
    prefill_s: list[float]
    microbatches: int
    users: int

    @property
    def cycle_s(self) -> float:
        """Seconds between two tokens of a user: the slowest stage runs every microbatch, and each passes all stages."""
        return max(self.microbatches * max(self.decode_s), sum(self.decode_s))

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of all users."""
        return self.microbatches * self.users / self.cycle_s

    @property
    def equal_tokens_per_s(self) -> float:
        """Tokens a second of all users if the same work were distributed evenly to the stages."""
        even = sum(self.decode_s) / len(self.decode_s)
        return msgspec.structs.replace(self, decode_s=[even] * len(self.decode_s)).tokens_per_s

    @property
    def first_token_s(self) -> float:
        """Seconds to the first token of a prompt that fits into a step and waits for nothing."""
        return sum(self.prefill_s)


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that at least this share of the values does not exceed (nearest rank); 0 if there are none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]
