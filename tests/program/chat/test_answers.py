"""Thoughts, tools, JSON and conversations through a real server, each the same streamed, among others and preempted."""

import asyncio
import json

import pytest
from jsonschema import Draft202012Validator

from tests.support.chats import TOOLS, Call, Chat, Json, said, user

pytestmark = pytest.mark.slow

QUESTION = "Why is the sky blue?"
NEEDS_NO_TOOL = "What is a pipeline?"
WEATHER_QUESTION = "What is the weather in Oslo?"
CITY: Json = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 30},
        "population": {"type": "integer", "minimum": 0, "maximum": 40_000_000},
    },
    "required": ["city", "population"],
    "additionalProperties": False,
}
AS_CITY: Json = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
}
LISTED: Json = {
    "type": "array",
    "items": {"enum": ["sea", "hill", "old", "new"]},
    "minItems": 2,
    "maxItems": 5,
}
AS_LIST: Json = {"response_format": {"type": "json_schema", "json_schema": {"name": "tags", "schema": LISTED}}}

HOT: Json = {"temperature": 1.5, "seed": 2, "max_tokens": 60, "ignore_eos": True}
BOUNDED = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {key: value},
                "required": [key],
                "additionalProperties": False,
            },
        },
    }
    for name, key, value in (
        ("say", "text", {"type": "string", "maxLength": 20}),
        ("pick", "number", {"enum": [1, 2, 3]}),
    )
]
"""Tools whose calls are short, however hot they are sampled."""

PLAIN: list[tuple[str | list[Json], Json]] = [
    (QUESTION, {}),
    ("Hello!", {**HOT, "temperature": 2}),
    ("Write something about the boats.", {**HOT, "n": 2, "frequency_penalty": 1}),
    (QUESTION, {"reasoning_effort": "high"}),
    ("What is fog?", {"reasoning_effort": "high", "temperature": 1.5, "seed": 3, "max_tokens": 60}),
    (WEATHER_QUESTION, {"tools": TOOLS}),
    ("What is the weather in Oslo and Lisbon?", {"tools": TOOLS, "reasoning_effort": "high"}),
    ("What is 12 plus 30?", {"tools": TOOLS, "temperature": 1, "seed": 4, "max_tokens": 60}),
    (NEEDS_NO_TOOL, {"stop": ["stage"], "frequency_penalty": 1}),
]
GUIDED: list[tuple[str | list[Json], Json]] = [
    ("Give me Oslo as JSON with the keys city and population.", AS_CITY),
    ("Tell me about Rome.", {**AS_CITY, "temperature": 1.5, "seed": 5, "max_tokens": 120}),
    ("Tell me about Rome.", {**AS_LIST, "reasoning_effort": "high", "temperature": 1, "seed": 6, "max_tokens": 120}),
    (NEEDS_NO_TOOL, {"tools": TOOLS, "tool_choice": "required", "temperature": 1, "seed": 7, "max_tokens": 120}),
    (QUESTION, {"reasoning_effort": "high", "thinking_token_budget": 4}),
]
COMPANY: list[tuple[str | list[Json], Json]] = [
    (f"{number} boats on the river", {"temperature": 1, "seed": 100 + number, "ignore_eos": True, "max_tokens": 60})
    for number in range(20)
]


def function(name: str) -> Json:
    return {"tool_choice": {"type": "function", "function": {"name": name}}}


