"""Messages and tools of chat requests: how templates get them, and what is refused by the name of its place."""

from typing import Any

import pytest
from pydantic import BaseModel

from api.errors import RequestError
from api.openai.chat_messages import Messages, ToolChoice, Tools, parse_messages, parse_tool_choice, parse_tools
from api.openai.protocol import parse_body

CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def test_templates_get_what_messages_have() -> None:
    messages = [
        {"role": "developer", "content": "Be kind.", "extra": 1},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": None, "reasoning": "r", "refusal": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "7"}]},
        {"role": "assistant", "content": "Seven", "reasoning_content": "s", "prefix": True, "tool_calls": []},
        {"role": "assistant", "audio": None},
    ]
    assert parse_messages(messages) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a\nb", "name": "Ann"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [CALL],
            "reasoning": "r",
            "reasoning_content": "r",
            "thinking": "r",
        },
        {"role": "tool", "content": "7", "tool_call_id": "call_1"},
        {
            "role": "assistant",
            "content": "Seven",
            "prefix": True,
            "reasoning": "s",
            "reasoning_content": "s",
            "thinking": "s",
        },
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        (None, "messages", "must be a list"),
        ([], "messages", "messages is empty"),
        ([{"role": "user", "content": "a"}] * 4097, "messages", "has 4097 entries: at most 4096"),
        ([{"content": "a"}], "messages[0]", "missing required field `role`"),
        ([{"role": "robot", "content": "a"}], "messages[0].role", "Invalid value 'robot'"),
        (["a"], "messages[0]", "Expected `object`, got `str`"),
        ([{"role": "user"}], "messages[0]", "missing required field `content`"),
        ([{"role": "user", "content": None}], "messages[0].content", "got `null`"),
        (
            [{"role": "user", "content": [{"type": "input_audio"}]}],
            "messages[0].content[0]",
            "is of type 'input_audio': only text is served",
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{**CALL, "function": {}}]}],
            "messages[1].tool_calls[0].function",
            "missing required field `name`",
        ),
        (
            [{"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}],
            "messages[0].tool_calls[0].type",
            "Invalid enum value 'custom'",
        ),
    ],
)
def test_malformed_messages_are_refused_by_the_name_of_their_place(messages: Any, param: str, message: str) -> None:
    with pytest.raises(RequestError) as error:
        parse_messages(messages)
    assert error.value.param == param
    assert message in str(error.value)


def test_templates_get_all_tools_alike() -> None:
    bare = {"function": {"strict": True, "name": "g"}, "type": "function"}
    tools = parse_tools([TOOL, bare])
    assert [tool.function.strict for tool in tools] == [None, True]
    assert [tool.for_template() for tool in tools] == [
        TOOL,
        {
            "type": "function",
            "function": {"name": "g", "description": "", "parameters": {"type": "object", "properties": {}}},
        },
    ]
    assert parse_tools(None) == parse_tools([]) == []


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ({}, "tools"),
        ([TOOL] * 129, "tools"),
        ([{"type": "web_search"}], "tools[0].type"),
        ([{"type": "function"}], "tools[0]"),
        ([{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "x" * 65}}], "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "f", "parameters": "{}"}}], "tools[0].function.parameters"),
    ],
)
def test_malformed_tools_are_refused_by_the_name_of_their_place(tools: Any, param: str) -> None:
    with pytest.raises(RequestError) as error:
        parse_tools(tools)
    assert error.value.param == param


def test_the_choice_of_a_tool_fits_the_tools() -> None:
    tools = parse_tools([TOOL])
    named = {"type": "function", "function": {"name": "f"}}
    assert [parse_tool_choice(value, tools) for value in (None, "none", "auto", "required", named)] == [
        ToolChoice("auto"),
        ToolChoice("none"),
        ToolChoice("auto"),
        ToolChoice("required"),
        ToolChoice("required", "f"),
    ]
    assert {parse_tool_choice(value, []).mode for value in (None, "none", "auto")} == {"none"}
    for value, given in [("required", []), ("any", tools), (named, []), ({"type": "allowed_tools"}, tools), (1, tools)]:
        with pytest.raises(RequestError, match=r"^tool_choice") as error:
            parse_tool_choice(value, given)
        assert str(error.value.param).startswith("tool_choice")


def test_they_are_fields_of_a_body() -> None:
    class Body(BaseModel):
        messages: Messages
        tools: Tools = []

    assert parse_body(Body, b'{"messages": [{"role": "user", "content": "a"}]}').messages[0]["content"] == "a"
    with pytest.raises(RequestError, match=r"tools\[0\]: Object missing required field") as error:
        parse_body(Body, b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}')
    assert error.value.param == "tools[0]"
    assert Body.model_json_schema()["required"] == ["messages"]
