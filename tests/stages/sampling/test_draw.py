"""Draws of tokens against the definitions written out, by statistics, and by what they must not depend on."""

import math
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.sampling.draw import Candidates, draw_token
from stages.sampling.logprobs import Doubles, Floats, TokenIds
from stages.sampling.noise import Noise
from stages.sampling.rows import WholeRows
from stages.sampling.sampler import Sampler
from stages.step import NO_TOKEN, VOCABULARY, Admission, SamplingParams, Segment, Step, TokenLogprobs
from tests.support.sampling_reference import changed_logits, chi_squared_bound, distribution, ranked

LOGITS = [1.3, -0.4, 2.0, 0.1, 0.9, -3.0, 1.1, 0.0]
DRAWS = 3000


def params(temperature: float = 1.0, **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": temperature, "top_p": 1.0, "top_k": 0, "seed": 0, "choice": 0, **options})


def sampled(
    logits: torch.Tensor, chosen: list[SamplingParams], tokens: list[list[int]]
) -> list[tuple[int, TokenLogprobs | None]]:
    """Samples a token for each row, for requests with `tokens`, of which the first two are the prompt."""
    sampler = Sampler(logits.shape[1])
    slots = range(len(chosen))
    admissions = [Admission(slot=slot, sampling=chosen[slot], tokens=tokens[slot], prompt_tokens=2) for slot in slots]
    segments = [
        Segment(slot=slot, start=len(tokens[slot]) - 1, tokens=[0], new_blocks=[], sample=True) for slot in slots
    ]
    step = Step(epoch=1, step_id=1, mode="decode", segments=segments, admissions=admissions, ended=[])
    sampler.apply(sampler.prepare(step))
    drawn = sampler.sample(step, WholeRows(logits.numpy()))
    return list(zip(drawn.tokens, drawn.logprobs, strict=True))


PROMPT, ANSWER = [2, 0], [6, 6, 1]
CASES = {
    "plain": params(),
    "cold": params(temperature=0.5),
    "top-p": params(top_p=0.7),
    "min-p": params(min_p=0.2),
    "top-k-and-p": params(temperature=2.0, top_k=5, top_p=0.9),
    "all-cuts": params(temperature=1.5, top_k=6, top_p=0.95, min_p=0.1),
    "repetition": params(repetition_penalty=1.8),
    "presence-and-frequency": params(presence_penalty=1.0, frequency_penalty=-0.5),
    "bias": params(logit_bias={5: 4.0, 2: -1.0}),
    "allowed": params(allowed_token_ids=[5, 1, 4]),
    "bans": params(bad_words=[[6, 1, 2], [0], [1, 3]], min_tokens=4, stop_token_ids=[4]),
    "everything": params(
        temperature=0.9,
        top_k=4,
        top_p=0.95,
        min_p=0.05,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        logit_bias={1: 2.0},
        bad_words=[[1, 7]],
        min_tokens=9,
        stop_token_ids=[3],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_follow_the_definition(name: str) -> None:
    """A chi-squared test with an error rate of one in a million per case; the draws are seeded, so it is repeatable."""
    chosen = CASES[name]
    expected = distribution(changed_logits(LOGITS, chosen, PROMPT, ANSWER), chosen)
    fields = {field: getattr(chosen, field) for field in chosen.__struct_fields__}
    seeds = [SamplingParams(**{**fields, "seed": seed}) for seed in range(DRAWS)]
    rows = torch.tensor([LOGITS]).expand(DRAWS, -1)
    counts = dict.fromkeys(range(len(LOGITS)), 0)
    for token, _ in sampled(rows, seeds, [PROMPT + ANSWER] * DRAWS):
        counts[token] += 1
    assert {token for token, count in counts.items() if count} <= set(expected)
    statistic = sum((counts[token] - DRAWS * p) ** 2 / (DRAWS * p) for token, p in expected.items())
    assert statistic < chi_squared_bound(max(1, len(expected) - 1))


def test_draws_at_the_positions_of_one_request_follow_the_definition() -> None:
    """The same test with draws that differ in position and not in seed."""
    expected = distribution(LOGITS, params())
    row = np.array(LOGITS, dtype=np.float32)
    tokens = [draw_token(row, params(), position) for position in range(DRAWS)]
    statistic = sum((tokens.count(token) - DRAWS * p) ** 2 / (DRAWS * p) for token, p in expected.items())
    assert statistic < chi_squared_bound(len(expected) - 1)


@st.composite
def rows(draw: st.DrawFn) -> list[float]:
    """Logits of small and larger vocabularies, many of them equal, flat or with a few peaks, some minus infinity."""
    size = draw(st.one_of(st.integers(1, 12), st.integers(100, 2000)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = generator.normal(size=size) * draw(st.sampled_from([0.0, 0.5, 3.0]))
    values[: draw(st.integers(0, 5))] += draw(st.sampled_from([0.0, 6.0, 12.0]))
    if draw(st.booleans()):
        values = np.round(values * 4) / 4
    values[generator.random(size) < draw(st.sampled_from([0.0, 0.3, 0.9]))] = -np.inf
    values[generator.integers(size)] = 0.5
    return [float(value) for value in generator.permutation(values.astype(np.float32))]


@st.composite
def cuts(draw: st.DrawFn) -> SamplingParams:
    return params(
        temperature=draw(st.floats(0.05, 3.0)),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 3, 7, 50, 10**6])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.999, 0.95, 0.5, 0.1, 1e-6])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0])),
    )


