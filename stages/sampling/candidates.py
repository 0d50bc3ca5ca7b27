"""Draws from few known logits, wherever they prove what would be drawn from all.

A chip gives the best tokens of its share of the vocabulary, so that of all others it is known that none has a larger
logit than a bound, and what they weigh together. That is enough for most draws; where it is not, the answer is None,
and whoever asks has to get the logits of the whole vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from stages.sampling.draw import Candidates
from stages.sampling.grammar import Mask
from stages.sampling.logits_options import LogitsOptions
from stages.sampling.logprobs import Doubles, Floats, TokenIds, weights_below
from stages.sampling.noise import Noise
from stages.sampling.race import first_of, first_of_bounded
from stages.step import GREEDY_BELOW, VOCABULARY, SamplingParams, TokenLogprobs

SUM_ERROR = 1 / 256
"""How far a chip's sum of weights may be from the true one, as a share: the rounding of a bfloat16."""

MARGIN = 1e-9
"""More than the roundings of sums of weights, in float64, add up to, as a share."""

WEIGHT_ERROR = 1e-5
"""More than the rounding of a weight, in float32, and of the exponents that bound it, as a share."""


LARGEST_LOG = 700.0
"""What exp still makes a number of."""

SIGN = np.uint32(1 << 31)
"""The bit of a float32 that is set where it is negative."""


class Ranked(NamedTuple):
    """Tokens and logits of some rows, [rows, tokens], the best first; equal ones rank by token id."""

    tokens: TokenIds
    logits: Floats

    @classmethod
    def of(cls, tokens: TokenIds, logits: Floats) -> "Ranked":
        """Ranks the tokens of all rows at once, as numbers that have the order of their bits."""
        # Without negative zeros, which rank as the others.
        bits = (logits + np.float32(0)).view(np.uint32)
        rising = np.where(bits >> 31, ~bits, bits | SIGN)
        keys = (~rising).astype(np.uint64) << np.uint64(32) | tokens.astype(np.uint64)
        keys.sort(axis=-1)
        rising = ~(keys >> np.uint64(32)).astype(np.uint32)
        bits = np.where(rising & SIGN, rising ^ SIGN, ~rising)
        return cls((keys & np.uint64(0xFFFFFFFF)).astype(np.int64), bits.view(np.float32))


def log_mass_of(logits: Floats, log_normaliser: Doubles) -> Doubles:
    """The logarithm of what exp(logit) of all other tokens add up to, at most, [rows].

    `logits` [rows, tokens] are known, and `log_normaliser` [rows] is that of all, up to SUM_ERROR.
    """
    known = np.exp(logits - log_normaliser[:, None]).sum(axis=1)
    with np.errstate(divide="ignore"):
        mass: Doubles = log_normaliser + np.log(np.maximum(1 + SUM_ERROR - known, 0.0))
    return mass


