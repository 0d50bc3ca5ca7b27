"""Requests of /v1/messages become requests of chat, and answers become blocks and events."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.errors import RequestError
from api.openai.answer_stream import Chunk, ChunkFinish
from api.openai.anthropic.answer import CHUNKS_WITHOUT_EVENT_MAX, SIGNATURE, AnthropicWriter
from api.openai.anthropic.errors import anthropic_error
from api.openai.anthropic.input import chat_messages, chat_tool_choice, chat_tools
from api.openai.anthropic.messages import (
    OutputConfig,
    counted_chat,
    eager_tools,
    messages_chat,
    messages_generation,
    parse_count_request,
    parse_messages_request,
    response_format,
)
from api.openai.bodies import encode, status_body
from api.openai.chat import ChatTurn, chat_turn
from tests.support.answer_events import NamedEvents, chunks_of, cut_answers, read_message, turn, usage_of
from tests.support.chat_server import WEATHER, call_text, chat_model, named_events

QUESTION = {"role": "user", "content": "hi"}
TOOL = {"name": "get_weather", "description": "Asks.", "input_schema": WEATHER}


def body(*messages: Any, **fields: Any) -> bytes:
    return msgspec.json.encode({"max_tokens": 9, "messages": list(messages) or [QUESTION], **fields})


def chat(*messages: Any, **fields: Any) -> Any:
    return messages_chat(parse_messages_request(body(*messages, **fields)))


def messages(*given: Any, **fields: Any) -> list[dict[str, Any]]:
    request = parse_messages_request(body(*given, **fields))
    return chat_messages(request.messages, request.system)


def prompt(*given: Any, **fields: Any) -> str:
    return chat_turn(chat(*given, **fields), chat_model()).prompt


def refusal(*given: Any, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as error:
        messages_generation(parse_messages_request(body(*given, **fields)), chat_model())
    return error.value


def writer(given: ChatTurn | None = None, *, eager: bool = False) -> AnthropicWriter:
    return AnthropicWriter("7", "small", given or turn(), 1000, frozenset({"f", "get_weather"} if eager else ()))


def streamed(chunks: list[Chunk], answer: AnthropicWriter | None = None) -> NamedEvents:
    answer = answer or writer()
    events = [*answer.first_events(usage_of([]))]
    for chunk in chunks:
        events += answer.events([chunk], usage_of([chunk]))
    events += answer.last_events(usage_of(chunks))
    return named_events(b"".join(events).decode())


def whole(chunks: list[Chunk], answer: AnthropicWriter | None = None) -> dict[str, Any]:
    decoded: dict[str, Any] = msgspec.json.decode(encode((answer or writer()).whole([chunks], usage_of(chunks))))
    return decoded


def test_blocks_become_messages() -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    assert messages(
        {"role": "user", "content": [{"type": "text", "text": "a", **cached}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": SIGNATURE},
                {"type": "redacted_thinking", "data": "xyz"},
                {"type": "text", "text": "let me see"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {}},
                {"type": "tool_use", "id": "t2", "name": "g", "input": {"ü": 1}, **cached},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "one"},
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "is_error": True,
                    "content": [{"type": "text", "text": "2"}],
                },
                {"type": "text", "text": "go on"},
            ],
        },
        {"role": "assistant", "content": "done"},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t3"}]},
        system=[{"type": "text", "text": "Be"}, {"type": "text", "text": "short.", **cached}],
    ) == [
        {"role": "system", "content": "Be\nshort."},
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "let me see",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                {"id": "t2", "type": "function", "function": {"name": "g", "arguments": '{"ü": 1}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "one"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: 2"},
        {"role": "user", "content": "go on"},
        {"role": "assistant", "content": "done"},
        {"role": "tool", "tool_call_id": "t3", "content": ""},
    ]


def test_what_an_answer_holds_comes_back_as_one_message() -> None:
    answer = whole(chunks_of(["hm", "</think>let me see", call_text(("f", {"a": 1}))]))
    result = {"type": "tool_result", "tool_use_id": answer["content"][2]["id"], "content": "1"}
    [_, back, _] = messages(
        QUESTION, {"role": "assistant", "content": answer["content"]}, {"role": "user", "content": [result]}
    )
    assert (back["content"], back["reasoning_content"]) == ("let me see", "hm")
    assert back["tool_calls"][0]["id"] == result["tool_use_id"]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": [{"type": "image", "source": {}}]}, "messages[0].content[0] is of type 'image'"),
        ({"role": "user", "content": [{"type": "document"}]}, "'document', which is not served here"),
        ({"role": "assistant", "content": [{"type": "server_tool_use"}]}, "'server_tool_use'"),
        (
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image"}]}]},
            "messages[0].content[0].content[0] is of type 'image': only text is served",
        ),
        ({"role": "user", "content": [{"type": "tool_result"}]}, "tool_use_id must be a string"),
        ({"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f"}]}, "input must be an object"),
        ({"role": "tool", "content": "x"}, "messages[0] must be an object with the role"),
        ({"role": "user"}, "messages[0].content must be a string or a list of blocks"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0] must be an object with a type"),
    ],
)
def test_blocks_that_are_not_served_are_named(message: Any, words: str) -> None:
    assert words in str(refusal(message, QUESTION))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages is empty"),
        ({"temperature": 1.5}, "temperature"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "'web_search_20250305': only the client's",
        ),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name must be a string"),
        ({"tool_choice": {"type": "any"}}, "no tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "tool_choice.type must be one of"),
        ({"thinking": {"type": "deep"}}, "thinking"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format must have the type json_schema"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"n": 2}, "several requests"),
        ({"cache_salt": "tenant"}, "cache_salt is not served here"),
        ({"stop_sequences": [""]}, "stop_sequences must be"),
    ],
)
def test_refusals_say_what_is_wrong(fields: dict[str, Any], words: str) -> None:
    assert words in str(refusal(**fields))


def test_fields_become_those_of_chat() -> None:
    tools = [TOOL, {"type": "custom", "name": "g", "input_schema": {"type": "object"}, "strict": True}]
    request = chat(
        tools=tools,
        tool_choice={"type": "tool", "name": "g", "disable_parallel_tool_use": True},
        stop_sequences=["a", "b"],
        temperature=0.5,
        top_k=3,
        seed=4,
        metadata={"user_id": "x"},
        service_tier="auto",
        stream=True,
    )
    assert (request.stop, request.temperature, request.top_k, request.seed) == (["a", "b"], 0.5, 3, 4)
    assert request.parallel_tool_calls is False
    first, second = chat_tools(tools)
    assert first["function"] == {"name": "get_weather", "description": "Asks.", "parameters": WEATHER}
    assert second["function"] == {"name": "g", "parameters": {"type": "object"}, "strict": True}


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        (None, None),
    ],
)
def test_tool_choices_have_other_names(given: Any, ours: Any) -> None:
    assert chat_tool_choice(given) == ours
    assert chat_turn(chat(tools=[TOOL], tool_choice=given), chat_model()).may_call == (ours != "none")


def test_whether_the_model_thinks_and_whether_the_client_sees_it() -> None:
    def asked(thinking: Any, **fields: Any) -> tuple[bool, bool]:
        made = chat_turn(chat(thinking=thinking, **fields), chat_model())
        return made.starts_in_thought, made.shows_reasoning

    assert asked(None) == (False, False)
    assert asked(None, output_config={"effort": "high"}) == (False, False)
    assert asked(None, chat_template_kwargs={"thinking": True}) == (True, False)
    assert asked({"type": "disabled"}) == (False, False)
    assert asked({"type": "enabled", "budget_tokens": 1024}) == (True, True)
    assert asked({"type": "adaptive"}, output_config={"effort": "high"}) == (True, True)
    assert asked({"type": "adaptive", "display": "omitted"}) == (True, False)


def test_a_last_message_of_the_assistant_is_gone_on_from() -> None:
    assert prompt(QUESTION, {"role": "assistant", "content": "Well,"}).endswith("[assistant]Well,")
    for content in ([{"type": "tool_use", "id": "x", "name": "f", "input": {}}], "", []):
        assert "no text to go on from" in str(refusal(QUESTION, {"role": "assistant", "content": content}))


def test_a_count_is_that_of_the_same_prompt() -> None:
    fields = {"messages": [QUESTION], "tools": [TOOL], "system": "Be short.", "thinking": {"type": "adaptive"}}
    counted = chat_turn(counted_chat(parse_count_request(msgspec.json.encode(fields))), chat_model()).prompt
    assert counted == prompt(**fields)


def test_a_schema_of_the_answer_is_that_of_chat() -> None:
    config = OutputConfig(format={"type": "json_schema", "schema": WEATHER})
    schema = {"name": "answer", "schema": WEATHER, "strict": True}
    assert response_format(config) == {"type": "json_schema", "json_schema": schema}
    assert response_format(OutputConfig(effort="low")) is None


def test_only_eager_tools_are_eager() -> None:
    assert eager_tools([TOOL, {"name": "f", "eager_input_streaming": True}]) == {"f"}
    assert eager_tools(None) == frozenset()


@settings(deadline=None, max_examples=200)
@given(pieces=cut_answers(), finish=st.sampled_from(["stop", "length"]))
def test_every_stream_is_well_formed_and_says_what_one_answer_says(pieces: list[str], finish: ChunkFinish) -> None:
    message = read_message(streamed(chunks_of(pieces, finish)))
    once = whole(chunks_of(["".join(pieces)], finish))
    for answer in (message, once):
        # The tokens are cut otherwise.
        answer.pop("usage")
    assert message == once
    assert all(block["text"] for block in once["content"] if block["type"] == "text")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ('{"city": "Rome"}', {"city": "Rome"}),
        ("{}", {}),
        ('{"city" 1}', {"INVALID_JSON": '{"city" 1}'}),
        ('{"city": "\\ud800"}', {"INVALID_JSON": '{"city": "\\ud800"}'}),
        ('{"city": "Ro', {"INVALID_JSON": '{"city": "Ro'}),
    ],
)
def test_arguments_are_an_object_in_any_case(text: str, parsed: dict[str, Any]) -> None:
    chunks = chunks_of(
        ["</think>", *call_text(("get_weather", text)).removesuffix("<｜tool▁call▁end｜><｜tool▁calls▁end｜>")]
    )
    for answer in (whole(chunks), read_message(streamed(chunks))):
        [block] = answer["content"]
        assert block == {"type": "tool_use", "id": "toolu_7_0", "name": "get_weather", "input": parsed}


def test_arguments_of_eager_tools_come_as_they_are_written() -> None:
    chunks = chunks_of(["</think>", *call_text(("f", {"a": 1}))])
    held, eager = streamed(chunks), streamed(chunks, writer(eager=True))
    deltas = [event["delta"]["partial_json"] for name, event in eager if name == "content_block_delta"]
    assert "".join(deltas) == '{"a": 1}'
    assert len(deltas) == 8
    assert read_message(held)["content"] == read_message(eager)["content"]


def test_a_client_to_which_there_is_nothing_to_tell_gets_pings() -> None:
    chunks = chunks_of([*("x" * 2 * CHUNKS_WITHOUT_EVENT_MAX), "</think>", "y"])
    events = streamed(chunks, writer(turn(shows_reasoning=False)))
    assert [name for name, _ in events if name == "ping"] == ["ping"] * 2
    assert read_message(events)["content"] == [{"type": "text", "text": "y", "citations": None}]


@pytest.mark.parametrize(
    ("pieces", "finish", "stop", "reason"),
    [
        (["</think>x"], "stop", None, "end_turn"),
        (["</think>x"], "stop", 7, "end_turn"),
        (["</think>x"], "stop", "END", "stop_sequence"),
        (["</think>x"], "length", None, "model_context_window_exceeded"),
        (["</think>", *("x" * 999)], "length", None, "max_tokens"),
        (["</think>", call_text(("f", {}))], "stop", None, "tool_use"),
        (["</think>", call_text(("f", {}))], "length", None, "model_context_window_exceeded"),
    ],
)
def test_why_an_answer_ends(pieces: list[str], finish: ChunkFinish, stop: int | str | None, reason: str) -> None:
    chunks = chunks_of(pieces, finish, stop)
    for answer in (whole(chunks), read_message(streamed(chunks))):
        assert answer["stop_reason"] == reason
        assert answer["stop_sequence"] == (stop if isinstance(stop, str) else None)


def test_thoughts_are_counted_and_signed() -> None:
    chunks = chunks_of(["a", "b", "</think>", "c"])
    for answer in (whole(chunks), read_message(streamed(chunks))):
        assert answer["usage"] == {
            "input_tokens": 7,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 4,
            "output_tokens_details": {"thinking_tokens": 2},
        }
        assert answer["content"][0] == {"type": "thinking", "thinking": "ab", "signature": SIGNATURE}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_errors_have_anthropics_names(status: int, kind: str) -> None:
    assert msgspec.json.decode(encode(anthropic_error(status_body(status, "No.")))) == {
        "type": "error",
        "error": {"type": kind, "message": "No."},
    }


def test_a_failure_is_an_event_of_its_own() -> None:
    [(name, event)] = named_events(writer().failure(status_body(503, "It died.")).decode())
    assert (name, event["error"]["type"]) == ("error", "overloaded_error")
