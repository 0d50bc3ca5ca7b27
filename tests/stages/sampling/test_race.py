"""The race of tokens against the Gumbel-max trick written out, whatever the weights and the noise are."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.sampling.logprobs import Doubles, Floats, TokenIds, softmax_weights
from stages.sampling.noise import GROUP, GROUPS_FROM, LANES, Minima, Noise
from stages.sampling.race import SMALL, first_of, first_of_all
from tests.support.splitmix import key_with

BEST = 17


def unchanged(weights: Floats) -> Floats:
    return weights


def by_definition(noise: Noise, weights: Floats) -> int:
    """The largest log(weight) + Gumbel noise, which is -log of an exponential number, over all in double precision."""
    with np.errstate(divide="ignore"):
        logs = np.log(weights.astype(np.float64))
    return int((logs - np.log(noise.exponentials(np.arange(len(weights))))).argmax())


@st.composite
def all_weights(draw: st.DrawFn) -> Floats:
    """Weights of vocabularies below and above SMALL, flat or of any size, many equal or 0."""
    size = draw(st.one_of(st.integers(1, 12), st.integers(SMALL - 2, SMALL + 2), st.integers(2, 12000)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = -generator.exponential(draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0])), size=size)
    logits[: draw(st.integers(0, 5))] += draw(st.sampled_from([0.0, 6.0, 20.0]))
    if draw(st.booleans()):
        logits = np.round(logits)
    weights = softmax_weights(generator.permutation(logits).astype(np.float32), 1.0)
    dropped = generator.random(size) < draw(st.sampled_from([0.0, 0.3, 0.99]))
    weights[dropped & (weights < 1)] = 0
    return weights


@settings(deadline=None)
@given(all_weights(), st.integers(0, 2**64 - 1))
def test_the_first_is_the_best_of_log_probabilities_with_gumbel_noise(weights: Floats, key: int) -> None:
    noise = Noise(key)
    assert first_of_all(noise, weights, unchanged) == by_definition(noise, weights)


@settings(deadline=None)
@given(all_weights(), st.integers(0, 2**64 - 1), st.integers(0, 2**32))
def test_the_first_of_some_does_not_depend_on_the_others(weights: Floats, key: int, mask: int) -> None:
    """If the first of all is among those kept, it is their first, however the others are left out."""
    noise, generator = Noise(key), np.random.default_rng(mask)
    first = first_of_all(noise, weights, unchanged)
    kept = generator.random(len(weights)) < 0.3
    kept[[first, int(weights.argmax())]] = True
    some = generator.permutation(np.flatnonzero(kept))
    assert first_of(noise, some, weights[some]) == first
    assert first_of_all(noise, weights * kept, unchanged) == first
    assert first_of_all(noise, np.append(weights, np.zeros(3000, np.float32)), unchanged) == first


def test_values_are_turned_to_weights() -> None:
    values = np.random.default_rng(2).normal(size=40_000).astype(np.float32) * 5
    weights = softmax_weights(values, 0.7)
    for key in range(20):
        chosen = first_of_all(Noise(key), values, lambda some: np.exp((some - values.max()) / np.float32(0.7)))
        assert chosen == by_definition(Noise(key), weights)


VOCABULARIES: dict[str, Callable[[np.random.Generator], Doubles]] = {
    "flat": lambda _: np.zeros(129280),
    "several blocks of groups": lambda generator: generator.normal(size=2 * LANES * GROUP + LANES + 5),
    "a block and a token": lambda generator: generator.normal(size=LANES * GROUP + 1) * 0.1,
    "spread": lambda generator: generator.normal(size=129280) * 3,
    "peaked": lambda generator: generator.normal(size=129280) + np.where(np.arange(129280) == 77777, 14, 0),
    "underflowing": lambda generator: generator.normal(size=129280) * 40,
    "half excluded": lambda generator: np.where(generator.random(129280) < 0.5, -np.inf, 0.0),
    "few allowed": lambda generator: np.where(generator.random(129280) < 1e-4, generator.normal(size=129280), -np.inf),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_first_of_a_large_vocabulary_is_by_the_definition(name: str) -> None:
    weights = softmax_weights(VOCABULARIES[name](np.random.default_rng(1)).astype(np.float32), 1.0)
    for position in range(30):
        noise = Noise.of(0, 0, position)
        assert first_of_all(noise, weights, unchanged) == by_definition(noise, weights)


@pytest.mark.parametrize("weight", [0.0, 1e-44, 1e-30, 1e-18, 1e-15, 0.5])
@pytest.mark.parametrize("output", [0, 2**12, 2**33, 2**64 - 1, 2**64 - 1 - GROUP // 2])
@pytest.mark.parametrize("number", [0, BEST, 3999, 4999, GROUPS_FROM, GROUPS_FROM + BEST, GROUPS_FROM + 1000])
def test_the_first_is_by_the_definition_at_both_ends_of_the_noise(weight: float, output: int, number: int) -> None:
    """Where a token or a group has the smallest number or the largest that there is, whatever its weight is."""
    weights = np.full(SMALL + 1000, weight, dtype=np.float32)
    weights[BEST], weights[4000:] = 1, 0
    noise = Noise(key_with(output, number))
    assert first_of_all(noise, weights, unchanged) == by_definition(noise, weights)


def test_equal_times_rank_by_token_id() -> None:
    class Even(Noise):
        def exponentials(self, tokens: TokenIds, minima: Minima | None = None) -> Doubles:
            return np.ones(len(tokens))

    assert first_of(Even(0), np.array([9, 3, 7, 5]), np.array([1, 0.5, 1, 1], dtype=np.float32)) == 5
