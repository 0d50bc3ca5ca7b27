"""Requests of /v1/responses become requests of chat, and answers become items and events."""

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.errors import RequestError
from api.openai.answer_stream import ChunkFinish
from api.openai.bodies import encode, status_body
from api.openai.responses.answer import ResponseWriter, response_draft
from api.openai.responses.input import CalledName, called_names, chat_messages, chat_tool_choice, chat_tools
from api.openai.responses.request import (
    TextFormat,
    TextOptions,
    parse_responses_request,
    response_format,
    responses_chat,
    responses_generation,
)
from tests.support.answer_events import chunks_of, cut_answers, read_response, turn, usage_of
from tests.support.chat_server import CHAT_TOKENIZER, WEATHER, call_text, chat_model, named_events

QUESTION = {"role": "user", "content": "hi"}
FUNCTION = {"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": True}


def body(**fields: Any) -> bytes:
    return msgspec.json.encode({"input": "hi", **fields})


def messages(*items: Any, **fields: Any) -> list[dict[str, Any]]:
    request = parse_responses_request(body(input=list(items), **fields))
    return chat_messages(request.input, request.instructions)


def refusal(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as error:
        responses_generation(parse_responses_request(body(**fields)), chat_model())
    return error.value


def writer(names: Mapping[str, CalledName] | None = None, **fields: Any) -> ResponseWriter:
    request = parse_responses_request(body(**fields))
    generation, _ = responses_generation(request, chat_model())
    return ResponseWriter("7", 1, response_draft(request, generation, "small"), turn(), names or {})


def streamed(pieces: list[str], finish: ChunkFinish = "stop", **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    answer, chunks = writer(**fields), chunks_of(pieces, finish)
    events = [*answer.first_events(usage_of([]))]
    for chunk in chunks:
        events += answer.events([chunk], usage_of([chunk]))
    events += answer.last_events(usage_of(chunks))
    return named_events(b"".join(events).decode())


def whole(pieces: list[str], finish: ChunkFinish = "stop", **fields: Any) -> dict[str, Any]:
    chunks = chunks_of(pieces, finish)
    answer: dict[str, Any] = msgspec.json.decode(encode(writer(**fields).whole([chunks], usage_of(chunks))))
    return answer


def test_a_text_is_a_message_of_the_user_behind_the_instructions() -> None:
    assert chat_messages("hi", "Be short.") == [{"role": "system", "content": "Be short."}, QUESTION]


def test_items_become_messages() -> None:
    assert messages(
        QUESTION,
        {"role": "developer", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok", "annotations": []}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "hm"}],
            "encrypted_content": "x",
        },
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": '{"a": 1}', "id": "fc_1"},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
    ) == [
        QUESTION,
        {"role": "system", "content": "a\nb"},
        {"role": "assistant", "content": "ok"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                {"id": "c2", "type": "function", "function": {"name": "g", "arguments": '{"a": 1}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
    ]


def test_what_an_answer_holds_is_one_message_when_it_comes_back() -> None:
    """Thought, text, call and text of one answer; the thought that nothing follows is left out."""
    pieces = ["hm", "</think>let me see", call_text(("f", {"a": 1})), "and then"]
    output = whole(pieces)["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "message"]
    [_, answer, result] = messages(
        QUESTION,
        *output,
        {"type": "function_call_output", "call_id": output[2]["call_id"], "output": "1"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "lost"}]},
    )
    assert answer == {
        "role": "assistant",
        "content": "let me see\nand then",
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": output[2]["call_id"], "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
        ],
    }
    assert result["role"] == "tool"


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (
            {"type": "item_reference", "id": "x"},
            "input[1] is of type 'item_reference', but this server stores no items",
        ),
        ({"type": "web_search_call", "id": "x"}, "input[1] is of type 'web_search_call', which is not served"),
        ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, "'input_image'"),
        ({"role": "tool", "content": "x"}, "input[1].role must be one of"),
        ({"type": "function_call", "call_id": "c", "name": "f"}, "input[1].arguments must be a string"),
        ({"type": "function_call_output", "output": "f"}, "input[1].call_id must be a string"),
        ({"type": "function_call_output", "call_id": "c", "output": 7}, "input[1].output must be a string or a list"),
        ({"type": "reasoning", "summary": [7]}, "input[1].text must be a string"),
        ("hi", "input[1] must be an object with a type"),
        ({}, "input[1] must be an object with a type"),
    ],
)
def test_items_that_are_not_served_are_named(item: Any, words: str) -> None:
    assert words in str(refusal(input=[QUESTION, item]))


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": 7}, "input", "input must be a string or a list of items"),
        ({"input": []}, "input", "input has no message"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation as input"),
        ({"conversation": "conv_1"}, "conversation", "send the whole conversation as input"),
        ({"prompt": {"id": "x"}}, "prompt", "No prompts are stored"),
        ({"background": True}, "background", "stream the answer"),
        ({"n": 2}, "n", "several requests"),
        ({"max_tokens": 7}, "max_tokens", "max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"tools": [{"type": "web_search"}]}, "tools", "tools[0] is of type 'web_search': only functions are served"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [{"name": "f"}]}, "tools", "tools[0] must be an object with a type"),
        (
            {"tools": [FUNCTION], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
            "tool_choice",
            "tool_choice is of type 'allowed_tools'",
        ),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text", "text.format has no schema"),
        ({"top_p": 2}, "top_p", "less than or equal to 1"),
        ({"chat_template": "{{"}, "chat_template", "is not a Jinja template"),
        ({"chat_template": "{{ raise_exception('no') }}"}, "input", "cannot take these messages"),
    ],
)
def test_refusals_name_the_field_as_this_route_calls_it(fields: dict[str, Any], param: str, words: str) -> None:
    error = refusal(**fields)
    assert (error.param, words in str(error)) == (param, True), str(error)


def test_fields_become_those_of_chat() -> None:
    chat = responses_chat(
        parse_responses_request(
            body(
                tools=[FUNCTION],
                tool_choice={"type": "function", "name": "get_weather"},
                parallel_tool_calls=False,
                reasoning={"effort": "low", "summary": "auto"},
                include=["message.output_text.logprobs", "reasoning.encrypted_content"],
                top_logprobs=2,
                temperature=0.5,
                seed=3,
                stop=["x"],
                cache_salt="tenant",
                logit_bias={"7": -1},
                store=True,
                stream=True,
                stream_options={"include_obfuscation": False},
                metadata={"a": "b"},
            )
        )
    )
    assert (chat.reasoning_effort, chat.logprobs, chat.top_logprobs, chat.stream) == ("low", True, 2, True)
    assert (chat.temperature, chat.seed, chat.stop, chat.logit_bias) == (0.5, 3, ["x"], {7: -1.0})
    assert (chat.parallel_tool_calls, chat.cache_salt) == (False, "tenant")
    function = {"name": "get_weather", "parameters": WEATHER, "strict": True}
    assert chat_tools([FUNCTION]) == [{"type": "function", "function": function}]
    assert chat_tool_choice({"type": "function", "name": "f"}) == {"type": "function", "function": {"name": "f"}}


def test_functions_in_namespaces_have_longer_names_in_chat_and_their_own_in_answers() -> None:
    space = {
        "type": "namespace",
        "name": "agents",
        "description": "x",
        "tools": [FUNCTION, {**FUNCTION, "name": "stop"}],
    }
    long = {"type": "namespace", "name": "n" * 60, "tools": [{**FUNCTION, "name": "run_it"}]}
    tools: list[dict[str, Any]] = [FUNCTION, space, long]
    named = [tool["function"]["name"] for tool in chat_tools(tools)]
    assert named == ["get_weather", "agents__get_weather", "agents__stop", "run_it"]
    names = called_names(tools)
    # What the model may leave out where only one function has the name.
    assert {name: (called.namespace, called.name) for name, called in names.items()} == {
        "agents__get_weather": ("agents", "get_weather"),
        "agents__stop": ("agents", "stop"),
        "stop": ("agents", "stop"),
        "run_it": ("n" * 60, "run_it"),
    }
    chunks = chunks_of(["</think>", call_text(*((name, {}) for name in ("agents__stop", "get_weather", "other")))])
    answer = msgspec.json.decode(encode(writer(names).whole([chunks], usage_of(chunks))))
    called = [(call.get("namespace"), call["name"]) for call in answer["output"]]
    assert called == [("agents", "stop"), (None, "get_weather"), (None, "other")]
    [back] = messages(answer["output"][0])
    assert back["tool_calls"][0]["function"]["name"] == "agents__stop"
    for tool in ({**space, "tools": 7}, {**space, "tools": [{"type": "custom", "name": "x"}]}):
        assert "tools[0].tools" in str(refusal(tools=[tool]))


def test_a_format_of_the_answer_is_that_of_chat() -> None:
    named: dict[str, Any] = {"type": "json_schema", "name": "Weather", "strict": True, "schema": WEATHER}
    schema = {"name": "Weather", "strict": True, "schema": WEATHER}
    assert response_format(TextOptions(format=TextFormat(**named))) == {"type": "json_schema", "json_schema": schema}
    assert response_format(TextOptions(format=TextFormat(type="json_object"))) == {"type": "json_object"}
    assert response_format(TextOptions(format=TextFormat(type="text"))) is None
    assert response_format(None) is None


def test_a_limit_above_the_models_room_is_cut_to_it() -> None:
    generation, _ = responses_generation(parse_responses_request(body(max_output_tokens=100_000)), chat_model())
    assert (generation.max_tokens, generation.default_max_tokens) == (None, 100_000)
    generation, _ = responses_generation(parse_responses_request(body()), chat_model())
    assert (generation.max_tokens, generation.default_max_tokens) == (None, 2048)


def test_truncation_keeps_the_end_of_the_input_and_room_for_the_answer() -> None:
    long = "abc" * 3000
    assert "cannot fit" in str(refusal(input=long)) or "context length" in str(refusal(input=long))
    request = parse_responses_request(body(input=long, truncation="auto", max_output_tokens=100_000))
    generation, _ = responses_generation(request, chat_model())
    [prompt] = generation.prompts
    assert len(prompt.tokens) == 2048 - 512
    assert CHAT_TOKENIZER.decode(prompt.tokens).endswith("abc[assistant]</think>")
    short, _ = responses_generation(parse_responses_request(body(truncation="auto")), chat_model())
    assert len(short.prompts[0].tokens) < 100


@settings(deadline=None, max_examples=200)
@given(pieces=cut_answers(), finish=st.sampled_from(["stop", "length"]))
def test_every_stream_is_well_formed_and_says_what_one_answer_says(pieces: list[str], finish: ChunkFinish) -> None:
    response = read_response(streamed(pieces, finish))
    once = whole(["".join(pieces)], finish)
    for answer in (response, once):
        answer.pop("completed_at")
        # The tokens are cut otherwise.
        answer.pop("usage")
    assert response == once


def test_an_answer_at_its_limit_is_incomplete_and_so_is_its_last_item() -> None:
    events = streamed(["hm</think>", "half a"], "length")
    assert events[-1][0] == "response.incomplete"
    answer = read_response(events)
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in answer["output"]] == ["completed", "incomplete"]
    assert answer["completed_at"] is None