def cut(logits: list[float] | Floats, chosen: SamplingParams) -> Candidates:
    candidates = Candidates.of(np.array(logits, dtype=np.float32), chosen.top_k, chosen.temperature)
    candidates.drop_unlikely(chosen.min_p)
    return candidates.nucleus(chosen.top_p) if chosen.top_p < 1 else candidates


def tokens_of(candidates: Candidates) -> TokenIds:
    return np.arange(len(candidates.weights)) if candidates.tokens is None else candidates.tokens


@settings(deadline=None)
@given(rows(), cuts())
def test_what_may_be_drawn_is_what_the_definitions_keep(logits: list[float], chosen: SamplingParams) -> None:
    candidates = cut(logits, chosen)
    kept = set(tokens_of(candidates)[candidates.weights > 0].tolist())
    assert sorted(kept) == sorted(ranked(logits)[: len(kept)])
    # Rounding decides if a share is reached to within a few units in the last place of a float32.
    assert kept <= set(distribution(logits, chosen, slack=1e-5))
    assert kept >= {token for token, p in distribution(logits, chosen, slack=-1e-5).items() if p > 1e-30}


def drawn_by_definition(candidates: Candidates, noise: Noise) -> int:
    """The largest log(weight) + Gumbel noise, which is -log of an exponential number, over all in double precision."""
    tokens, weights = tokens_of(candidates), candidates.weights.astype(np.float64)
    with np.errstate(divide="ignore"):
        return int(tokens[(np.log(weights) - np.log(noise.exponentials(tokens))).argmax()])


@settings(deadline=None)
@given(rows(), cuts(), st.integers(0, 2**40))
def test_a_draw_is_the_best_of_log_probabilities_with_gumbel_noise(
    logits: list[float], chosen: SamplingParams, position: int
) -> None:
    expected = drawn_by_definition(cut(logits, chosen), Noise.of(chosen.seed, chosen.choice, position))
    assert draw_token(np.array(logits, dtype=np.float32), chosen, position) == expected


@pytest.mark.parametrize(
    "chosen", [params(), params(top_p=0.95), params(top_k=3000), params(temperature=0.3, top_p=0.9)]
)
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
def test_draws_from_a_large_vocabulary_are_by_the_definition(chosen: SamplingParams, spread: float) -> None:
    logits = np.random.default_rng(1).normal(size=129280).astype(np.float32) * np.float32(spread)
    candidates = cut(logits, chosen)
    for position in range(20):
        assert draw_token(logits, chosen, position) == drawn_by_definition(candidates, Noise.of(0, 0, position))


