"""The noise of draws: SplitMix64 as published, what it depends on, and that it is even and independent."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.sampling.logprobs import Doubles
from stages.sampling.noise import CHUNK, Noise
from tests.support.sampling_reference import chi_squared_bound
from tests.support.splitmix import WORD, key_with, output_of

COUNT = 10_000
CELLS = 16

PUBLISHED = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
"""What SplitMix64 gives after the seed 1234567, by https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64."""


def uniform_of(output: int) -> float:
    return (2 * (output >> 12) + 1) / 2**53


def test_numbers_are_those_of_splitmix64_as_published() -> None:
    assert Noise(1234567).uniforms(np.arange(5)).tolist() == [uniform_of(output) for output in PUBLISHED]


@given(st.integers(0, WORD - 1), st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_numbers_are_those_of_integer_arithmetic_in_any_order(key: int, tokens: list[int]) -> None:
    expected = [uniform_of(output_of(key, token)) for token in tokens]
    assert Noise(key).uniforms(np.array(tokens)).tolist() == expected


@pytest.mark.parametrize(("output", "uniform"), [(0, 2.0**-53), (WORD - 1, 1 - 2.0**-53), (WORD // 2, 0.5 + 2.0**-53)])
@pytest.mark.parametrize("token", [0, 7, 129279])
def test_neither_zero_nor_one_is_a_number(output: int, uniform: float, token: int) -> None:
    noise = Noise(key_with(output, token))
    assert noise.uniforms(np.array([token])).tolist() == [uniform]
    assert noise.exponentials(np.array([token])).tolist() == pytest.approx([-math.log1p(-uniform)], rel=1e-15)


@pytest.mark.parametrize("count", [1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 77])
def test_high_bits_are_the_same_for_all_tokens_and_for_some(count: int) -> None:
    noise, tokens = Noise.of(3, 1, 4), np.arange(count)
    expected = np.floor(noise.uniforms(tokens) * 2**31).astype(np.int32)
    assert (noise.high_bits(None, count) == expected).all()
    assert (noise.high_bits(tokens[::3], len(tokens[::3])) == expected[::3]).all()


def test_noise_depends_on_seed_choice_and_position() -> None:
    keys = [(seed, choice, position) for seed in (0, 1, -1) for choice in (0, 1) for position in (0, 1, 2**40)]
    made = {key: Noise.of(*key) for key in keys}
    assert len({noise.key for noise in made.values()}) == len(keys)
    assert made == {key: Noise.of(*key) for key in keys}
    assert Noise.of(2**64 + 5, 0, 0) == Noise.of(5, 0, 0)


def one(seed: int, choice: int, position: int, token: int = 0) -> float:
    return float(Noise.of(seed, choice, position).exponentials(np.array([token]))[0])


SERIES: dict[str, Callable[[], list[float]]] = {
    "tokens": lambda: Noise.of(1, 2, 3).exponentials(np.arange(COUNT)).tolist(),
    "tokens of a subset": lambda: Noise.of(1, 2, 3).exponentials(np.arange(COUNT) * 64 + 5).tolist(),
    "positions": lambda: [one(1, 2, number) for number in range(COUNT)],
    "seeds": lambda: [one(number, 2, 3) for number in range(COUNT)],
    "choices": lambda: [one(1, number, 3) for number in range(COUNT)],
    "positions and tokens": lambda: [one(1, 2, number, 1000 - number % 1000) for number in range(COUNT)],
}


@pytest.mark.parametrize("name", SERIES)
def test_noise_is_exponential_and_neighbours_are_independent(name: str) -> None:
    """Tests with error rates of one in a million or less, along each of the four keys; they are repeatable."""
    uniforms: Doubles = -np.expm1(-np.array(SERIES[name]()))
    distance = np.abs(np.sort(uniforms) - (np.arange(COUNT) + 0.5) / COUNT).max()
    assert distance < 2.7 / math.sqrt(COUNT)  # Kolmogorov-Smirnov
    for apart in (1, 2, 64):
        before, after = uniforms[:-apart], uniforms[apart:]
        assert abs(np.corrcoef(before, after)[0, 1]) < 5 / math.sqrt(COUNT)
        cells = np.histogram2d(before, after, bins=CELLS, range=[[0, 1], [0, 1]])[0]
        expected = len(before) / CELLS**2
        assert ((cells - expected) ** 2 / expected).sum() < chi_squared_bound(CELLS**2 - 1)


def test_the_first_of_many_tokens_is_exponential_too() -> None:
    """Draws of flat distributions read the smallest numbers alone."""
    tokens = np.arange(1000)
    firsts = np.sort([Noise.of(9, 0, position).exponentials(tokens).min() for position in range(5000)])
    distance = np.abs(-np.expm1(-firsts * 1000) - (np.arange(5000) + 0.5) / 5000).max()
    assert distance < 2.7 / math.sqrt(5000)
