"""Options that change a request's logits, against their definitions, and a request's state from token to token."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import StepError
from stages.sampling.logits_options import LogitsOptions
from stages.sampling.logprobs import Floats
from stages.sampling.request import Request
from stages.step import Admission, SamplingParams, Segment
from tests.support.sampling_reference import changed_logits

SIZE = 9
TOKENS = st.integers(0, SIZE - 1)
IDS = st.integers(-2, SIZE + 1)
"""Token ids, and some that are not in the vocabulary."""


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 7, "choice": 0, **options})


def admission(sampling: SamplingParams, tokens: list[int], prompt_tokens: int) -> Admission:
    return Admission(slot=3, sampling=sampling, tokens=tokens, prompt_tokens=prompt_tokens)


def row(values: list[float]) -> Floats:
    return np.array(values, dtype=np.float32)


def sample(request: Request, logits: Floats, position: int) -> int:
    """The token that the request draws for a position, of which it takes note."""
    request.check(position)
    drawn = request.draw(logits, position)
    request.note(drawn.token)
    return drawn.token


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Sampling options, each set or not, so that many occur alone and many together."""
    all_options: dict[str, st.SearchStrategy[Any]] = {
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3, 4.0]),
        "presence_penalty": st.sampled_from([-2.0, 0.0, 0.7]),
        "frequency_penalty": st.sampled_from([-0.5, 0.0, 2.0]),
        "logit_bias": st.dictionaries(IDS, st.floats(-100, 100), max_size=4),
        "allowed_token_ids": st.lists(IDS, max_size=4),
        "bad_words": st.lists(st.lists(IDS, min_size=1, max_size=3), max_size=6),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.lists(IDS, max_size=4),
    }
    return {name: draw(strategy) for name, strategy in all_options.items() if draw(st.booleans())}


LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=SIZE, max_size=SIZE)
PROMPTS = st.lists(TOKENS, min_size=1, max_size=6)
ANSWERS = st.lists(TOKENS, max_size=6)


@settings(deadline=None, max_examples=300)
@given(options(), LOGITS, PROMPTS, ANSWERS)
def test_logits_are_changed_as_defined(
    chosen: dict[str, Any], logits: list[float], prompt: list[int], answer: list[int]
) -> None:
    changed = LogitsOptions(greedy(**chosen), SIZE, prompt, answer).apply(row(logits), answer, len(answer))
    expected = changed_logits(logits, greedy(**chosen), prompt, answer)
    np.testing.assert_allclose(changed, expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=200)
@given(options(), st.lists(LOGITS, min_size=1, max_size=8), PROMPTS, st.sampled_from([0.0, 0.8]), st.data())
def test_a_request_admitted_again_goes_on_as_it_would_have(
    chosen: dict[str, Any], rows: list[list[float]], prompt: list[int], temperature: float, data: st.DataObject
) -> None:
    sampling = greedy(**chosen, temperature=temperature)
    whole = Request(admission(sampling, prompt, len(prompt)), SIZE)
    answer = [sample(whole, row(logits), len(prompt) + place) for place, logits in enumerate(rows)]
    cut = data.draw(st.integers(0, len(answer)))
    tokens = prompt + answer[:cut] if sampling.reads_tokens else []
    again = Request(admission(sampling, tokens, len(prompt)), SIZE)
    assert answer[cut:] == [sample(again, row(rows[at]), len(prompt) + at) for at in range(cut, len(rows))]


@settings(deadline=None, max_examples=200)
@given(options(), st.lists(LOGITS, min_size=1, max_size=8), PROMPTS)
def test_each_greedy_token_is_the_best_after_those_before_it(
    chosen: dict[str, Any], rows: list[list[float]], prompt: list[int]
) -> None:
    request = Request(admission(greedy(**chosen), prompt, len(prompt)), SIZE)
    answer: list[int] = []
    for logits in rows:
        token = sample(request, row(logits), len(prompt) + len(answer))
        expected = changed_logits(logits, greedy(**chosen), prompt, answer)
        assert expected[token] >= max(expected) - 1e-4
        answer.append(token)


