"""Softmax of one row of logits, with sums in float64."""

import math

import numpy as np

from stages.sampling.arrays import Doubles, Floats

BLOCK = 512
"""Weights that are summed at once."""


def softmax_weights(logits: Floats, temperature: float) -> Floats:
    """exp((logits - best) / temperature), [vocabulary]: probabilities but for their sum; the best token's is 1."""
    # A difference that overflows becomes minus infinity, whose weight is 0.
    with np.errstate(over="ignore"):
        weights: Floats = logits - logits.max()
        weights /= np.float32(temperature)
    np.exp(weights, out=weights)
    return weights


def block_sums(weights: Floats) -> Doubles:
    """The sum of every BLOCK of `weights`; the last may have fewer."""
    return np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64)


def log_normaliser(logits: Floats) -> float:
    """log(sum(exp(logits))): a logit less this is its natural log-probability."""
    return float(logits.max()) + math.log(block_sums(softmax_weights(logits, 1.0)).sum())