@settings(deadline=None)
@given(rows(), st.floats(0.1, 3.0), st.integers(0, 2**40), st.integers(0, 2**32))
def test_a_draw_does_not_depend_on_candidates_that_are_dropped(
    logits: list[float], temperature: float, position: int, mask: int
) -> None:
    """If the token drawn from all is among those kept, it is drawn from these, however the others were dropped."""
    noise, whole = Noise.of(1, 0, position), cut(logits, params(temperature=temperature))
    drawn = whole.draw(noise)
    kept = np.random.default_rng(mask).random(len(logits)) < 0.3
    kept[[drawn, int(np.argmax(logits))]] = True
    tokens = np.flatnonzero(kept)
    assert Candidates(tokens, whole.logits[tokens], whole.weights[tokens]).draw(noise) == drawn
    assert Candidates(None, whole.logits, whole.weights * kept).draw(noise) == drawn
    excluded = np.where(kept, np.array(logits, dtype=np.float32), np.float32(-np.inf))
    assert draw_token(excluded, params(temperature=temperature, seed=1), position) == drawn


PAIRS, POSITIONS = 40, 300


def pair_of_logits(generator: np.random.Generator) -> tuple[Floats, Floats]:
    """Two rows of logits, flat or peaked, from nearly equal to unlike; some tokens are excluded from one alone."""
    size = int(generator.choice([2, 5, 40, 300]))
    first = generator.normal(size=size) * generator.choice([0.0, 1.0, 4.0])
    second = first + generator.normal(size=size) * generator.choice([0.1, 0.5, 2.0])
    if generator.random() < 0.3:
        second[: size // 3] = -np.inf
    return first.astype(np.float32), second.astype(np.float32)


def probabilities(logits: Floats) -> Doubles:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    probabilities: Doubles = weights / weights.sum()
    return probabilities


def agreement(p: Doubles, q: Doubles) -> float:
    """The chance that the races of `p` and `q` with the same noise end alike: sum over t of 1 / sum over i of
    max(p_i / p_t, q_i / q_t), as i is behind t in both races with noise of at least that rate (Daliri et al.)."""
    both = np.flatnonzero((p > 0) & (q > 0))
    return math.fsum(1 / np.maximum(p / p[token], q / q[token]).sum() for token in both)


def test_two_models_draws_agree_as_often_as_they_can_without_communication() -> None:
    """Error rates under one in a million: five standard deviations for each pair and for all together."""
    generator = np.random.default_rng(4)
    agreed, bounds, limits = [], [], []
    for pair in range(PAIRS):
        logits = pair_of_logits(generator)
        p, q = map(probabilities, logits)
        variation = float(np.abs(p - q).sum() / 2)
        tokens = [[draw_token(row, params(seed=pair), position) for position in range(POSITIONS)] for row in logits]
        share = sum(one == other for one, other in zip(*tokens, strict=True)) / POSITIONS
        expected = agreement(p, q)
        assert abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / POSITIONS) + 0.01
        agreed.append(share)
        bounds.append((1 - variation) / (1 + variation))
        limits.append(1 - variation)
    deviation = 5 * 0.5 / math.sqrt(PAIRS * POSITIONS)
    assert np.mean(bounds) - deviation <= np.mean(agreed) <= np.mean(limits) + deviation
    # The pairs are such that the bounds say something: neither all alike nor all different.
    assert 0.3 < np.mean(bounds) < np.mean(limits) < 0.9


@given(rows(), cuts(), st.integers(-(2**63), 2**64), st.integers(0, 2**40))
@settings(deadline=None)
def test_only_tokens_within_the_cuts_are_drawn(
    logits: list[float], chosen: SamplingParams, seed: int, position: int
) -> None:
    fields = {field: getattr(chosen, field) for field in chosen.__struct_fields__}
    seeded = SamplingParams(**{**fields, "seed": seed})
    assert draw_token(np.array(logits, dtype=np.float32), seeded, position) in distribution(logits, chosen, slack=1e-5)


