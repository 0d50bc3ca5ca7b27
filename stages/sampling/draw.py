"""Drawing one token: which may be drawn, how likely each is, and the random number that chooses."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.sampling.logprobs import BLOCK, Doubles, Floats, TokenIds, best_tokens, block_sums, softmax_weights
from stages.step import GREEDY_BELOW, SamplingParams

WORD = (1 << 64) - 1


def uniform(seed: int, choice: int, position: int) -> float:
    """The random number in [0, 1) of this seed, choice and position: Philox, a counter-based generator.

    Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011). Any integer may be a seed.
    """
    philox = np.random.Philox(key=np.array([seed & WORD, choice], dtype=np.uint64), counter=[0, 0, 0, position])
    return float(np.random.Generator(philox).random())


BAND_BITS = 18
"""Low bits of a float32 that do not tell bands of weights apart: 32 bands to each power of two."""

FEW = 8
"""Candidates are gathered into arrays of their own where less than one in so many is likely."""


@dataclass(frozen=True)
class Candidates:
    """`tokens` in ascending order, or the whole vocabulary, with the logit and the weight of each.

    A weight is a probability but for their sum; what has weight 0 is no candidate any more. Weights are ordered as
    logits are, though different logits may have one weight.
    """

    tokens: TokenIds | None
    logits: Floats
    weights: Floats

    @classmethod
    def of(cls, logits: Floats, top_k: int, temperature: float) -> "Candidates":
        """The `top_k` best tokens of `logits` [vocabulary], or all where it is 0. The best logit is finite."""
        if not top_k:
            return cls(None, logits, softmax_weights(logits, temperature))
        tokens = np.sort(best_tokens(logits, top_k))
        return cls(tokens, logits[tokens], softmax_weights(logits[tokens], temperature))

    def drop_unlikely(self, min_p: float) -> None:
        """Drops those whose probability is less than `min_p` times the best one's."""
        self.weights[:] *= self.weights >= min_p

    def nucleus(self, top_p: float) -> "Candidates":
        """The fewest best ones whose share of all weights reaches `top_p`."""
        whole = float(block_sums(self.weights).sum())
        # All that lie below this have together less than 1 - top_p.
        likely = self.weights >= (1 - top_p) * whole / len(self.weights)
        near = self._gathered(likely) if np.count_nonzero(likely) * FEW < len(likely) else self
        near._drop_after(near._reaching(top_p * whole))
        return near

    def draw(self, share: float) -> int:
        """The token at which the running sum of weights passes `share`, in [0, 1), of the whole."""
        ends = block_sums(self.weights).cumsum()
        level = share * float(ends[-1])
        block = _passing(ends, level)
        begin = block * BLOCK
        rest = level - float(ends[block - 1]) if block else level
        drawn = begin + _passing(self.weights[begin : begin + BLOCK].cumsum(dtype=np.float64), rest)
        return drawn if self.tokens is None else int(self.tokens[drawn])

    def _gathered(self, chosen: NDArray[np.bool_]) -> "Candidates":
        indices = np.flatnonzero(chosen)
        tokens = indices if self.tokens is None else self.tokens[indices]
        return Candidates(tokens, self.logits[indices], self.weights[indices])

    def _reaching(self, mass: float) -> int:
        """The index of the one with which the weights of the best ones reach `mass`.

        Nothing is sorted but the band of near weights in which that happens.
        """
        # Floats above zero are ordered as their bits are.
        bands = self.weights.view(np.int32) >> BAND_BITS
        running = np.bincount(bands, self.weights)[::-1].cumsum()
        mass = min(mass, float(running[-1]))
        above = int(running.searchsorted(mass))
        rest = mass - float(running[above - 1]) if above else mass
        members = np.flatnonzero(bands == len(running) - 1 - above)
        ranked = members[np.argsort(-self.logits[members], kind="stable")]
        count = int(self.weights[ranked].cumsum(dtype=np.float64).searchsorted(rest))
        return int(ranked[min(count, len(ranked) - 1)])

    def _drop_after(self, end: int) -> None:
        """Drops all that rank after the one at index `end`; equal logits rank by token id."""
        self.weights[:] *= self.logits >= self.logits[end]
        self.weights[end + 1 :][self.logits[end + 1 :] == self.logits[end]] = 0


def _passing(running: Doubles, level: float) -> int:
    """The first index whose running sum is over `level`, at most the one with which the sum is complete."""
    return min(int(running.searchsorted(level, side="right")), int(running.searchsorted(running[-1])))


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
