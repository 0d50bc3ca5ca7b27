"""Softmax, ranks and log-probabilities of the logits of one position, with sums in float64."""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from stages.step import VOCABULARY, TokenLogprobs

Floats = NDArray[np.float32]
"""Logits or weights, [vocabulary] or [candidates]."""

Doubles = NDArray[np.float64]

TokenIds = NDArray[np.int64]

FLOAT_MAX = float(np.finfo(np.float32).max)

BLOCK = 512
"""Weights that are summed at once."""

GROUP = 64
"""Tokens per group; the maxima of groups bound the best tokens, so that not all logits need to be ordered."""


def to_floats(values: Doubles) -> Floats:
    """Converts to float32; too large values become the largest number, so that no option makes an infinite logit."""
    with np.errstate(over="ignore"):
        return np.minimum(values, FLOAT_MAX).astype(np.float32)


def token_ids(tokens: Iterable[int], vocabulary: int) -> TokenIds:
    """The ids below `vocabulary`, ascending, each once; options ignore all others."""
    return np.array(sorted({token for token in tokens if 0 <= token < vocabulary}), dtype=np.int64)


def softmax_weights(logits: Floats, temperature: float) -> Floats:
    """exp((logits - best) / temperature), [vocabulary]: softmax before the division by the sum; the best has 1."""
    return weights_below(logits.max(), logits, temperature)


def weights_below(best: np.float32, logits: Floats, temperature: float) -> Floats:
    """The weights of some `logits`, where `best` is the largest of all."""
    # A difference that overflows becomes minus infinity, whose weight is 0.
    with np.errstate(over="ignore"):
        weights: Floats = logits - best
        weights /= np.float32(temperature)
    np.exp(weights, out=weights)
    return weights


def block_sums(weights: Floats) -> Doubles:
    """The sum of every BLOCK of `weights`; the last may have fewer."""
    return np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64)


def log_normaliser(logits: Floats) -> float:
    """log(sum(exp(logits))): a logit less this is its natural log-probability."""
    return float(logits.max()) + math.log(block_sums(softmax_weights(logits, 1.0)).sum())


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


def token_logprobs(logits: Floats, token: int, top: int) -> TokenLogprobs:
    """The log-probabilities of `token` and of the `top` best tokens, from the model's `logits` [vocabulary].

    `top` is 0 or more, or VOCABULARY for all tokens.
    """
    normaliser = log_normaliser(logits)
    count = len(logits) if top == VOCABULARY else top
    best = best_tokens(logits, count).tolist() if count else []
    return TokenLogprobs(
        logprob=float(logits[token]) - normaliser,
        rank=rank_of(logits, token),
        top_tokens=best,
        top_logprobs=[logit - normaliser for logit in logits[best].tolist()],
    )