def test_temperature_zero_takes_the_best_token_and_the_first_among_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0], [-1.0, -0.0, 0.0]])
    assert [token for token, _ in sampled(logits, [params(temperature=0.0)] * 3, [PROMPT] * 3)] == [1, 0, 1]


def test_temperatures_below_a_hundred_thousandth_are_greedy() -> None:
    close = np.array([1.0, 1.0 + 1e-6], dtype=np.float32)
    assert {draw_token(close, params(temperature=0.99e-5), position) for position in range(50)} == {1}
    assert {draw_token(close, params(temperature=1.01e-5), position) for position in range(50)} == {0, 1}


def test_logits_that_are_not_finite_give_a_token_all_the_same() -> None:
    for row in ([0.0, math.nan, 1.0], [0.0, math.inf, 1.0]):
        chosen = params(top_k=2, top_p=0.9, min_p=0.1)
        assert draw_token(np.array(row, dtype=np.float32), chosen, 0) == 1
    assert draw_token(np.full(3, -np.inf, dtype=np.float32), params(), 0) == 0


@pytest.mark.parametrize("vocabulary", [50, 1003])
def test_a_row_gives_the_same_alone_and_in_any_batch(vocabulary: int) -> None:
    logits = torch.randn(len(CASES), vocabulary, generator=torch.Generator().manual_seed(3)) * 3
    chosen = [*CASES.values()]
    chosen[1::3] = [params(temperature=0.0, logprobs=3, presence_penalty=1.0)] * len(chosen[1::3])
    tokens = [[1, 2, *range(row % 4)] for row in range(len(chosen))]
    together = sampled(logits, chosen, tokens)
    alone = [sampled(logits[row : row + 1], [chosen[row]], [tokens[row]])[0] for row in range(len(chosen))]
    backwards = sampled(logits.flip(0), chosen[::-1], tokens[::-1])[::-1]
    strided = sampled(torch.stack([logits, logits], dim=1)[:, 1], chosen, tokens)
    assert together == alone == backwards == strided


def test_the_models_logits_stay_as_they_are() -> None:
    logits = torch.randn(len(CASES), 50, generator=torch.Generator().manual_seed(3))
    before = logits.clone()
    sampled(logits, [*CASES.values()], [PROMPT + ANSWER] * len(CASES))
    assert torch.equal(logits, before)


@pytest.fixture
def any_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("any_threads")
def test_nothing_depends_on_the_number_of_threads() -> None:
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0, "logprobs": 20},
        {"temperature": 3.0},
        {"top_p": 0.95, "logprobs": VOCABULARY},
        {"top_k": 1000, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logprobs": 0},
    ]
    logits = torch.randn(len(options), 129280, generator=torch.Generator().manual_seed(0)) * 2
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(sampled(logits, [params(**chosen) for chosen in options], [PROMPT + ANSWER] * len(options)))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("chosen", [params(), params(temperature=0.0), params(top_k=2, repetition_penalty=1.5)])
def test_no_token_is_drawn_from_what_is_not_a_number_and_neighbours_have_theirs(
    broken: float, chosen: SamplingParams
) -> None:
    logits = torch.tensor([LOGITS, LOGITS, LOGITS])
    logits[1, 5] = broken
    asked = msgspec.structs.replace(chosen, logprobs=2)
    tokens = [[0, 1, 2]] * 3
    healthy = sampled(torch.tensor([LOGITS]), [asked], tokens[:1])
    assert sampled(logits, [asked] * 3, tokens) == [*healthy, (NO_TOKEN, None), *healthy]


def test_excluded_tokens_may_have_no_chance_at_all() -> None:
    logits = torch.tensor([[-math.inf, 1.0, -math.inf]])
    assert sampled(logits, [params()], [[0, 1, 2]]) == [(1, None)]
