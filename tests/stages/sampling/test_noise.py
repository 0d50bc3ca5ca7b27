"""The noise of draws: SplitMix64 as published, what it depends on, and that it is even and independent."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.sampling.logprobs import Doubles, TokenIds
from stages.sampling.noise import GROUP, GROUPS_FROM, LANES, Noise
from tests.support.sampling_reference import chi_squared_bound
from tests.support.splitmix import WORD, key_with, output_of

COUNT = 10_000
CELLS = 16

PUBLISHED = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
"""What SplitMix64 gives after the seed 1234567, by https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64."""


def test_outputs_are_those_of_splitmix64_as_published() -> None:
    assert Noise(1234567).outputs(np.arange(5)).tolist() == PUBLISHED


@given(st.integers(0, WORD - 1), st.lists(st.integers(0, 2**41), min_size=1, max_size=20))
def test_outputs_are_those_of_integer_arithmetic_in_any_order(key: int, numbers: list[int]) -> None:
    assert Noise(key).outputs(np.array(numbers)).tolist() == [output_of(key, number) for number in numbers]


def exponential(output: int) -> float:
    return -math.log1p(-(2 * (output >> 12) + 1) / 2**53)


def number_of(key: int, token: int) -> float:
    """The definition: the smallest number of a token's group, and what it exceeds that by unless it has it."""
    group = token - token // LANES % GROUP * LANES
    output = output_of(key, GROUPS_FROM + group)
    has_smallest = token == group + output % GROUP * LANES
    return exponential(output) / GROUP + (0 if has_smallest else exponential(output_of(key, token)))


@given(st.integers(0, WORD - 1), st.lists(st.integers(0, 400_000), min_size=1, max_size=20))
def test_a_tokens_number_is_by_the_definition_whichever_others_are_asked_for(key: int, tokens: list[int]) -> None:
    expected = [number_of(key, token) for token in tokens]
    assert Noise(key).exponentials(np.array(tokens)).tolist() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(("output", "uniform"), [(0, 2.0**-53), (WORD - 1, 1 - 2.0**-53), (WORD // 2, 0.5 + 2.0**-53)])
@pytest.mark.parametrize("token", [0, 7, 129279])
def test_numbers_are_finite_and_above_zero_at_both_ends(output: int, uniform: float, token: int) -> None:
    noise = Noise(key_with(output, token))
    minima = noise.minima(np.array([token - token // LANES % GROUP * LANES]))
    excess = 0 if minima.tokens[0] == token else -math.log1p(-uniform)
    assert noise.exponentials(np.array([token])) == pytest.approx(minima.values + excess, rel=1e-15)
    minima = Noise(key_with(output, GROUPS_FROM + 9)).minima(np.array([9]))
    assert minima.values == pytest.approx([-math.log1p(-uniform) / GROUP], rel=1e-15)
    assert minima.tokens == [9 + output % GROUP * LANES]


def test_the_smallest_number_of_a_group_is_that_of_its_minimum() -> None:
    noise, groups = Noise.of(3, 1, 4), np.array([0, 1, LANES - 1, 3 * LANES * GROUP + 5])
    minima = noise.minima(groups)
    numbers = noise.exponentials(groups + (np.arange(GROUP) * LANES)[:, None])
    assert minima.values.tolist() == numbers.min(axis=0).tolist()
    assert minima.tokens.tolist() == (groups + numbers.argmin(axis=0) * LANES).tolist()


def test_noise_depends_on_seed_choice_and_position() -> None:
    keys = [(seed, choice, position) for seed in (0, 1, -1) for choice in (0, 1) for position in (0, 1, 2**40)]
    made = {key: Noise.of(*key) for key in keys}
    assert len({noise.key for noise in made.values()}) == len(keys)
    assert made == {key: Noise.of(*key) for key in keys}
    assert Noise.of(2**64 + 5, 0, 0) == Noise.of(5, 0, 0)


def one(seed: int, choice: int, position: int, token: int = 0) -> float:
    return float(Noise.of(seed, choice, position).exponentials(np.array([token]))[0])


def group_after_group() -> TokenIds:
    tokens = np.arange(LANES)[:, None] + np.arange(GROUP) * LANES
    return tokens.ravel()[:COUNT]


SERIES: dict[str, Callable[[], list[float]]] = {
    "tokens": lambda: Noise.of(1, 2, 3).exponentials(np.arange(COUNT)).tolist(),
    "tokens of groups": lambda: Noise.of(1, 2, 3).exponentials(group_after_group()).tolist(),
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
    for apart in (1, 2, GROUP, LANES):
        before, after = uniforms[:-apart], uniforms[apart:]
        assert abs(np.corrcoef(before, after)[0, 1]) < 5 / math.sqrt(COUNT)
        cells = np.histogram2d(before, after, bins=CELLS, range=[[0, 1], [0, 1]])[0]
        expected = len(before) / CELLS**2
        assert ((cells - expected) ** 2 / expected).sum() < chi_squared_bound(CELLS**2 - 1)


def test_tokens_of_one_group_are_independent() -> None:
    """Which of them has the smallest number, and by how much, says nothing about any two of them."""
    tokens = 5 + np.arange(3) * LANES
    numbers = np.array([Noise.of(6, 0, position).exponentials(tokens) for position in range(COUNT)])
    uniforms = -np.expm1(-numbers)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(uniforms[:, first], uniforms[:, second])[0, 1]) < 5 / math.sqrt(COUNT)
    cells = np.histogramdd(uniforms, bins=6, range=[(0.0, 1.0)] * 3)[0]
    expected = COUNT / 6**3
    assert ((cells - expected) ** 2 / expected).sum() < chi_squared_bound(6**3 - 1)


def test_the_first_of_many_tokens_is_exponential_too() -> None:
    """Draws of flat distributions read the smallest numbers alone."""
    tokens = np.arange(1000)
    firsts = np.sort([Noise.of(9, 0, position).exponentials(tokens).min() for position in range(5000)])
    distance = np.abs(-np.expm1(-firsts * 1000) - (np.arange(5000) + 0.5) / 5000).max()
    assert distance < 2.7 / math.sqrt(5000)
