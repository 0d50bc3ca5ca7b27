"""Draws from few known logits, wherever they prove what would be drawn from all.

A chip gives the best tokens of its share of the vocabulary, so that of all others it is known that none has a larger
logit than a bound, and what they weigh together. That is enough for most draws; where it is not, the answer is None,
and whoever asks has to get the logits of the whole vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from stages.sampling.draw import Candidates
from stages.sampling.grammar import Mask
from stages.sampling.logits_options import LogitsOptions
from stages.sampling.logprobs import Floats, TokenIds, weights_below
from stages.sampling.noise import Noise
from stages.sampling.race import first_of, first_of_bounded
from stages.step import GREEDY_BELOW, VOCABULARY, SamplingParams, TokenLogprobs

SUM_ERROR = 1 / 256
"""How far a chip's sum of weights may be from the true one, as a share: the rounding of a bfloat16."""

MARGIN = 1e-9
"""More than the roundings of sums of weights, in float64, add up to, as a share."""

WEIGHT_ERROR = 1e-5
"""More than the rounding of a weight, in float32, and of the exponents that bound it, as a share."""


@dataclass(frozen=True)
class KnownLogits:
    """The logits of some tokens of a `vocabulary`, in ascending order of their ids, and what bounds all other logits.

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
        """The known logits of a `vocabulary`, of which the normaliser is known up to SUM_ERROR."""
        unknown = vocabulary - len(tokens)
        known = float(np.exp(logits - np.float64(log_normaliser)).sum())
        rest = max(1 + SUM_ERROR - known, 0.0) if unknown else 0.0
        log_mass = log_normaliser + math.log(rest) if rest else -math.inf
        return cls(tokens, logits, bound, unknown, log_mass, log_normaliser, vocabulary)

    @property
    def is_finite(self) -> bool:
        """Whether all logits are numbers, and the largest of them is finite."""
        return math.isfinite(self.log_normaliser) and bool(np.isfinite(self.logits.max()))

    def changed(
        self, options: LogitsOptions, answer: Sequence[int], answered: int, mask: Mask | None
    ) -> "KnownLogits | None":
        """The logits after options have changed them, as `LogitsOptions.apply` does; None where these may raise others.

        Options that lower unknown logits leave their bounds true.
        """
        changed = options.apply_to_some(self.tokens, self.logits, self.unknown, answer, answered, mask)
        if changed is None:
            return None
        logits, unknown = changed
        return replace(self, logits=logits, unknown=unknown)

    def draw(self, params: SamplingParams, position: int) -> int | None:
        """What `draw_token` draws from the logits of all tokens; None where that is not certain."""
        best = self.logits.max()
        if not math.isfinite(best):
            return None
        if params.temperature < GREEDY_BELOW:
            return int(self.tokens[self.logits.argmax()]) if self._is_above(best) else None
        noise = Noise.of(params.seed, params.choice, position)
        if params.top_k:
            return self._draw_of_best(params, noise)
        if best < self.bound and self.unknown:
            return None
        return self._draw_of_all(params, noise)

    def logprobs(self, token: int, top: int) -> TokenLogprobs | None:
        """What `token_logprobs` gives of one of the tokens; None where rank or best tokens are not certain."""
        place = int(self.tokens.searchsorted(token))
        if place == len(self.tokens) or self.tokens[place] != token:
            return None
        logit = self.logits[place]
        ranked = [] if not top else self._ranked(len(self.logits) + self.unknown if top == VOCABULARY else top)
        if not self._is_above(logit) or ranked is None:
            return None
        return TokenLogprobs(
            logprob=float(logit) - self.log_normaliser,
            rank=1 + int(np.count_nonzero(self.logits > logit)) + int(np.count_nonzero(self.logits[:place] == logit)),
            top_tokens=[int(self.tokens[best]) for best in ranked],
            top_logprobs=[float(self.logits[best]) - self.log_normaliser for best in ranked],
        )

    def _is_above(self, logit: np.float32) -> bool:
        """Whether no unknown token has a logit as large."""
        return not self.unknown or bool(logit > self.bound)

    def _ranked(self, count: int) -> list[int] | None:
        """The indices of the `count` best of all tokens with a finite logit, the best first; None if not certain."""
        order = np.argsort(-self.logits, kind="stable")[:count]
        ranked = order[np.isfinite(self.logits[order])]
        if self.unknown and (len(ranked) < count or not self._is_above(self.logits[ranked[-1]])):
            return None
        return [int(index) for index in ranked]

    def _draw_of_best(self, params: SamplingParams, noise: Noise) -> int | None:
        """The draw where there is a `top_k`: all candidates have to be known."""
        ranked = self._ranked(params.top_k)
        if ranked is None:
            return None
        chosen = np.sort(np.array(ranked))
        logits = self.logits[chosen]
        candidates = Candidates(self.tokens[chosen], logits, weights_below(logits.max(), logits, params.temperature))
        if params.min_p:
            candidates.drop_unlikely(params.min_p)
        if params.top_p < 1:
            candidates = candidates.nucleus(params.top_p)
        return candidates.draw(noise)

    def _draw_of_all(self, params: SamplingParams, noise: Noise) -> int | None:
        """The draw where all tokens may be candidates: the unknown ones have to be left out, or to lose the race."""
        weights = weights_below(self.logits.max(), self.logits, params.temperature)
        largest = self._largest_unknown(params.temperature)
        if params.min_p:
            weights *= weights >= params.min_p
            largest *= largest >= params.min_p
        if params.top_p < 1:
            mass = self._unknown_mass(params.temperature, float(largest[0]))
            chosen = self._nucleus(weights, params.top_p, mass)
            return None if chosen is None else first_of(noise, self.tokens[chosen], weights[chosen])
        if not largest.any():
            kept = np.flatnonzero(weights > 0)
            return first_of(noise, self.tokens[kept], weights[kept])
        return first_of_bounded(noise, self.tokens, weights, float(largest[0]), self.vocabulary)

    def _largest_unknown(self, temperature: float) -> Floats:
        """The largest weight that an unknown token may have, [1], so that it compares as the others do."""
        bound = self.bound if self.unknown else -math.inf
        return weights_below(self.logits.max(), np.array([bound], dtype=np.float32), temperature)

    def _unknown_mass(self, temperature: float, largest: float) -> float:
        """A weight that all unknown tokens together do not exceed.

        With x = exp(logit - best) of each, the weights are x ** (1 / temperature). Where that exponent is at least 1,
        their sum is at most the largest x, to the exponent less 1, times the sum of x; where it is less, at most the
        power of the sum, times a power of their number (Jensen's inequality).
        """
        if not largest:
            return 0.0
        best = float(self.logits.max())
        power = 1 / temperature
        if power >= 1:
            log_sum = (self.bound - best) * (power - 1) + self.log_mass - best
        else:
            log_sum = (1 - power) * math.log(self.unknown) + power * (self.log_mass - best)
        return min(math.exp(min(log_sum, 700.0)), self.unknown * largest) * (1 + WEIGHT_ERROR)

    def _nucleus(self, weights: Floats, top_p: float, mass: float) -> TokenIds | None:
        """The indices of the fewest best tokens whose share reaches `top_p`; None if not certain.

        All unknown tokens together weigh at most `mass`, so the end of the nucleus is certain where it is the same with
        all of that and with nothing.
        """
        order = np.argsort(-self.logits, kind="stable")
        running = weights[order].cumsum(dtype=np.float64)
        whole = float(running[-1])
        first, last = running.searchsorted(
            [top_p * whole * (1 - MARGIN), top_p * (whole + mass) * (1 + MARGIN)]
        ).tolist()
        if first != last or last == len(order) or not self._is_above(self.logits[order[last]]):
            return None
        chosen: TokenIds = np.sort(order[: last + 1])
        return chosen[weights[chosen] > 0]
