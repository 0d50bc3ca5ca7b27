"""The thought of an answer, as the tokens of its prompt have it."""

import pytest

from api.errors import RequestError
from api.openai.grammars.thought import ThoughtOptions, thought_of
from stages.step import Thought
from tests.support.grammar_answers import END_THINK, THINK, TOKENIZER
from tests.support.small_tokenizer import small_text_tokenizer

OPEN, CLOSED, NONE = [40, *THINK, 41], [40, *THINK, 41, *END_THINK, 42], [40, 41]


def found(prompt: list[int], *, has_grammar: bool = True, **options: int | bool | None) -> Thought | None:
    given = ThoughtOptions(**options)  # type: ignore[arg-type]  # each test gives those of its type
    return thought_of(TOKENIZER, prompt, given, has_grammar=has_grammar)


def thought(*, is_open: bool, budget: int | None = None) -> Thought:
    return Thought(opening=THINK, closing=END_THINK, is_open=is_open, budget=budget)


@pytest.mark.parametrize(("prompt", "is_open"), [(OPEN, True), (CLOSED, False), (NONE, False), ([], False)])
def test_a_thought_is_open_where_the_prompt_has_opened_it_last(prompt: list[int], is_open: bool) -> None:
    assert found(prompt, has_grammar=False, budget=3) == thought(is_open=is_open, budget=3)


def test_where_it_is_known_the_tokens_are_not_asked() -> None:
    """Users write tags too."""
    assert found(OPEN, is_open=False) is None
    assert found(NONE, is_open=True) == thought(is_open=True)


def test_there_is_a_thought_only_where_something_depends_on_it() -> None:
    assert found(OPEN, has_grammar=False) is None
    assert found(OPEN, has_grammar=False, budget=-1) is None
    assert found(OPEN) == thought(is_open=True)
    assert found(NONE, has_grammar=False, budget=5) == thought(is_open=False, budget=5)


def test_before_a_grammar_only_those_open_a_thought_that_may() -> None:
    assert found(NONE) is None
    assert found(NONE, budget=5) is None
    assert found(NONE, may_open=True) == thought(is_open=False)
    assert found(NONE, may_open=True, budget=5) == thought(is_open=False, budget=5)


def test_a_tokenizer_without_tags_has_no_thoughts() -> None:
    plain = small_text_tokenizer()
    assert thought_of(plain, [40], ThoughtOptions(), has_grammar=True) is None
    assert thought_of(plain, [40], ThoughtOptions(budget=-1), has_grammar=True) is None
    with pytest.raises(RequestError, match="has no <think>") as caught:
        thought_of(plain, [40], ThoughtOptions(budget=0), has_grammar=False)
    assert caught.value.param == "thinking_token_budget"
