"""Sampling against a plain reading of its definition, and by statistics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.sampling import sample_token, sample_tokens, uniform
from stages.step import SamplingParams


def params(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0) -> SamplingParams:
    return SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, choice=0)


def distribution(logits: list[float], given_params: SamplingParams) -> dict[int, float]:
    """The probabilities a token should have, by the definitions, in plain Python."""
    weights = {token: math.exp((value - max(logits)) / given_params.temperature) for token, value in enumerate(logits)}
    best = sorted(weights, key=lambda token: (-weights[token], token))
    best = best[: given_params.top_k or len(best)]
    total = sum(weights[token] for token in best)
    kept: dict[int, float] = {}
    for token in best:
        if sum(kept.values()) >= given_params.top_p:
            break
        kept[token] = weights[token] / total
    return {token: probability / sum(kept.values()) for token, probability in kept.items()}


def chi_squared_bound(degrees: int) -> float:
    """The 1 - 1e-6 quantile, by Wilson and Hilferty's approximation (4.75 standard deviations)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.75 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize(
    "chosen",
    [
        params(),
        params(temperature=0.5),
        params(temperature=2.0),
        params(top_k=3),
        params(top_p=0.7),
        params(temperature=0.8, top_k=5, top_p=0.9),
    ],
)
def test_frequencies_follow_the_definition(chosen: SamplingParams) -> None:
    """A chi-squared test with an error rate of one in a million a case; the draws are seeded, so it is repeatable."""
    logits = [1.3, -0.4, 2.0, 0.1, 0.9, -3.0, 1.1, 0.0]
    expected = distribution(logits, chosen)
    draws = 4000
    rows = torch.tensor(logits)
    counts = dict.fromkeys(range(len(logits)), 0)
    for position in range(draws):
        counts[sample_token(rows, chosen, position)] += 1
    assert {token for token, count in counts.items() if count} <= set(expected)
    statistic = sum((counts[token] - draws * p) ** 2 / (draws * p) for token, p in expected.items())
    assert statistic < chi_squared_bound(max(1, len(expected) - 1))


@given(
    st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20),
    st.floats(0.01, 2.0),
    st.floats(0.01, 1.0),
    st.integers(0, 25),
    st.integers(-(2**63), 2**64),
)
def test_only_tokens_within_the_cut_are_drawn(
    logits: list[float], temperature: float, top_p: float, top_k: int, seed: int
) -> None:
    chosen = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, choice=1)
    token = sample_token(torch.tensor(logits), chosen, 7)
    better = sum(1 for other, value in enumerate(logits) if (value, -other) > (logits[token], -token))
    assert better < (top_k or len(logits))
    mass = sum(math.exp((value - max(logits)) / temperature) for value in sorted(logits, reverse=True)[: top_k or None])
    ahead = sum(math.exp((v - max(logits)) / temperature) for v in sorted(logits, reverse=True)[:better])
    assert ahead / mass < top_p + 1e-9


def test_temperature_zero_takes_the_best_token_and_the_first_among_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    assert sample_tokens(logits, [params(temperature=0.0)] * 2, [0, 0]) == [1, 0]


def test_a_row_draws_the_same_token_alone_and_in_any_batch() -> None:
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(3))
    chosen = [params(seed=row, temperature=1.0 if row % 3 else 0.0) for row in range(16)]
    positions = list(range(100, 116))
    together = sample_tokens(logits, chosen, positions)
    alone = [sample_tokens(logits[row : row + 1], [chosen[row]], [positions[row]])[0] for row in range(16)]
    backwards = sample_tokens(logits.flip(0), chosen[::-1], positions[::-1])[::-1]
    assert together == alone == backwards


def test_random_numbers_depend_on_seed_choice_and_position() -> None:
    keys = [(seed, choice, position) for seed in (0, 1, -1) for choice in (0, 1) for position in (0, 1, 2**40)]
    drawn = {key: uniform(*key) for key in keys}
    assert len(set(drawn.values())) == len(keys)
    assert all(0 <= value < 1 for value in drawn.values())
    assert drawn == {key: uniform(*key) for key in keys}


def test_random_numbers_are_uniform() -> None:
    values = np.sort([uniform(5, 0, position) for position in range(2000)])
    distance = np.abs(values - (np.arange(2000) + 0.5) / 2000).max()
    assert distance < 2.6 / math.sqrt(2000)  # Kolmogorov-Smirnov, error rate under 3e-6