def test_an_answer_in_which_nothing_is_has_an_empty_text() -> None:
    [item] = whole([""])["output"]
    assert (item["type"], item["content"][0]["text"]) == ("message", "")
    assert [name for name, _ in streamed([""])][2:-1] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]


def test_the_answer_repeats_what_was_asked_for() -> None:
    answer = whole(
        ["</think>x"],
        instructions="Be short.",
        tools=[{"type": "function", "name": "f"}],
        tool_choice="none",
        reasoning={"effort": "low"},
        metadata={"a": "b"},
        max_output_tokens=9,
        temperature=0.5,
        text={"format": {"type": "text"}, "verbosity": "low"},
        store=True,
        prompt_cache_key="key",
    )
    assert answer["tools"] == [{"type": "function", "name": "f", "parameters": None, "strict": None}]
    assert (answer["instructions"], answer["tool_choice"], answer["metadata"]) == ("Be short.", "none", {"a": "b"})
    assert (answer["max_output_tokens"], answer["temperature"], answer["prompt_cache_key"]) == (9, 0.5, "key")
    assert answer["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    assert (answer["store"], answer["previous_response_id"], answer["reasoning"]["effort"]) == (False, None, "low")


def test_thoughts_count_as_output() -> None:
    answer = whole(["a", "b", "</think>", "c"])
    assert answer["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 11,
    }


@pytest.mark.parametrize("begun", [False, True])
def test_a_stream_that_fails_says_so_in_both_ways_that_clients_look_for(begun: bool) -> None:
    answer = writer()
    events: list[bytes] = []
    if begun:
        events += answer.first_events(usage_of([]))
        for chunk in chunks_of(["hm</think>", "half", "more"])[:2]:
            events += answer.events([chunk], usage_of([chunk]))
    events.append(answer.failure(status_body(503, "It died.")))
    stream = named_events(b"".join(events).decode())
    assert [event["sequence_number"] for _, event in stream] == list(range(len(stream)))
    assert [name for name, _ in stream if name.startswith("response.created")] == ["response.created"]
    (error, said), (failed, last) = stream[-2:]
    assert (error, said["message"], said["code"]) == ("error", "It died.", "server_error")
    assert (failed, last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"] == {"code": "server_error", "message": "It died."}
    assert [item["status"] for item in last["response"]["output"]] == (["completed", "incomplete"] if begun else [])
