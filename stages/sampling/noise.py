"""The random numbers of draws: one exponential for each token at each position, whichever tokens may be drawn."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.sampling.logprobs import Doubles, TokenIds

Words = NDArray[np.uint64]

MASK = (1 << 64) - 1
"""The bits of a seed and of a key that are used."""

GAMMA = 0x9E3779B97F4A7C15
"""How far apart the states of SplitMix64 are: 2^64 divided by the golden ratio, made odd."""

ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31
"""SplitMix64's finaliser: Stafford's variant 13 of MurmurHash3's, each shift followed by its factor but the last."""

LANES = 2048
GROUP = 64
"""Tokens whose smallest number is made before the others; at most 2^12, as it is an output's last bits that choose it.

A group is every LANES-th of LANES * GROUP successive tokens, named by the first: so numpy finds the largest weights of
all groups in successive memory.
"""

PLACES = (GROUP - 1) * LANES
"""The bits by which the tokens of a group differ."""

GROUPS_FROM = 1 << 40
"""The number of the first group's output; those below are the tokens'."""


class Minima(NamedTuple):
    """The smallest number of each of some groups, and the token that has it."""

    values: Doubles
    tokens: TokenIds

    def of(self, indices: TokenIds) -> "Minima":
        """The minima at `indices`."""
        return Minima(self.values[indices], self.tokens[indices])


@dataclass(frozen=True)
class Noise:
    """Independent numbers of the exponential distribution of rate 1 by token id, made from a 64-bit key.

    They are made in groups of GROUP tokens: the smallest number of a group is itself exponential, of rate GROUP, each
    token is as likely to have it, and the others exceed it by independent numbers of rate 1, as exponentials have no
    memory (Rényi, On the theory of order statistics, 1953). So the smallest numbers of the groups, which are few, rule
    out nearly all tokens of a draw, and only what is left needs numbers of its own.

    All come from the outputs of a SplitMix64 generator whose state begins at `key`: output t for token t (Steele, Lea
    and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014).
    """

    key: int

    @classmethod
    def of(cls, seed: int, choice: int, position: int) -> "Noise":
        """The noise of this seed, choice and position; any integer may be a seed.

        The key is a number of Philox, a counter-based generator (Salmon et al., Parallel random numbers: as easy as
        1, 2, 3, SC 2011), so that the streams of neighbouring positions have nothing to do with each other.
        """
        philox = np.random.Philox(key=np.array([seed & MASK, choice], dtype=np.uint64), counter=[0, 0, 0, position])
        return cls(int(philox.random_raw()))

    def outputs(self, numbers: TokenIds) -> Words:
        """The outputs of SplitMix64 with these `numbers`, from 0."""
        states: Words = numbers.astype(np.uint64) * np.uint64(GAMMA)
        states += np.uint64((self.key + GAMMA) & MASK)
        for shift, factor in ROUNDS:
            states ^= states >> np.uint64(shift)
            states *= np.uint64(factor)
        states ^= states >> np.uint64(LAST_SHIFT)
        return states

    def minima(self, groups: TokenIds) -> Minima:
        """The smallest number of each of these `groups`."""
        outputs = self.outputs(groups + GROUPS_FROM)
        places = (outputs % np.uint64(GROUP)).astype(np.int64)
        return Minima(_exponentials(outputs) / GROUP, groups + places * LANES)

    def exponentials(self, tokens: TokenIds, minima: Minima | None = None) -> Doubles:
        """The number of each of `tokens`; `minima` are those of each token's group, if they are known."""
        least = minima or self.minima(tokens & ~PLACES)
        numbers: Doubles = least.values + _exponentials(self.outputs(tokens)) * (tokens != least.tokens)
        return numbers


def _exponentials(outputs: Words) -> Doubles:
    """-log(1 - u), where u is an odd multiple of 2^-53 made of the first 52 bits, so that it is exact and in (0, 1)."""
    uniforms = ((outputs >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    exponentials: Doubles = -np.log1p(-uniforms)
    return exponentials
