"""The thought of an answer, as the tokens of its prompt have it."""

import pytest

from api.errors import RequestError
from api.openai.thought import completion_thought, thought_of
from stages.step import Thought
from tests.support.grammar_answers import END_THINK, THINK, TOKENIZER
from tests.support.small_tokenizer import small_text_tokenizer

OPEN, CLOSED, NONE = [40, *THINK, 41], [40, *THINK, 41, *END_THINK, 42], [40, 41]


@pytest.mark.parametrize(("prompt", "is_open"), [(OPEN, True), (CLOSED, False), (NONE, False), ([], False)])
def test_a_thought_is_open_where_the_prompt_has_opened_it_last(prompt: list[int], is_open: bool) -> None:
    thought = thought_of(TOKENIZER, prompt, 3, "\n\n")
    line = TOKENIZER.encode("\n\n", False)
    assert thought == Thought(opening=THINK, closing=END_THINK, is_open=is_open, budget=3, after_budget=line)


def test_a_completion_has_a_thought_only_where_it_matters() -> None:
    assert completion_thought(TOKENIZER, OPEN, None, has_grammar=False) is None
    assert completion_thought(TOKENIZER, NONE, None, has_grammar=True) is None
    assert completion_thought(TOKENIZER, OPEN, None, has_grammar=True) == thought_of(TOKENIZER, OPEN)
    assert completion_thought(TOKENIZER, NONE, 5, has_grammar=False) == thought_of(TOKENIZER, NONE, 5)
    assert completion_thought(TOKENIZER, OPEN, -1, has_grammar=False) is None


def test_a_tokenizer_without_tags_has_no_thoughts() -> None:
    plain = small_text_tokenizer()
    assert thought_of(plain, [40]) is None
    assert completion_thought(plain, [40], -1, has_grammar=True) is None
    with pytest.raises(RequestError, match="has no <think>") as caught:
        completion_thought(plain, [40], 0, has_grammar=False)
    assert caught.value.param == "thinking_token_budget"
