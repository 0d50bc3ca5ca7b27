"""Log-probabilities of one row of logits, against their definition."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.sampling.logprobs import token_logprobs
from stages.step import VOCABULARY
from tests.support.sampling_reference import log_softmax, ranked


@st.composite
def rows(draw: st.DrawFn) -> list[float]:
    """Small vocabularies of any logits, and larger ones with many equal logits."""
    if draw(st.booleans()):
        return draw(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=10))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    return [float(value) for value in np.round(generator.normal(size=draw(st.integers(50, 900))), 1).astype(np.float32)]


@settings(deadline=None)
@given(rows(), st.one_of(st.integers(0, 12), st.integers(0, 1000), st.just(VOCABULARY)), st.data())
def test_log_probabilities_are_as_defined(logits: list[float], top: int, data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(logits) - 1))
    entry = token_logprobs(np.array(logits, dtype=np.float32), token, top)
    expected, order = log_softmax(logits), ranked(logits)
    assert entry.logprob == pytest.approx(expected[token], abs=1e-5)
    assert entry.rank == order.index(token) + 1
    assert entry.top_tokens == (order if top == VOCABULARY else order[:top])
    assert entry.top_logprobs == pytest.approx([expected[best] for best in entry.top_tokens], abs=1e-5)
    if token in entry.top_tokens:
        assert entry.top_logprobs[entry.top_tokens.index(token)] == entry.logprob


def test_log_probabilities_of_a_real_vocabulary_sum_to_one() -> None:
    logits = np.random.default_rng(1).normal(size=129280).astype(np.float32) * 4
    entry = token_logprobs(logits, 77, VOCABULARY)
    assert math.fsum(math.exp(logprob) for logprob in entry.top_logprobs) == pytest.approx(1, abs=1e-6)
    assert sorted(entry.top_tokens) == list(range(129280))
    assert entry.top_tokens[entry.rank - 1] == 77
    assert entry.top_logprobs == sorted(entry.top_logprobs, reverse=True)
