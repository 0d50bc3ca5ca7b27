"""Draws of one token: the candidates, how likely each is, and the race between them."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.sampling.logprobs import Floats, TokenIds, best_tokens, block_sums, softmax_weights
from stages.sampling.noise import HIGH_BITS, LEAST, Noise
from stages.step import GREEDY_BELOW, SamplingParams

NEVER_DRAWN = 2.0**-59
"""Tokens of smaller weight cannot come before the best one, whose weight is 1, whatever the noise is.

They come at 2^-53 / weight or later, and the best one at -log(2^-53), which is 36.7, or earlier.
"""

ROUNDING = 1e-6
"""More than three roundings in float32 add up to."""

SMALL = 1024
"""So many candidates' exact times take no longer than the choice of those that need them."""

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
        """The token that comes first in an exponential race (the Gumbel-max trick), each at the rate of its weight.

        It is the one with the largest log(weight) - log(exponential), where the latter is Gumbel noise. As a token's
        noise depends on no other token, two models that draw with the same noise agree with a probability of at least
        (1 - TV) / (1 + TV), where TV is the total variation distance of what they draw from (Daliri et al.,
        arXiv:2408.07978). Equal times rank by token id.
        """
        near = self._contenders(noise)
        tokens = near if self.tokens is None else self.tokens[near]
        return int(tokens[(noise.exponentials(tokens) / self.weights[near]).argmin()])

    def _contenders(self, noise: Noise) -> TokenIds:
        """The indices of all candidates that may come first, in ascending order, and of few others."""
        possible = self.weights >= NEVER_DRAWN
        if len(possible) <= SMALL or np.count_nonzero(possible) * FEW < len(possible):
            return np.flatnonzero(possible)
        # An exponential number is never less than its uniform one, which is never less than its high bits.
        high = noise.high_bits(self.tokens, len(self.weights))
        with np.errstate(divide="ignore", invalid="ignore"):
            earliest = high.astype(np.float32) / self.weights
        # Zero by zero is not a number, which is the first of all here.
        first = int(earliest.argmin())
        if not possible[first]:
            return np.flatnonzero(possible)
        latest = -math.log1p(LEAST - (int(high[first]) + 1) * 2.0**-HIGH_BITS) / float(self.weights[first])
        return np.flatnonzero(earliest <= np.float32(latest * 2.0**HIGH_BITS * (1 + ROUNDING)))

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
    candidates = Candidates.of(logits, params.top_k, params.temperature)
    if params.min_p:
        candidates.drop_unlikely(params.min_p)
    if params.top_p < 1:
        candidates = candidates.nucleus(params.top_p)
    return candidates.draw(Noise.of(params.seed, params.choice, position))
