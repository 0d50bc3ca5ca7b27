"""Answers that call functions, in both of DeepSeek's formats, with tags that are tokens and tags that are text."""

from collections.abc import Sequence
from typing import Any

import pytest
from llguidance import LLMatcher

from api.errors import RequestError
from api.openai.grammars.tool_calls import (
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    Choice,
    Function,
    TokenId,
    ToolFormat,
    tool_grammar,
)
from stages.sampling.grammar import compile_grammar
from tests.support.grammar_answers import TOKENIZER, TOKENS

WEATHER = Function(
    name="get_weather",
    parameters={
        "properties": {"city": {"enum": ["Rome", "Łódź"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    strict=True,
)
NOW = Function(name="now")
ODD = Function(name="odd", parameters={"type": "object", "not": {}})


def as_text(_: str) -> int | None:
    """The ids of tags in a tokenizer that has none."""


def written(style: ToolFormat, *calls: tuple[str, str]) -> str:
    """An answer that calls functions."""
    texts = [
        "".join([*style.before_name, name, *style.before_arguments, arguments, *style.after_arguments])
        for name, arguments in calls
    ]
    return style.begin + style.between_calls.join(texts) + style.end


def tokens(text: str, token_id: TokenId) -> list[int]:
    """The tokens of an answer; what only looks like a tag is text."""
    return TOKENIZER.encode(text, add_special_tokens=False) if token_id is not as_text else TOKENS.tokenize_str(text)


@pytest.fixture(params=[DEEPSEEK_V3, DEEPSEEK_V31], ids=["v3", "v3.1"])
def style(request: pytest.FixtureRequest) -> ToolFormat:
    style: ToolFormat = request.param
    return style


@pytest.fixture(params=[TOKENIZER.token_id, as_text], ids=["tokens", "text"])
def token_id(request: pytest.FixtureRequest) -> TokenId:
    token_id: TokenId = request.param
    return token_id


def accepted(
    functions: Sequence[Function], choice: Choice, style: ToolFormat, token_id: TokenId, **options: Any
) -> "list[str]":
    """The names of the cases that the grammar accepts."""
    grammar = tool_grammar(functions, choice, style, token_id, **options)
    assert grammar is not None
    compiled = compile_grammar(TOKENS, grammar.source)
    return [name for name, text in cases(style).items() if _accepts(compiled.deep_copy(), tokens(text, token_id))]


def _accepts(matcher: LLMatcher, answer: list[int]) -> bool:
    return matcher.try_consume_tokens(answer) == len(answer) and matcher.is_accepting()


def cases(style: ToolFormat) -> dict[str, str]:
    rome, now = ("get_weather", '{"city": "Rome"}'), ("now", "{}")
    return {
        "rome": written(style, rome),
        "two": written(style, rome, now),
        "text first": "I look it up.\n" + written(style, rome),
        "text": "I do not know {",
        "wrong city": written(style, ("get_weather", '{"city": "Oslo"}')),
        "unknown": written(style, ("launch", "{}")),
        "no object": written(style, ("now", "3")),
        "text after": written(style, rome) + "!",
        "unfinished": written(style, rome)[: -len(style.end)],
        "now": written(style, now),
    }


def test_calls_that_are_required(style: ToolFormat, token_id: TokenId) -> None:
    assert accepted([WEATHER, NOW], "required", style, token_id) == ["rome", "two", "now"]
    assert accepted([WEATHER, NOW], "required", style, token_id, parallel=False) == ["rome", "now"]


def test_a_chosen_function_is_called_once(style: ToolFormat, token_id: TokenId) -> None:
    assert accepted([WEATHER, NOW], WEATHER, style, token_id) == ["rome"]
    assert accepted([WEATHER, NOW], NOW, style, token_id) == ["now"]


def test_calls_that_may_be_there_follow_text_and_their_schemas(style: ToolFormat, token_id: TokenId) -> None:
    assert accepted([WEATHER, NOW], "auto", style, token_id) == ["rome", "two", "text first", "text", "now"]


def test_without_a_strict_function_the_answer_is_free(style: ToolFormat) -> None:
    assert tool_grammar([NOW, ODD], "auto", style, TOKENIZER.token_id) is None


def test_a_schema_that_cannot_be_enforced_is_refused_only_where_it_has_to_be(style: ToolFormat) -> None:
    strict = Function(name="odd", parameters=ODD.parameters, strict=True)
    with pytest.raises(RequestError, match="'not' at /not"):
        tool_grammar([strict], "required", style, TOKENIZER.token_id)
    loose = tool_grammar([ODD], "required", style, TOKENIZER.token_id)
    assert loose is not None
    answer = tokens(written(style, ("odd", '{"any": [1, null]}')), TOKENIZER.token_id)
    assert _accepts(compile_grammar(TOKENS, loose.source), answer)


def test_only_strict_functions_keep_their_schemas_where_that_is_asked(style: ToolFormat) -> None:
    weather = Function(name="get_weather", parameters=WEATHER.parameters)
    assert "wrong city" not in accepted([weather], "required", style, TOKENIZER.token_id)
    assert "wrong city" in accepted([weather], "required", style, TOKENIZER.token_id, only_strict=True)
    assert "wrong city" not in accepted([WEATHER], "required", style, TOKENIZER.token_id, only_strict=True)