def called(*calls: Call) -> Json:
    """The message of an assistant that makes these calls."""
    made = [
        {"id": f"call_{place}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for place, call in enumerate(calls)
    ]
    return {"role": "assistant", "content": None, "tool_calls": made}


def returned(text: str, place: int = 0) -> Json:
    return {"role": "tool", "tool_call_id": f"call_{place}", "content": text}


def in_city(name: str) -> Call:
    return Call("get_weather", json.dumps({"city": name}))


def arguments_of(calls: list[Call], tools: list[Json] = TOOLS) -> list[tuple[str, Json]]:
    """The calls with their arguments read, which must be those of the tools' parameters."""
    read = [(call.name, json.loads(call.arguments)) for call in calls]
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    for name, arguments in read:
        Draft202012Validator(schemas[name]).validate(arguments)
    return read


@pytest.mark.parametrize("asked", [PLAIN, GUIDED], ids=["plain", "guided"])
async def test_answers_are_the_same_streamed_and_beside_others_for_whom_they_give_way(
    chat: Chat, asked: list[tuple[str | list[Json], Json]]
) -> None:
    alone = [await chat.messages(question, **fields) for question, fields in asked]
    before = await chat.metric("vllm:num_preemptions_total")
    whole = [chat.messages(question, **fields) for question, fields in [*asked, *COMPANY]]
    streams = [chat.streamed(question, **fields) for question, fields in asked]
    answers = await asyncio.gather(*whole, *streams)
    assert await chat.metric("vllm:num_preemptions_total") > before
    assert answers[: len(asked)] == alone
    assert answers[-len(asked) :] == alone


async def test_turns_of_a_conversation_are_each_answered(chat: Chat) -> None:
    conversation: list[Json] = [{"role": "system", "content": "You are a helpful assistant."}]
    for country, capital in (("France", "Paris"), ("Norway", "Oslo"), ("Japan", "Tokyo")):
        conversation.append(user(f"What is the capital of {country}?"))
        message = await chat.message(conversation)
        assert (message.content, message.finish_reason) == (f"The capital of {country} is {capital}.", "stop")
        conversation.append(said(message.content))


async def test_parts_of_a_message_are_one_text(chat: Chat) -> None:
    parts = [{"type": "text", "text": "Why is the "}, {"type": "text", "text": "sky blue?"}]
    tokens = [
        (await chat.post("/tokenize", messages=[{"role": "user", "content": content}]))["tokens"]
        for content in (parts, "Why is the \nsky blue?")
    ]
    assert tokens[0] == tokens[1]


async def test_thoughts_are_apart_from_the_content(chat: Chat) -> None:
    answer = await chat.answer(QUESTION, reasoning_effort="high")
    [choice] = answer["choices"]
    message = choice["message"]
    assert message["reasoning"].strip()
    assert message["reasoning"] == message["reasoning_content"]
    assert message["content"].strip()
    assert "</think>" not in message["content"]
    details = answer["usage"]["completion_tokens_details"]
    assert 0 < details["reasoning_tokens"] < answer["usage"]["completion_tokens"]
    by_template, hidden, without = await asyncio.gather(
        chat.message(QUESTION, chat_template_kwargs={"thinking": True}),
        chat.message(QUESTION, reasoning_effort="high", include_reasoning=False),
        chat.message(QUESTION, reasoning_effort="none"),
    )
    assert (by_template.reasoning, by_template.content) == (message["reasoning"], message["content"])
    assert (hidden.reasoning, hidden.content) == ("", message["content"])
    assert hidden.tokens == choice["token_ids"]
    assert (without.reasoning, without.content == "") == ("", False)


@pytest.mark.parametrize("budget", [0, 1, 6])
async def test_a_budget_closes_the_thought(chat: Chat, budget: int) -> None:
    answer = await chat.answer(QUESTION, reasoning_effort="high", thinking_token_budget=budget)
    message = answer["choices"][0]["message"]
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] <= budget
    assert message["content"].strip()
    unbounded = await chat.message(QUESTION, reasoning_effort="high")
    assert unbounded.reasoning.startswith(message.get("reasoning", "").rstrip())
    assert len(message.get("reasoning", "")) < len(unbounded.reasoning)


