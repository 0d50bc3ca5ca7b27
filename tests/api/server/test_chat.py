"""POST /v1/chat/completions, with an engine whose answer is known, and as the openai client reads it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from openai import OpenAI

from api.messages.engine import AddRequest
from api.settings.chat import ChatOptions
from api.settings.server import FrontSettings
from api.text.model_source import resolve_model
from api.text.served_model import ServedModel
from tests.support.api_client import Events, client, error_of, events_of
from tests.support.api_server import serving_app
from tests.support.fake_engine import FakeEngine
from weights.model_config import ModelConfig

SOURCE = resolve_model(None, {})
SAMPLE = msgspec.structs.replace(
    ServedModel.load(SOURCE, ModelConfig.from_file(SOURCE.path / "config.json"), 1024), name="sample"
)
FRONT = FrontSettings(chat=ChatOptions(reasoning_parser="deepseek_v3", tool_call_parser="deepseek_v3"))
EOS = SAMPLE.eos_token_ids[0]
CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>"
)
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
HELLO = {"role": "user", "content": "Hello"}


def tokens_of(text: str) -> list[int]:
    return SAMPLE.tokenizer.encode(text, add_special_tokens=False)


def saying(*texts: str) -> FakeEngine:
    """An engine that answers with the next of these texts, and then EOS."""
    left = list(texts)

    def script(_: AddRequest) -> Sequence[int]:
        return [*tokens_of(left.pop(0) if len(left) > 1 else left[0]), EOS]

    return FakeEngine(script)


async def ask(engine: FakeEngine, **fields: Any) -> dict[str, Any]:
    async with client(engine, SAMPLE, front=FRONT) as opened:
        response = await opened.post("/v1/chat/completions", json={"messages": [HELLO], **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def chunks(engine: FakeEngine, **fields: Any) -> Events:
    async with client(engine, SAMPLE, front=FRONT) as opened:
        response = await opened.post("/v1/chat/completions", json={"messages": [HELLO], "stream": True, **fields})
    return events_of(response)


async def refused(**fields: Any) -> dict[str, Any]:
    async with client(saying(""), SAMPLE, front=FRONT) as opened:
        response = await opened.post("/v1/chat/completions", json={"messages": [HELLO], **fields})
    return error_of(response, 400)


def merged(given: Events, choice: int = 0) -> dict[str, Any]:
    """The message that the deltas of a stream make; none of them has reasoning and content together."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    for part in (one for chunk in given for one in chunk["choices"] if one["index"] == choice):
        delta = part["delta"]
        assert not (delta.get("reasoning") and delta.get("content"))
        assert delta.get("reasoning") == delta.get("reasoning_content")
        message["content"] += delta.get("content") or ""
        message["reasoning"] += delta.get("reasoning") or ""
        for call in delta.get("tool_calls", []):
            if call["index"] == len(message["tool_calls"]):
                assert call["type"] == "function"
                assert call["id"]
                message["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
            message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
        message["finish_reason"] = part["finish_reason"]
    return message


async def test_a_message_in_one_answer() -> None:
    engine = saying("Good morning.")
    answer = await ask(engine, max_tokens=40)
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 0
    count = len(tokens_of("Good morning.")) + 1
    prompt = SAMPLE.tokenizer.encode("<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜>", add_special_tokens=False)
    assert answer == {
        "object": "chat.completion",
        "model": "sample",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Good morning.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": count,
            "total_tokens": len(prompt) + count,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }
    assert engine.streams[0].request.tokens == prompt


async def test_a_salt_goes_to_the_engine() -> None:
    engine = saying("Yes.")
    await ask(engine, cache_salt="tenant")
    assert engine.streams[0].request.cache_salt == "tenant"
    assert (await refused(cache_salt=""))["param"] == "cache_salt"


async def test_what_a_request_leaves_open_fills_the_model() -> None:
    engine = saying("Yes.")
    await ask(engine)
    request = engine.streams[0].request
    assert request.max_tokens == SAMPLE.max_model_len - len(request.tokens)
    await ask(engine, max_tokens=7, max_completion_tokens=5)
    assert engine.streams[-1].request.max_tokens == 5


async def test_usage_has_what_was_cached_of_the_prompt() -> None:
    engine = saying("Good morning.", "Good morning.")
    engine.cached = lambda request: len(request.tokens) - 2
    answer = await ask(engine)
    *_, last = await chunks(engine, stream_options={"include_usage": True})
    assert answer["usage"] == last["usage"]
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": answer["usage"]["prompt_tokens"] - 2}


async def test_a_stream_begins_with_the_role_and_gives_a_chunk_for_each_token() -> None:
    given = await chunks(saying("Good morning."), stream_options={"include_usage": True})
    assert {chunk["object"] for chunk in given} == {"chat.completion.chunk"}
    assert given[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert merged(given)["content"] == "Good morning."
    assert merged(given)["finish_reason"] == "stop"
    assert len(given) >= len(tokens_of("Good morning."))
    assert given[-1]["choices"] == []
    assert given[-1]["usage"]["completion_tokens"] == len(tokens_of("Good morning.")) + 1
    assert [chunk["usage"] for chunk in given[:-1]] == [None] * (len(given) - 1)


THOUGHT = "The fog comes in.\n"


async def test_a_thought_that_the_prompt_opens_is_told_apart_and_counted() -> None:
    text = f"{THOUGHT}</think>\n\nFog."
    fields: dict[str, Any] = {"chat_template_kwargs": {"thinking": True}}
    engine = saying(text)
    answer = await ask(engine, **fields)
    [choice] = answer["choices"]
    assert SAMPLE.tokenizer.decode(engine.streams[0].request.tokens, skip_special_tokens=False).endswith("<think>\n")
    assert choice["message"]["reasoning"] == choice["message"]["reasoning_content"] == "The fog comes in."
    assert choice["message"]["content"] == "Fog."
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == len(tokens_of(THOUGHT))
    streamed = merged(await chunks(saying(text), **fields))
    assert (streamed["reasoning"], streamed["content"]) == ("The fog comes in.", "Fog.")
    left_out = await ask(saying(text), include_reasoning=False, **fields)
    assert left_out["choices"][0]["message"] == {"role": "assistant", "content": "Fog.", "refusal": None}
    assert left_out["usage"] == answer["usage"]


async def test_reasoning_effort_asks_for_a_thought_or_for_none() -> None:
    for effort, opens in (("high", True), ("none", False)):
        engine = saying("x")
        await ask(engine, reasoning_effort=effort)
        prompt = SAMPLE.tokenizer.decode(engine.streams[0].request.tokens, skip_special_tokens=False)
        assert prompt.endswith("<think>\n") == opens


async def test_an_answer_that_ends_inside_its_thought_has_no_content() -> None:
    answer = await ask(saying("So it is."), max_tokens=1, reasoning_effort="high")
    [choice] = answer["choices"]
    assert choice["message"]["reasoning"] == SAMPLE.tokenizer.decode(tokens_of("So it is.")[:1])
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "length")


async def test_a_call_is_given_with_an_id_and_its_arguments() -> None:
    text = CALL.format(name="get_weather", arguments='{"city": "Lisbon"}')
    [choice] = (await ask(saying(text), tools=TOOLS))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert call["id"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Lisbon"}'}
    given = await chunks(saying(text), tools=TOOLS)
    assert merged(given) == {
        "content": "",
        "reasoning": "",
        "tool_calls": [{"name": "get_weather", "arguments": '{"city": "Lisbon"}'}],
        "finish_reason": "tool_calls",
    }


async def test_no_call_comes_where_tools_are_forbidden() -> None:
    text = CALL.format(name="get_weather", arguments='{"city": "Lisbon"}')
    engine = saying(text)
    [choice] = (await ask(engine, tools=TOOLS, tool_choice="none"))["choices"]
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"
    assert "get_weather" not in SAMPLE.tokenizer.decode(engine.streams[0].request.tokens, skip_special_tokens=False)
    assert "<｜tool" not in choice["message"]["content"]


async def test_only_the_first_call_comes_where_calls_are_not_parallel() -> None:
    one = CALL.format(name="get_weather", arguments='{"city": "Lisbon"}')
    begin, end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    text = one.replace(end, "\n") + one.removeprefix(begin)
    message = (await ask(saying(text), tools=TOOLS))["choices"][0]["message"]
    assert len(message["tool_calls"]) == 2
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    fields: dict[str, Any] = {"tools": TOOLS, "parallel_tool_calls": False}
    assert len((await ask(saying(text), **fields))["choices"][0]["message"]["tool_calls"]) == 1
    assert len(merged(await chunks(saying(text), **fields))["tool_calls"]) == 1


async def test_choices_have_messages_of_their_own() -> None:
    answer = await ask(saying("One.", "Two."), n=2, temperature=1)
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["One.", "Two."]
    given = await chunks(saying("One.", "Two."), n=2, temperature=1)
    assert [merged(given, choice)["content"] for choice in range(2)] == ["One.", "Two."]


async def test_logprobs_are_in_chats_form() -> None:
    answer = await ask(saying("Yes."), logprobs=True, top_logprobs=2)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries).startswith("Yes.")
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert all(bytes(entry["bytes"]).decode() == entry["token"] for entry in entries)
    given = await chunks(saying("Yes."), logprobs=True, top_logprobs=2)
    streamed = [
        entry
        for chunk in given
        for part in chunk["choices"]
        for entry in (part["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == entries


async def test_token_ids_are_given_where_they_are_asked_for() -> None:
    engine = saying("Yes.")
    answer = await ask(engine, return_token_ids=True)
    assert answer["prompt_token_ids"] == engine.streams[0].request.tokens
    assert answer["choices"][0]["token_ids"] == [*tokens_of("Yes."), EOS]
    given = await chunks(saying("Yes."), return_token_ids=True)
    assert given[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    ids = [token for chunk in given for part in chunk["choices"] for token in part.get("token_ids", [])]
    assert ids == [*tokens_of("Yes."), EOS]


async def test_a_final_message_is_continued_and_echoed() -> None:
    messages = [HELLO, {"role": "assistant", "content": "Good"}]
    fields: dict[str, Any] = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    engine = saying(" morning.")
    [choice] = (await ask(engine, **fields))["choices"]
    assert choice["message"]["content"] == " morning."
    prompt = SAMPLE.tokenizer.decode(engine.streams[0].request.tokens, skip_special_tokens=False)
    assert prompt.endswith("<｜Assistant｜>Good")
    [choice] = (await ask(saying(" morning."), echo=True, **fields))["choices"]
    assert choice["message"]["content"] == "Good morning."
    assert merged(await chunks(saying(" morning."), echo=True, **fields))["content"] == "Good morning."


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"chat_template": "{% for"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages"),
    ],
)
async def test_what_cannot_be_served_is_refused_with_its_field(fields: dict[str, Any], param: str) -> None:
    error = await refused(**fields)
    assert error["param"].partition("[")[0] == param
    assert len(error["message"]) < 500


async def test_a_requests_own_template_is_used() -> None:
    engine = saying("x")
    await ask(engine, chat_template="{{ messages[0]['content'] }}!{{ mood }}", chat_template_kwargs={"mood": "?"})
    assert SAMPLE.tokenizer.decode(engine.streams[0].request.tokens) == "Hello!?"


@contextmanager
def openai_client(engine: FakeEngine) -> Iterator[OpenAI]:
    with (
        serving_app(engine, SAMPLE, front=FRONT) as url,
        OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as opened,
    ):
        yield opened


def test_the_openai_client_reads_a_call_and_answers_it() -> None:
    text = CALL.format(name="get_weather", arguments='{"city": "Lisbon"}')
    engine = saying(text, "Fog.")
    with openai_client(engine) as opened:
        messages: list[Any] = [{"role": "user", "content": "How is Lisbon?"}]
        first = opened.chat.completions.create(model="sample", messages=messages, tools=TOOLS)
        message = first.choices[0].message
        assert message.tool_calls is not None
        [call] = message.tool_calls
        assert call.type == "function"
        assert json.loads(call.function.arguments) == {"city": "Lisbon"}
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"}]
        second = opened.chat.completions.create(model="sample", messages=messages, tools=TOOLS)
        assert second.choices[0].message.content == "Fog."


def test_the_openai_client_streams_a_call_with_a_thought() -> None:
    text = f"{THOUGHT}</think>\n\n" + CALL.format(name="get_weather", arguments='{"city": "Lisbon"}')
    with (
        openai_client(saying(text)) as opened,
        opened.chat.completions.stream(
            model="sample",
            messages=[{"role": "user", "content": "How is Lisbon?"}],
            tools=TOOLS,
            reasoning_effort="high",
            stream_options={"include_usage": True},
        ) as stream,
    ):
        final = stream.get_final_completion()
    [choice] = final.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Lisbon"}'
    assert final.usage is not None
    assert final.usage.completion_tokens_details is not None
    assert final.usage.completion_tokens_details.reasoning_tokens == len(tokens_of(THOUGHT))
