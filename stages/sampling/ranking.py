"""Tokens by their logits, the best first; equal logits rank by token id. Comparisons only, so nothing is rounded."""

import numpy as np

from stages.sampling.arrays import FLOAT_MAX, Floats, TokenIds

GROUP = 64
"""Tokens of which one maximum is taken, to find the best tokens without ordering them all."""


def best_tokens(logits: Floats, count: int) -> TokenIds:
    """The `count` best tokens of `logits` [vocabulary], or as many as have a finite logit. `count` is at least 1."""
    candidates = np.flatnonzero(logits >= max(_reached_by(logits, count), -FLOAT_MAX))
    return candidates[np.argsort(-logits[candidates], kind="stable")][:count]


def rank_of(logits: Floats, token: int) -> int:
    """The place of `token` among all tokens; 1 is the best."""
    logit = logits[token]
    return 1 + int(np.count_nonzero(logits > logit)) + int(np.count_nonzero(logits[:token] == logit))


def _reached_by(logits: Floats, count: int) -> float:
    """A logit that at least `count` tokens reach, and not many more."""
    if count >= len(logits):
        return -FLOAT_MAX
    groups = len(logits) // GROUP
    if count > groups // 2:
        return float(np.partition(logits, -count)[-count])
    # Each of the `count` best groups holds a token as good as the last of their maxima.
    maxima = logits[: groups * GROUP].reshape(GROUP, groups).max(axis=0)
    return float(np.partition(maxima, -count)[-count])