async def test_a_tool_is_called_and_its_result_is_used(chat: Chat) -> None:
    message = await chat.message(WEATHER_QUESTION, tools=TOOLS)
    assert (message.content, message.finish_reason) == ("", "tool_calls")
    assert arguments_of(message.calls) == [("get_weather", {"city": "Oslo"})]
    conversation = [user(WEATHER_QUESTION), called(*message.calls), returned("7 degrees and light rain")]
    answer = await chat.message(conversation, tools=TOOLS)
    assert (answer.calls, answer.finish_reason) == ([], "stop")
    assert "7 degrees and light rain" in answer.content


async def test_tools_are_called_in_parallel_unless_that_is_refused(chat: Chat) -> None:
    question = "What is the weather in Oslo and Lisbon?"
    both, one = await asyncio.gather(
        chat.message(question, tools=TOOLS), chat.message(question, tools=TOOLS, parallel_tool_calls=False)
    )
    cities = [("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Lisbon"})]
    assert arguments_of(both.calls) == cities
    assert arguments_of(one.calls) == cities[:1]
    results = [returned("3 degrees and fog"), returned("21 degrees and sun", 1)]
    answer = await chat.message([user(question), called(*both.calls), *results], tools=TOOLS)
    assert "3 degrees and fog" in answer.content
    assert "21 degrees and sun" in answer.content


async def test_a_thought_comes_before_a_call(chat: Chat) -> None:
    message = await chat.message(WEATHER_QUESTION, tools=TOOLS, reasoning_effort="high")
    assert message.reasoning.strip()
    assert arguments_of(message.calls) == [("get_weather", {"city": "Oslo"})]


async def test_tools_that_may_not_be_called_or_need_not_be_are_not(chat: Chat) -> None:
    forbidden = await chat.message(WEATHER_QUESTION, tools=TOOLS, tool_choice="none")
    assert (forbidden.calls, forbidden.finish_reason, forbidden.content == "") == ([], "stop", False)
    assert forbidden == await chat.message(WEATHER_QUESTION)
    needless = await chat.message(NEEDS_NO_TOOL, tools=TOOLS, tool_choice="auto")
    assert (needless.calls, needless.finish_reason) == ([], "stop")


@pytest.mark.parametrize("temperature", [0, 1.5])
async def test_tools_that_have_to_be_called_are(chat: Chat, temperature: float) -> None:
    fields: Json = {"tools": BOUNDED, "parallel_tool_calls": False, "temperature": temperature, "seed": 8}
    required, named = await asyncio.gather(
        chat.message(NEEDS_NO_TOOL, tool_choice="required", max_tokens=160, **fields),
        chat.message(NEEDS_NO_TOOL, **function("pick"), max_tokens=160, **fields),
    )
    assert len(arguments_of(required.calls, BOUNDED)) == 1
    assert [name for name, _ in arguments_of(named.calls, BOUNDED)] == ["pick"]
    assert (required.content, named.content) == ("", "")


@pytest.mark.parametrize("effort", ["none", "high"])
async def test_json_is_what_the_schema_says(chat: Chat, effort: str) -> None:
    schemas = [(CITY, AS_CITY), (LISTED, AS_LIST), ({"type": "object"}, {"response_format": {"type": "json_object"}})]
    hot: Json = {"temperature": 1.2, "seed": 9, "max_tokens": 240, "reasoning_effort": effort}
    if effort == "high":
        hot["thinking_token_budget"] = 24
    answers = await asyncio.gather(*(chat.message("Tell me about Rome.", **hot, **form) for _, form in schemas))
    for (schema, _), answer in zip(schemas, answers, strict=True):
        assert bool(answer.reasoning) == (effort == "high")
        # Any object may be longer than the answer.
        if answer.finish_reason == "stop":
            Draft202012Validator(schema).validate(json.loads(answer.content))
    assert [answer.finish_reason for answer in answers[:2]] == ["stop"] * 2


async def test_json_is_filled_in_sensibly(chat: Chat) -> None:
    message = await chat.message("Give me Oslo as JSON with the keys city and population.", **AS_CITY)
    assert json.loads(message.content) == {"city": "Oslo", "population": 720000}
