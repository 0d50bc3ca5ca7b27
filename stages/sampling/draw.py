"""Choosing one token from logits to which the options that change logits have been applied."""

import math

from stages.sampling.arrays import Floats
from stages.sampling.candidates import Candidates
from stages.sampling.random_numbers import uniform
from stages.step import GREEDY_BELOW, SamplingParams


def draw_token(logits: Floats, params: SamplingParams, position: int) -> int:
    """The token for `position`: the best one, or a draw from softmax(logits / temperature) among those kept.

    `logits` [vocabulary]. Kept are the `top_k` best whose probability is at least `min_p` times the best one's
    (Nguyen et al., arXiv:2407.01082), and of these the nucleus: the fewest best ones whose share reaches `top_p`
    (Holtzman et al., arXiv:1904.09751). Logits that are not finite give the first of the largest.
    """
    best = int(logits.argmax())
    if params.temperature < GREEDY_BELOW or not math.isfinite(logits[best]):
        return best
    candidates = Candidates.of(logits, params.top_k, params.temperature)
    if params.min_p:
        candidates.drop_unlikely(params.min_p)
    if params.top_p < 1:
        candidates = candidates.nucleus(params.top_p)
    return candidates.draw(uniform(params.seed, params.choice, position))