def test_penalties_of_many_tokens_are_those_of_their_counts() -> None:
    """Prompt and answer may have more different tokens than the arrays have room for at first."""
    vocabulary = 1000
    generator = np.random.default_rng(0)
    prompt = generator.integers(0, vocabulary, 300).tolist()
    answer = generator.integers(0, vocabulary, 700).tolist()
    logits = generator.normal(size=vocabulary).astype(np.float32)
    sampling = greedy(repetition_penalty=1.5, presence_penalty=0.25, frequency_penalty=0.5)
    kept = LogitsOptions(sampling, vocabulary, prompt, [])
    for token in answer:
        kept.note(token)
    expected = changed_logits(logits.tolist(), sampling, prompt, answer)
    np.testing.assert_allclose(kept.apply(logits, answer, len(answer)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (greedy(allowed_token_ids=[1], bad_words=[[1]]), 1),
        (greedy(allowed_token_ids=[1, 0], bad_words=[[0]], min_tokens=2, stop_token_ids=[1]), 0),
        (greedy(bad_words=[[0], [1], [2]]), 2),
        (greedy(allowed_token_ids=[9]), 2),
    ],
)
def test_bans_that_would_leave_nothing_give_way(chosen: SamplingParams, expected: int) -> None:
    assert sample(Request(admission(chosen, [5], 1), 3), row([1.0, 0.5, 2.0]), 1) == expected


def test_a_bad_word_that_begins_in_the_prompt_may_be_completed() -> None:
    request = Request(admission(greedy(bad_words=[[4, 1]]), [0, 4], 2), 5)
    tokens = [sample(request, row([0.0, 2.0, 0.0, 0.0, 1.0]), 2)]
    tokens.append(sample(request, row([0.0, 0.0, 0.0, 0.0, 1.0]), 3))
    tokens.append(sample(request, row([0.0, 2.0, 0.0, 0.0, 1.0]), 4))
    assert tokens == [1, 4, 4]


def test_extreme_options_overflow_to_the_largest_number_and_not_beyond() -> None:
    sampling = greedy(temperature=1.0, repetition_penalty=1e-300, logit_bias={2: 1e308, 3: -1e308})
    request = Request(admission(sampling, [0, 1], 2), 5)
    drawn = [sample(request, row([1.0, 2.0, 0.0, 50.0, 50.0]), position) for position in range(2, 60)]
    assert set(drawn) == {0, 1, 2}


@pytest.mark.parametrize(
    ("sampling", "tokens", "prompt_tokens", "message"),
    [
        (greedy(presence_penalty=1.0), [], 0, "admitted with 0 tokens and a prompt of 0"),
        (greedy(prompt_logprobs=0), [1, 2], 3, "admitted with 2 tokens and a prompt of 3"),
        (greedy(min_tokens=1), [], 0, "without its prompt's length"),
    ],
)
def test_admissions_without_what_sampling_reads_are_refused(
    sampling: SamplingParams, tokens: list[int], prompt_tokens: int, message: str
) -> None:
    with pytest.raises(StepError, match=message):
        Request(admission(sampling, tokens, prompt_tokens), SIZE)


def test_a_request_that_reads_its_tokens_samples_them_in_turn() -> None:
    request = Request(admission(greedy(frequency_penalty=1.0), [1, 2, 3], 2), SIZE)
    sample(request, row([0.0] * SIZE), 3)
    with pytest.raises(StepError, match=r"Slot 3 samples at position 3, but .* 4 tokens"):
        sample(request, row([0.0] * SIZE), 3)


def test_an_admission_is_not_changed() -> None:
    tokens = [1, 2, 3]
    sample(Request(admission(greedy(frequency_penalty=1.0), tokens, 3), SIZE), row([0.0] * SIZE), 3)
    assert tokens == [1, 2, 3]


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(0, 3, [11, 12, 13]), (2, 2, [13, 14]), (3, 4, [14]), (4, 1, []), (5, 2, [])],
)
def test_segments_score_the_prompt_and_nothing_beyond(start: int, length: int, expected: list[int]) -> None:
    request = Request(admission(greedy(prompt_logprobs=2), [10, 11, 12, 13, 14, 15, 16], 5), 20)
    segment = Segment(slot=3, start=start, tokens=[0] * length, new_blocks=[], sample=False)
    scored = request.scored_prompt(segment)
    assert scored is not None
    assert (scored.tokens, scored.top) == (expected, 2)
    assert Request(admission(greedy(), [], 0), 20).scored_prompt(segment) is None
