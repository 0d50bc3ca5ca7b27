"""Tokens of the timed device follow from the last token and its position alone, and may all be in a text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.timed.stage import TokenMaker, certain

VOCABULARY = 1000


@given(st.sets(st.integers(0, 1200), max_size=900), st.integers(0, VOCABULARY - 1), st.integers(0, 200000))
def test_only_tokens_of_the_vocabulary_are_made_and_none_that_never_comes(
    never: set[int], token: int, position: int
) -> None:
    maker = TokenMaker(VOCABULARY, sorted(never))
    made = maker.after(token, position)
    assert 0 <= made < VOCABULARY
    assert made not in never
    assert TokenMaker(VOCABULARY, sorted(never)).after(token, position) == made
    assert maker.other(made) not in {made, *never}


def test_tokens_differ_by_the_last_one_and_by_its_position() -> None:
    maker = TokenMaker(VOCABULARY, [])
    assert len({maker.after(token, 7) for token in range(500)}) > 300
    assert len({maker.after(7, position) for position in range(500)}) > 300


def test_a_vocabulary_without_a_token_that_may_come_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves none"):
        TokenMaker(2, [0, 1])


def test_a_token_that_is_certain_has_the_whole_probability() -> None:
    logprobs = certain(5)
    assert (logprobs.logprob, logprobs.rank, logprobs.top_tokens, logprobs.top_logprobs) == (0.0, 1, [5], [0.0])
