"""The random numbers of draws: one exponential for each token at each position, whichever tokens may be drawn."""

from dataclasses import dataclass

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

HIGH_BITS = 31
"""The first bits of a number: the finaliser's last step leaves them as they are, and an int32 holds them."""

LEAST = 2.0**-53
"""The smallest of the uniform numbers; the largest is 1 - LEAST, and both are exact in float64."""

CHUNK = 1 << 14
"""Tokens whose numbers are made at once, so that they stay in a core's cache."""

STEPS: Words = np.arange(CHUNK, dtype=np.uint64) * np.uint64(GAMMA)
STEPS.flags.writeable = False


@dataclass(frozen=True)
class Noise:
    """Random numbers by token id: token t has output number t of a SplitMix64 generator whose state begins at `key`.

    Steele, Lea and Flood, Fast splittable pseudorandom number generators (OOPSLA 2014).
    """

    key: int

    @classmethod
    def of(cls, seed: int, choice: int, position: int) -> "Noise":
        """The noise of this seed, choice and position; any integer may be a seed.

        The key is a number of Philox, a counter-based generator (Salmon et al., Parallel random numbers: as easy as
        1, 2, 3, SC 2011), so that keys which differ in one bit have nothing to do with each other.
        """
        philox = np.random.Philox(key=np.array([seed & MASK, choice], dtype=np.uint64), counter=[0, 0, 0, position])
        return cls(int(philox.random_raw()))

    def uniforms(self, tokens: TokenIds) -> Doubles:
        """A number in (0, 1) for each of `tokens`: odd multiples of 2^-53, all with the same chance."""
        words = self._states(tokens)
        _mix(words, np.empty_like(words))
        words ^= words >> np.uint64(LAST_SHIFT)
        # Exact: the sum has 53 bits at most.
        uniforms: Doubles = (words >> np.uint64(12)).astype(np.float64) * 2.0**-52 + LEAST
        return uniforms

    def exponentials(self, tokens: TokenIds) -> Doubles:
        """A number of the exponential distribution of rate 1 for each of `tokens`, never less than its uniform one."""
        exponentials: Doubles = -np.log1p(-self.uniforms(tokens))
        return exponentials

    def high_bits(self, tokens: TokenIds | None, count: int) -> NDArray[np.int32]:
        """The uniform numbers of `tokens`, or of the first `count` if None, times 2^HIGH_BITS and rounded down.

        These take a fraction of the time, and are enough to tell of nearly all tokens that they are not drawn.
        """
        high = np.empty(count, dtype=np.int32)
        spare: Words = np.empty(min(count, CHUNK), dtype=np.uint64)
        words = np.empty_like(spare)
        for begin in range(0, count, CHUNK):
            part = high[begin : begin + CHUNK]
            states = words[: len(part)]
            if tokens is None:
                np.add(STEPS[: len(part)], self._state(begin), out=states)
            else:
                states[:] = self._states(tokens[begin : begin + CHUNK])
            _mix(states, spare[: len(part)])
            states >>= np.uint64(64 - HIGH_BITS)
            part[:] = states
        return high

    def _state(self, token: int) -> np.uint64:
        state: np.uint64 = np.uint64((self.key + (token + 1) * GAMMA) & MASK)
        return state

    def _states(self, tokens: TokenIds) -> Words:
        states: Words = tokens.astype(np.uint64) * np.uint64(GAMMA)
        states += self._state(0)
        return states


def _mix(words: Words, spare: Words) -> None:
    """Finalises `words` but for the last step; `spare` is overwritten."""
    for shift, factor in ROUNDS:
        np.right_shift(words, np.uint64(shift), out=spare)
        words ^= spare
        words *= np.uint64(factor)
