"""Draws from few known logits against draws from all: equal wherever there is an answer, and where one has to be."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.sampling.candidates import SUM_ERROR, KnownLogits
from stages.sampling.draw import draw_token
from stages.sampling.logits_options import LogitsOptions
from stages.sampling.logprobs import Floats, TokenIds, log_normaliser, token_logprobs
from stages.step import VOCABULARY, SamplingParams, TokenLogprobs

SIZE = 300
CHIPS = 4
SHARE = SIZE // CHIPS
R1_SIZE = 129280


def params(temperature: float = 1.0, **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": temperature, "top_p": 1.0, "top_k": 0, "seed": 0, "choice": 0, **options})


def known_of(logits: Floats, count: int, chips: int = CHIPS, also: TokenIds | None = None) -> KnownLogits:
    """What chips tell of their shares: the best `count` of each, and besides those `also` wanted."""
    shares = logits.reshape(chips, -1)
    best = np.argsort(-shares, axis=1, kind="stable")[:, :count]
    bound = float(np.take_along_axis(shares, best, axis=1)[:, -1].max())
    tokens = (best + np.arange(chips)[:, None] * shares.shape[1]).ravel()
    tokens = np.unique(tokens if also is None else np.concatenate((tokens, also)))
    return KnownLogits.of(tokens, logits[tokens], bound, len(logits), log_normaliser(logits))


def rounded(values: Floats) -> Floats:
    """Rounds towards zero to the values of a bfloat16, among which are many equal ones."""
    kept: Floats = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return kept


@st.composite
def rows(draw: st.DrawFn) -> Floats:
    """Logits of a model: of any spread, rounded as chips round them or not."""
    seed, spread = draw(st.integers(0, 1 << 20)), draw(st.sampled_from([0.0, 0.5, 2.0, 4.0, 12.0]))
    values = (np.random.default_rng(seed).standard_normal(SIZE) * spread).astype(np.float32)
    return rounded(values) if draw(st.booleans()) else values


tokens_of_vocabulary = st.integers(0, SIZE - 1)
sampling = st.builds(
    params,
    temperature=st.sampled_from([0.0, 0.3, 0.6, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 5, 40]),
    top_p=st.sampled_from([1.0, 1.0, 0.95, 0.5]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3]),
    seed=st.integers(0, 1 << 30),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.0, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    logit_bias=st.one_of(st.just({}), st.dictionaries(tokens_of_vocabulary, st.floats(-5, 5), max_size=5)),
    allowed_token_ids=st.one_of(st.just([]), st.lists(tokens_of_vocabulary, max_size=20)),
    bad_words=st.lists(st.lists(tokens_of_vocabulary, min_size=1, max_size=1), max_size=3),
    min_tokens=st.sampled_from([0, 9]),
    stop_token_ids=st.lists(tokens_of_vocabulary, max_size=2),
)


@settings(max_examples=1500, deadline=None)
@given(
    logits=rows(),
    asked=sampling,
    count=st.integers(1, SHARE),
    prompt=st.lists(tokens_of_vocabulary, min_size=1, max_size=5),
    answer=st.lists(tokens_of_vocabulary, max_size=5),
    masked=st.one_of(st.none(), st.integers(0, 1 << 20)),
    is_gathered=st.booleans(),
)
def test_what_is_drawn_is_what_would_be_drawn_from_all(
    logits: Floats,
    asked: SamplingParams,
    count: int,
    prompt: list[int],
    answer: list[int],
    masked: int | None,
    is_gathered: bool,
) -> None:
    options = LogitsOptions(asked, SIZE, prompt, answer)
    mask = None if masked is None else np.random.default_rng(masked).random(SIZE) < 0.2
    expected = draw_token(options.apply(logits, answer, len(answer), mask), asked, 7)
    known = known_of(logits, count, also=options.touched if is_gathered else None)
    changed = known.changed(options, answer, len(answer), mask)
    drawn = None if changed is None else changed.draw(asked, 7)
    assert drawn in {None, expected}
    if count == SHARE and mask is None and not asked.allowed_token_ids:
        assert drawn == expected or changed is None or _is_narrow(changed, asked)


def _is_narrow(known: KnownLogits, asked: SamplingParams) -> bool:
    """Whether a nucleus ends where roundings of the sum decide, although all is known."""
    weights = np.exp((known.logits - known.logits.max()).astype(np.float64) / asked.temperature)
    running = np.sort(weights)[::-1].cumsum()
    return bool((abs(running - asked.top_p * running[-1]) <= 1e-6 * running[-1]).any())


@settings(max_examples=300, deadline=None)
@given(
    logits=rows(), token=tokens_of_vocabulary, count=st.integers(1, SHARE), top=st.sampled_from([0, 1, 5, VOCABULARY])
)
def test_logprobs_are_those_of_all_logits(logits: Floats, token: int, count: int, top: int) -> None:
    given_ = known_of(logits, count).logprobs(token, top)
    expected = token_logprobs(logits, token, top)
    if count == SHARE:
        assert given_ is not None
    assert given_ is None or given_ == expected


@settings(max_examples=200, deadline=None)
@given(logits=rows(), error=st.floats(-SUM_ERROR, SUM_ERROR), seed=st.integers(0, 1 << 20))
def test_a_sum_that_chips_have_rounded_changes_no_token(logits: Floats, error: float, seed: int) -> None:
    known = known_of(logits, 20)
    wrong = KnownLogits.of(
        known.tokens, known.logits, known.bound, SIZE, float(known.log_normaliser + np.log1p(error * 0.99))
    )
    for asked in (params(0.6, top_p=0.95, seed=seed), params(1.3, top_p=0.9, seed=seed)):
        assert wrong.draw(asked, 3) in {None, draw_token(logits, asked, 3)}


def peaked(seed: int) -> Floats:
    """Logits of R1's vocabulary that are like a model's: few likely tokens, and a long tail."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(R1_SIZE) * 2.0
    likely = random.integers(0, R1_SIZE, 40)
    values[likely] += random.exponential(4.0, 40) + 8.0
    return rounded(values.astype(np.float32))


