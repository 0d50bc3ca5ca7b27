"""Grammars of conversations: calls that are required or strict, structured answers, and the thoughts before them."""

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from api.errors import RequestError
from api.openai.answer_format import AnswerFormat
from api.openai.chat import ChatModel, chat_generation, chat_turn, parse_chat_request
from api.openai.generation import GenerationRequest, build_choices
from api.settings.chat import ChatOptions
from api.text.model_source import resolve_model
from api.text.served_model import ServedModel
from stages.sampling.grammar import compile_grammar
from stages.step import Thought
from tests.support.grammar_answers import END_THINK, THINK, TOKENIZER, TOKENS
from weights.model_config import ModelConfig
from weights.sample import SAMPLE_DIR

WEATHER = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
R1 = AnswerFormat("deepseek_r1", "deepseek_v3")
V31 = AnswerFormat("deepseek_v31", "deepseek_v31")


@pytest.fixture(scope="module")
def served() -> Iterator[ServedModel]:
    model = ServedModel.load(resolve_model(str(SAMPLE_DIR), {}), ModelConfig.from_file(SAMPLE_DIR / "config.json"), 512)
    yield model
    assert model.grammars is not None
    model.grammars.close()


def generation(served: ServedModel, form: AnswerFormat = V31, **fields: Any) -> GenerationRequest:
    chat = msgspec.structs.replace(ChatModel.of(served, ChatOptions()), format=form)
    body = {"messages": [{"role": "user", "content": "Hi <think>"}], "max_tokens": 9, **fields}
    request = parse_chat_request(json.dumps(body).encode())
    return chat_generation(request, chat_turn(request, chat), served)


def tool(schema: Any = WEATHER, *, strict: bool = False) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "get_weather", "parameters": schema, "strict": strict}}


def accepts(request: GenerationRequest, text: str) -> bool:
    assert request.sampling.grammar is not None
    matcher = compile_grammar(TOKENS, request.sampling.grammar.source).deep_copy()
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def call(arguments: str, form: AnswerFormat = V31) -> str:
    inner = f"get_weather<｜tool▁sep｜>{arguments}"
    if form.tools == "deepseek_v3":
        inner = f"function<｜tool▁sep｜>get_weather\n```json\n{arguments}\n```"
    return f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{inner}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"


ROME, OSLO = '{"city": "Rome"}', '{"city": "Oslo"}'


@pytest.mark.parametrize("form", [R1, V31], ids=["r1", "v3.1"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_is_wanted_comes(served: ServedModel, form: AnswerFormat, choice: Any) -> None:
    request = generation(served, form, tools=[tool()], tool_choice=choice)
    assert accepts(request, call(ROME, form))
    assert not accepts(request, call(OSLO, form))
    assert not accepts(request, "No.")


def test_strict_calls_follow_their_schema_and_others_are_free(served: ServedModel) -> None:
    strict = generation(served, tools=[tool(strict=True)])
    assert accepts(strict, "I ask." + call(ROME))
    assert accepts(strict, "No.")
    assert not accepts(strict, call(OSLO))
    assert generation(served, tools=[tool()]).sampling.grammar is None
    assert generation(served, tools=[tool(strict=True)], tool_choice="none").sampling.grammar is None


def test_a_schema_that_costs_too_much_is_dropped_unless_it_is_strict(served: ServedModel) -> None:
    chain = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(1200)}
    deep = {"type": "object", "properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": {**chain, "d1200": {}}}
    # The model's own would write the whole schema.
    asked: dict[str, Any] = {"tool_choice": "required", "chat_template": "{{ messages[0]['content'] }}"}
    loose = generation(served, tools=[tool(deep)], **asked)
    assert accepts(loose, call('{"a": 1}'))
    with pytest.raises(RequestError, match="tools takes too much memory"):
        generation(served, tools=[tool(deep, strict=True)], **asked)


def test_what_the_answer_has_to_be_goes_before_calls_that_may_be(served: ServedModel) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER}}
    assert accepts(generation(served, response_format=form), ROME)
    assert accepts(generation(served, response_format=form, tools=[tool(strict=True)]), ROME)
    assert accepts(generation(served, response_format=form, tools=[tool()], tool_choice="required"), call(ROME))


def test_a_call_that_cannot_end_is_not_held_to_a_grammar(served: ServedModel) -> None:
    request = generation(served, tools=[tool()], tool_choice="required", ignore_eos=True)
    assert request.sampling.grammar is None
    with pytest.raises(RequestError, match="response_format with ignore_eos"):
        generation(served, response_format={"type": "json_object"}, ignore_eos=True)


def thought(served: ServedModel, form: AnswerFormat, **fields: Any) -> Thought | None:
    ids = iter(range(9))
    [choice] = build_choices(generation(served, form, **fields), served, lambda: next(ids), lambda: 7)
    assert choice.request is not None
    return choice.request.sampling.thought


def test_the_grammar_begins_behind_the_thought(served: ServedModel) -> None:
    """The sample's template opens a thought where it is asked to; R1-0528 opens its own, V3.1 does not."""
    asked: dict[str, Any] = {"response_format": {"type": "json_object"}}
    opened = Thought(opening=THINK, closing=END_THINK, is_open=True)
    assert thought(served, V31, **asked, reasoning_effort="high") == opened
    assert thought(served, V31, **asked) is None
    assert thought(served, R1, **asked) == msgspec.structs.replace(opened, is_open=False)
    assert thought(served, R1, **asked, reasoning_effort="high", thinking_token_budget=8) == msgspec.structs.replace(
        opened, budget=8
    )
    assert thought(served, R1) is None
    assert thought(served, R1, thinking_token_budget=0) == msgspec.structs.replace(opened, is_open=False, budget=0)


def test_an_effort_of_none_forbids_the_thought_that_a_model_would_open(served: ServedModel) -> None:
    form = AnswerFormat("deepseek_r1", "deepseek_v3")
    forbidden = thought(served, form, reasoning_effort="none")
    assert forbidden is not None
    assert (forbidden.is_open, forbidden.budget) == (False, 0)
    assert thought(served, form) is None
    assert thought(served, form, reasoning_effort="none", response_format={"type": "json_object"}) is None
