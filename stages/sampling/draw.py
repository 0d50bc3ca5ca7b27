"""Draws of one token: the candidates, how likely each is, and the race between them."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.sampling.logprobs import Floats, TokenIds, best_tokens, block_sums, softmax_weights, weights_below
from stages.sampling.noise import Noise
from stages.sampling.race import SMALL, first_of, first_of_all
from stages.step import GREEDY_BELOW, SamplingParams

BAND_BITS = 18
"""Low bits of a float32 that two weights of one band may differ in: there are 32 bands to each power of two."""

FEW = 8
"""Candidates are copied to smaller arrays if fewer than one in FEW of them is likely."""


@dataclass(frozen=True)
class Candidates:
    """The tokens that may be drawn, each with its logit and its weight.

    `tokens` are in ascending order, or None for the whole vocabulary. Weights are probabilities not divided by their
    sum; a token of weight 0 has been dropped. A larger logit never has a smaller weight, but different logits may have
    the same weight.
    """

    tokens: TokenIds | None
    logits: Floats
    weights: Floats

    @classmethod
    def of(cls, logits: Floats, top_k: int, temperature: float) -> "Candidates":
        """The `top_k` best tokens of `logits` [vocabulary], or all if `top_k` is 0. The best logit is finite."""
        if not top_k:
            return cls(None, logits, softmax_weights(logits, temperature))
        tokens = np.sort(best_tokens(logits, top_k))
        return cls(tokens, logits[tokens], softmax_weights(logits[tokens], temperature))

    def drop_unlikely(self, min_p: float) -> None:
        """Drops the tokens whose probability is less than `min_p` times that of the best one."""
        self.weights[:] *= self.weights >= min_p

    def nucleus(self, top_p: float) -> "Candidates":
        """The fewest best candidates whose share of all weights reaches `top_p`."""
        whole = float(block_sums(self.weights).sum())
        # The candidates below this threshold have a share of less than 1 - top_p together.
        likely = self.weights >= (1 - top_p) * whole / len(self.weights)
        near = self._gathered(likely) if np.count_nonzero(likely) * FEW < len(likely) else self
        near._drop_after(near._reaching(top_p * whole))
        return near

    def draw(self, noise: Noise) -> int:
        """The token drawn with this `noise`, each with its share of all weights as its probability."""
        kept = self.weights > 0
        if np.count_nonzero(kept) <= SMALL:
            indices = np.flatnonzero(kept)
            return first_of(noise, indices if self.tokens is None else self.tokens[indices], self.weights[indices])
        return first_of_all(noise, self._of_all(), lambda weights: weights)

    def _of_all(self) -> Floats:
        """The weights of all tokens up to the last candidate."""
        if self.tokens is None:
            return self.weights
        weights = np.zeros(int(self.tokens[-1]) + 1, dtype=np.float32)
        weights[self.tokens] = self.weights
        return weights

    def _gathered(self, chosen: NDArray[np.bool_]) -> "Candidates":
        indices = np.flatnonzero(chosen)
        tokens = indices if self.tokens is None else self.tokens[indices]
        return Candidates(tokens, self.logits[indices], self.weights[indices])

    def _reaching(self, mass: float) -> int:
        """The index of the candidate at which the running sum of weights, best first, reaches `mass`.

        Only the band of similar weights in which that happens is sorted.
        """
        # Positive floats have the same order as their bits.
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
        """Drops all candidates that rank after the one at index `end`; equal logits rank by token id."""
        self.weights[:] *= self.logits >= self.logits[end]
        self.weights[end + 1 :][self.logits[end + 1 :] == self.logits[end]] = 0


def draw_token(logits: Floats, params: SamplingParams, position: int) -> int:
    """The token for `position`: the best one, or a draw from softmax(logits / temperature) among the candidates.

    `logits` [vocabulary]. The candidates are the `top_k` best tokens whose probability is at least `min_p` times the
    best one's (Nguyen et al., arXiv:2407.01082), and of these the nucleus: the fewest best ones whose share reaches
    `top_p` (Holtzman et al., arXiv:1904.09751). If the largest logit is not finite, the first token that has it is
    returned.
    """
    best = int(logits.argmax())
    if params.temperature < GREEDY_BELOW or not math.isfinite(logits[best]):
        return best
    noise = Noise.of(params.seed, params.choice, position)
    if not params.top_k and not params.min_p and params.top_p >= 1:
        return first_of_all(noise, logits, lambda some: weights_below(logits[best], some, params.temperature))
    candidates = Candidates.of(logits, params.top_k, params.temperature)
    if params.min_p:
        candidates.drop_unlikely(params.min_p)
    if params.top_p < 1:
        candidates = candidates.nucleus(params.top_p)
    return candidates.draw(noise)