@pytest.mark.parametrize(
    "asked",
    [
        params(0.0),
        params(0.6, top_p=0.95),
        params(1.0, top_k=50),
        params(1.0, top_p=0.5, min_p=0.05),
        params(0.6, top_p=0.95, frequency_penalty=0.5, presence_penalty=0.2, repetition_penalty=1.1),
        params(0.6, top_p=0.95, logit_bias={5: -4.0, R1_SIZE - 1: -100.0}),
        params(0.5),
    ],
    ids=["greedy", "nucleus", "top-k", "min-p", "penalties", "bias", "temperature alone"],
)
def test_the_candidates_of_a_model_are_enough(asked: SamplingParams) -> None:
    for seed in range(20):
        logits = peaked(seed)
        answer = [int(logits.argmax()), 17]
        options = LogitsOptions(asked, R1_SIZE, [3], answer)
        changed = known_of(logits, 64, chips=8).changed(options, answer, 2, None)
        assert changed is not None
        assert changed.draw(asked, seed) == draw_token(options.apply(logits, answer, 2), asked, seed)


@pytest.mark.parametrize(
    ("asked", "is_known"),
    [
        (params(allowed_token_ids=[5, 9, 130000, 77]), True),
        (params(0.0, logit_bias={5: 50.0}), True),
        (params(0.0, logit_bias={5: 50.0}), False),
    ],
)
def test_tokens_that_options_name_are_enough_where_their_logits_are_known(
    asked: SamplingParams, is_known: bool
) -> None:
    logits = peaked(1)
    options = LogitsOptions(asked, R1_SIZE, [], [])
    known = known_of(logits, 64, chips=8, also=options.touched if is_known else None)
    changed = known.changed(options, [], 0, None)
    drawn = None if changed is None else changed.draw(asked, 4)
    assert drawn == (draw_token(options.apply(logits, [], 0), asked, 4) if is_known else None)


def test_what_is_not_certain_has_no_answer() -> None:
    flat: Floats = np.zeros(SIZE, dtype=np.float32)
    known = known_of(flat, 8)
    for asked in (params(0.0), params(1.0), params(1.0, top_k=3), params(1.0, top_p=0.9)):
        assert known.draw(asked, 1) is None
    assert known.logprobs(0, 0) is None
    assert known.logprobs(SHARE - 1, 0) is None


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_not_a_number_is_noticed(broken: float) -> None:
    logits: Floats = np.zeros(SIZE, dtype=np.float32)
    tokens = np.arange(9)
    with np.errstate(invalid="ignore"):
        assert not KnownLogits.of(tokens, logits[tokens], 0.0, SIZE, broken).is_finite
    assert known_of(logits, 3).is_finite


def test_logprobs_are_plain_numbers() -> None:
    found = known_of(peaked(2), 64, chips=8).logprobs(int(peaked(2).argmax()), 5)
    assert isinstance(found, TokenLogprobs)
    assert (type(found.logprob), type(found.rank), type(found.top_tokens[0])) == (float, int, int)
