"""Thoughts: where they begin and end, what a budget forces, and the grammar behind them."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.openai.grammars.structured_output import lark_grammar
from stages.sampling.sampler import Sampler
from stages.sampling.thought import ThoughtState
from stages.step import Thought
from tests.support.grammar_answers import (
    END_THINK,
    EOS,
    SIZE,
    THINK,
    TOKENIZER,
    VOCABULARY,
    answers,
    params,
    refused_place,
    text_of,
)

SAMPLER = Sampler(SIZE, VOCABULARY)
OPENING, CLOSING, BREAK = 1, [2, 3], [9, 8]
YES = lark_grammar('start: "yes" | "no"', "choice").source


def thought(budget: int | None, *, is_open: bool, after_budget: Sequence[int] = ()) -> Thought:
    return Thought(opening=THINK, closing=END_THINK, is_open=is_open, budget=budget, after_budget=list(after_budget))


def test_the_tags_are_tokens() -> None:
    assert len(THINK) == len(END_THINK) == 1


def places_of(tokens: list[int], closing: list[int]) -> int | None:
    """Where the closing ends among tokens of a thought; None where it does not."""
    ends = range(len(closing), len(tokens) + 1)
    return next((end for end in ends if tokens[end - len(closing) : end] == closing), None)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(1, 4), max_size=12), st.none() | st.integers(0, 6), st.booleans())
def test_a_thought_ends_at_its_closing_or_when_its_budget_is_used_up(
    drawn: list[int], budget: int | None, is_open: bool
) -> None:
    state = ThoughtState(
        Thought(opening=[OPENING], closing=CLOSING, is_open=is_open, budget=budget, after_budget=BREAK)
    )
    answer: list[int] = []
    for token in drawn:
        forced = state.forced_token
        answer.append(token if forced is None else forced)
        state.note(answer[-1])
    inside = answer if is_open else answer[1:]
    if not is_open and answer[:1] != [OPENING]:
        assert state.phase == ("after" if answer else "before")
        assert answer == drawn
        return
    end = places_of(inside, CLOSING)
    if budget is not None:
        assert (len(inside) if end is None else end) <= budget + len(CLOSING)
    if end is None:
        assert state.phase == "inside"
    elif budget is None or end - len(CLOSING) < budget:
        assert state.phase == "after"
    else:
        rest = inside[end : end + len(BREAK)]
        assert rest == BREAK[: len(rest)]
        assert state.phase == ("after" if len(rest) == len(BREAK) else "inside")


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_the_budget_closes_the_thought_and_then_comes_the_grammar(budget: int) -> None:
    line = TOKENIZER.encode("\n\n", False)
    sampling = params(YES, thought=thought(budget, is_open=True, after_budget=line), logit_bias={END_THINK[0]: -100.0})
    [answer] = answers([sampling], 40, SAMPLER)
    end = answer.index(END_THINK[0])
    assert end == budget
    assert answer[end + 1 : end + 1 + len(line)] == line
    assert text_of(answer[end + 1 + len(line) :]) in {"yes", "no"}


def test_a_thought_that_closes_itself_is_followed_by_the_grammar_at_once() -> None:
    sampling = params(YES, thought=thought(30, is_open=True), logit_bias={END_THINK[0]: 12.0, EOS: 100.0})
    [answer] = answers([sampling], 40, SAMPLER)
    end = answer.index(END_THINK[0])
    assert 0 < end < 30
    assert EOS not in answer[:end]
    assert refused_place(YES, answer[end + 1 :]) is None
    assert text_of(answer[end + 1 :]) in {"yes", "no"}


def test_a_model_may_open_a_thought_itself_or_answer_at_once() -> None:
    both = thought(5, is_open=False)
    [thinks] = answers([params(YES, thought=both, logit_bias={THINK[0]: 100.0})], 40, SAMPLER)
    assert thinks[0] == THINK[0]
    assert thinks[6] == END_THINK[0]
    assert text_of(thinks[7:]) in {"yes", "no"}
    [answers_at_once] = answers([params(YES, thought=both, logit_bias={THINK[0]: -100.0})], 40, SAMPLER)
    assert text_of(answers_at_once) in {"yes", "no"}


@pytest.mark.parametrize("source", [None, YES])
def test_a_budget_of_none_opens_no_thought(source: str | None) -> None:
    sampling = params(source, thought=thought(0, is_open=False), logit_bias={THINK[0]: 100.0}, seed=4)
    [answer] = answers([sampling], 6, SAMPLER)
    assert answer[0] != THINK[0]


def test_a_budget_without_a_grammar_leaves_the_rest_free() -> None:
    free = answers([params(None, seed=3)], 20, SAMPLER)[0]
    sampling = params(None, seed=3, thought=thought(4, is_open=True))
    [answer] = answers([sampling], 20, SAMPLER)
    assert answer[:4] == free[:4]
    assert answer[4] == END_THINK[0]
    assert answer[5:] == free[5:]


def test_a_tag_that_is_several_tokens_is_closed_where_it_was_begun() -> None:
    """Its first token stands at the end of the budget already."""
    state = ThoughtState(Thought(opening=[1], closing=[2, 3, 4], is_open=True, budget=3))
    for token in (7, 7, 2):
        assert state.forced_token is None
        state.note(token)
    for token in (3, 4):
        assert state.forced_token == token
        state.note(token)
    assert state.phase == "after"


def test_text_of_a_grammar_has_no_tags() -> None:
    """A string of JSON may have what a tag is written like, but not the tag."""
    source = json.dumps({"grammars": [{"json_schema": {"const": "<think>"}}]})
    [answer] = answers([params(source)], 20, SAMPLER)
    assert text_of(answer) == '"<think>"'
    assert THINK[0] not in answer