@dataclass(frozen=True, slots=True)
class KnownLogits:
    """The logits of some tokens of a `vocabulary`, the best first, and what bounds all others; equal ones rank by id.

    So many others, `unknown`, may be drawn; none has a logit above `bound`, and the sum of their exp(logit) has a
    logarithm of at most `log_mass`. `log_normaliser` is that of the whole vocabulary as the model has it.
    """

    tokens: TokenIds
    logits: Floats
    bound: float
    unknown: int
    log_mass: float
    log_normaliser: float
    vocabulary: int

    @classmethod
    def of(
        cls, tokens: TokenIds, logits: Floats, bound: float, vocabulary: int, log_normaliser: float
    ) -> "KnownLogits":
        """The known logits of a `vocabulary`, in any order; the normaliser is known up to SUM_ERROR."""
        ranked = Ranked.of(tokens[None], logits[None])
        [log_mass] = log_mass_of(ranked.logits, np.array([log_normaliser]))
        unknown = vocabulary - len(tokens)
        return cls(ranked.tokens[0], ranked.logits[0], bound, unknown, float(log_mass), log_normaliser, vocabulary)

    @property
    def is_finite(self) -> bool:
        """Whether all logits are numbers, and the largest of them is finite."""
        return math.isfinite(self.log_normaliser) and math.isfinite(self.logits[0])

    def changed(
        self, options: LogitsOptions, answer: Sequence[int], answered: int, mask: Mask | None
    ) -> "KnownLogits | None":
        """The logits after options have changed them, as `LogitsOptions.apply` does; None where these may raise others.

        Options that lower unknown logits leave their bounds true.
        """
        if mask is None and options.change_nothing(answer, answered):
            return self
        order = self.tokens.argsort()
        tokens = self.tokens[order]
        changed = options.apply_to_some(tokens, self.logits[order], self.unknown, answer, answered, mask)
        if changed is None:
            return None
        logits, unknown = changed
        ranked = Ranked.of(tokens, logits)
        return replace(self, tokens=ranked.tokens, logits=ranked.logits, unknown=unknown)

    def draw(self, params: SamplingParams, position: int) -> int | None:
        """What `draw_token` draws from the logits of all tokens; None where that is not certain."""
        best = self.logits[0]
        if not math.isfinite(best):
            return None
        if params.temperature < GREEDY_BELOW:
            return int(self.tokens[0]) if self._is_above(best) else None
        if params.top_k:
            return self._draw_of_best(params, position)
        if best < self.bound and self.unknown:
            return None
        return self._draw_of_all(params, position)

    def logprobs(self, token: int, top: int) -> TokenLogprobs | None:
        """What `token_logprobs` gives of one of the tokens; None where rank or best tokens are not certain."""
        [*places] = np.flatnonzero(self.tokens == token).tolist()
        count = self._best(len(self.logits) + self.unknown if top == VOCABULARY else top) if top else 0
        if not places or count is None or not self._is_above(self.logits[places[0]]):
            return None
        return TokenLogprobs(
            logprob=float(self.logits[places[0]]) - self.log_normaliser,
            rank=1 + places[0],
            top_tokens=self.tokens[:count].tolist(),
            top_logprobs=[logit - self.log_normaliser for logit in self.logits[:count].tolist()],
        )

    def _is_above(self, logit: np.float32) -> bool:
        """Whether no unknown token has a logit as large."""
        return not self.unknown or bool(logit > self.bound)

    def _best(self, count: int) -> int | None:
        """How many the `count` best of all tokens are, as far as logits are finite; None if not certain."""
        found = int(np.count_nonzero(np.isfinite(self.logits[:count])))
        if self.unknown and (found < count or not self._is_above(self.logits[count - 1])):
            return None
        return found

    def _draw_of_best(self, params: SamplingParams, position: int) -> int | None:
        """The draw where there is a `top_k`: all candidates have to be known."""
        count = self._best(params.top_k)
        if count is None:
            return None
        order = self.tokens[:count].argsort()
        logits = self.logits[:count][order]
        weights = weights_below(self.logits[0], logits, params.temperature)
        candidates = Candidates(self.tokens[:count][order], logits, weights)
        if params.min_p:
            candidates.drop_unlikely(params.min_p)
        if params.top_p < 1:
            candidates = candidates.nucleus(params.top_p)
        return candidates.draw(Noise.of(params.seed, params.choice, position))

    def _draw_of_all(self, params: SamplingParams, position: int) -> int | None:
        """The draw where all tokens may be candidates: the unknown ones have to be left out, or to lose the race."""
        weights = weights_below(self.logits[0], self.logits, params.temperature)
        largest = self._largest_unknown(params.temperature)
        if params.min_p:
            weights *= weights >= params.min_p
            largest *= largest >= params.min_p
        if params.top_p < 1:
            end = self._nucleus(weights, params.top_p, self._unknown_mass(params.temperature, float(largest[0])))
        else:
            end = None if largest.any() else int(np.count_nonzero(weights))
        if end == 1:
            return int(self.tokens[0])
        noise = Noise.of(params.seed, params.choice, position)
        if end is not None:
            return first_of(noise, self.tokens[:end], weights[:end])
        if params.top_p < 1:
            return None
        return first_of_bounded(noise, self.tokens, weights, float(largest[0]), self.vocabulary)

    def _largest_unknown(self, temperature: float) -> Floats:
        """The largest weight that an unknown token may have, [1], so that it compares as the others do."""
        bound = self.bound if self.unknown else -math.inf
        return weights_below(self.logits[0], np.array([bound], dtype=np.float32), temperature)

    def _unknown_mass(self, temperature: float, largest: float) -> float:
        """A weight that all unknown tokens together do not exceed.

        With x = exp(logit - best) of each, the weights are x ** (1 / temperature). Where that exponent is at least 1,
        their sum is at most the largest x, to the exponent less 1, times the sum of x; where it is less, at most the
        power of the sum, times a power of their number (Jensen's inequality).
        """
        if not largest:
            return 0.0
        best = float(self.logits[0])
        power = 1 / temperature
        if power >= 1:
            log_sum = (self.bound - best) * (power - 1) + self.log_mass - best
        else:
            log_sum = (1 - power) * math.log(self.unknown) + power * (self.log_mass - best)
        return min(math.exp(min(log_sum, LARGEST_LOG)), self.unknown * largest) * (1 + WEIGHT_ERROR)

    def _nucleus(self, weights: Floats, top_p: float, mass: float) -> int | None:
        """How many of the best tokens are the fewest whose share reaches `top_p`; None if not certain.

        All unknown tokens together weigh at most `mass`, so the end of the nucleus is certain where it is the same with
        all of that and with nothing.
        """
        running = weights.cumsum(dtype=np.float64)
        whole = float(running[-1])
        first = int(running.searchsorted(top_p * whole * (1 - MARGIN)))
        last = int(running.searchsorted(top_p * (whole + mass) * (1 + MARGIN)))
        if first != last or last == len(running) or not self._is_above(self.logits[last]):
            return None
        return last + 1
