"""The exponential race that draws a token: each comes at its noise divided by its weight, and the first is drawn."""

from collections.abc import Callable

import numpy as np

from stages.sampling.logprobs import Doubles, Floats, TokenIds
from stages.sampling.noise import GROUP, LANES, Minima, Noise
from weights.sizes import ceil_div

ROUNDING = 1e-6
"""More than the roundings of a weight and of its product with a time, in float32, add up to."""

HOPELESS = 16.0
"""Rivals that may be expected to come earlier than the first of some tokens, so that all of them are not looked for."""

SMALL = 4096
"""So many tokens get their times at once: to rule most of them out would take as long."""


def first_of(noise: Noise, tokens: TokenIds, weights: Floats, minima: Minima | None = None) -> int:
    """The first of `tokens`, which are in any order, each at the rate of its weight; equal times rank by token id.

    This is the Gumbel-max trick: the token with the largest log(weight) - log(noise), where -log(noise) is Gumbel
    noise, so that each has its share of all weights as its probability. One of the weights is above 0.

    As a token's noise depends on no other token, two models that draw with the same noise agree with a probability of
    at least (1 - TV) / (1 + TV), where TV is the total variation distance of what they draw from (Daliri et al.,
    arXiv:2408.07978).
    """
    times = _times(noise.exponentials(tokens, minima), weights)
    return int(tokens[times == times.min()].min())


def first_of_all(noise: Noise, values: Floats, weigh: Callable[[Floats], Floats]) -> int:
    """The first of the whole vocabulary, whose `values` [vocabulary] `weigh` turns to weights.

    It turns each value by itself, and a larger one to no smaller weight. A token cannot come before the smallest noise
    of its group divided by the largest weight in it: that rules out most groups, and most tokens of the others.
    """
    if len(values) <= SMALL:
        return first_of(noise, np.arange(len(values)), weigh(values))
    largest = _largest_of_groups(values)
    firsts = np.arange(0, len(largest) * LANES * GROUP, LANES * GROUP)[:, None] + np.arange(LANES)
    minima = noise.minima(firsts.ravel())
    latest = _latest(noise, minima, values, weigh)
    groups = np.flatnonzero(minima.values <= weigh(largest.ravel()) * latest)
    tokens = firsts.ravel()[groups] + (np.arange(GROUP) * LANES)[:, None]
    weights = weigh(values.take(tokens, mode="clip"))
    near = (minima.values[groups] <= weights * latest) & (tokens < len(values))
    of_near = groups[near.nonzero()[1]]
    return first_of(noise, tokens[near], weights[near], minima.of(of_near))


def first_of_bounded(noise: Noise, tokens: TokenIds, weights: Floats, largest: float, vocabulary: int) -> int | None:
    """The first of the whole vocabulary, given the weights of some `tokens`, one of which is above 0.

    None where another token, whose weight may be as much as `largest`, could come before it.
    """
    times = _times(noise.exponentials(tokens), weights)
    first = times.min()
    latest = float(first) * largest * (1 + ROUNDING)
    if latest * vocabulary > HOPELESS:
        return None
    groups = np.arange(0, ceil_div(vocabulary, LANES * GROUP) * LANES * GROUP, LANES * GROUP)
    firsts = (groups[:, None] + np.arange(LANES)).ravel()
    minima = noise.minima(firsts)
    near = np.flatnonzero(minima.values <= latest)
    rivals = firsts[near] + (np.arange(GROUP) * LANES)[:, None]
    numbers = noise.exponentials(rivals.ravel(), minima.of(np.tile(near, GROUP)))
    early = rivals.ravel()[numbers <= latest]
    if not np.isin(early[early < vocabulary], tokens).all():
        return None
    return int(tokens[times == first].min())


def _latest(noise: Noise, minima: Minima, values: Floats, weigh: Callable[[Floats], Floats]) -> float:
    """A time at which some token has come: one that has the smallest noise of its group, or the best of all."""
    inside = minima.tokens < len(values)
    best = np.array([values.argmax()])
    of_best = minima.of(best // (LANES * GROUP) * LANES + best % LANES)
    tokens = np.append(minima.tokens[inside], best)
    numbers = np.append(minima.values[inside], noise.exponentials(best, of_best))
    return float(_times(numbers, weigh(values[tokens])).min()) * (1 + ROUNDING)


def _times(numbers: Doubles, weights: Floats) -> Doubles:
    with np.errstate(divide="ignore"):
        times: Doubles = numbers / weights
    return times


def _largest_of_groups(values: Floats) -> Floats:
    """The largest value of each group [., LANES], minus infinity where it has none."""
    size = LANES * GROUP
    largest = np.full((ceil_div(len(values), size), LANES), -np.inf, dtype=np.float32)
    for begin, row in zip(range(0, len(values), size), largest, strict=True):
        part = values[begin : begin + size]
        whole = len(part) // LANES * LANES
        if whole:
            part[:whole].reshape(-1, LANES).max(axis=0, out=row)
        rest = part[whole:]
        np.maximum(row[: len(rest)], rest, out=row[: len(rest)])
    return largest
