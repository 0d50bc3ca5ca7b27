"""POST /v1/messages and its count, with an engine whose answer is known, and as Anthropic's client reads it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import httpx
import pytest

from api.messages.engine import EngineState
from api.server.request import BODY_BYTES_MAX
from api.settings.server import ApiKeys, FrontSettings
from tests.support.answer_events import read_message
from tests.support.api_server import endless_text, serving_app
from tests.support.chat_server import CHAT_MODEL, WEATHER, call_text, chat_client, named_events, prompt_of, says
from tests.support.fake_engine import FakeEngine

QUESTION: Any = {"role": "user", "content": "How is Lisbon?"}
TOOLS: list[Any] = [{"name": "get_weather", "description": "Asks.", "input_schema": WEATHER}]
THINKS: Any = {"type": "enabled", "budget_tokens": 1024}
CALLING = f"I should ask.</think>Let me see.{call_text(('get_weather', {'city': 'Lisbon'}))}"


async def post(engine: FakeEngine, path: str = "/v1/messages", **fields: Any) -> httpx.Response:
    async with chat_client(engine) as opened:
        return await opened.post(path, json={"messages": [QUESTION], "max_tokens": 500, **fields})


def error_of(response: httpx.Response, status: int) -> dict[str, str]:
    assert response.status_code == status, response.text
    body: dict[str, Any] = response.json()
    assert (set(body), body["type"]) == ({"type", "error"}, "error")
    error: dict[str, str] = body["error"]
    assert set(error) == {"type", "message"}
    return error


@contextmanager
def client_of(engine: FakeEngine, front: FrontSettings | None = None, **options: Any) -> Iterator[anthropic.Anthropic]:
    with (
        serving_app(engine, CHAT_MODEL, front=front) as url,
        anthropic.Anthropic(base_url=url, max_retries=0, **{"api_key": "x", **options}) as client,
    ):
        yield client


async def test_an_answer_and_the_prompt_that_it_answers() -> None:
    engine = FakeEngine(says("Hello!"))
    response = await post(engine, model="small", system="Be short.", stop_sequences=["END"], temperature=0)
    assert prompt_of(engine) == "<｜begin▁of▁sentence｜>[system]Be short.[user]How is Lisbon?[assistant]</think>"
    answer = response.json()
    assert answer["id"] == f"msg_{response.headers['x-request-id']}"
    assert answer["content"] == [{"type": "text", "text": "Hello!", "citations": None}]
    assert (answer["type"], answer["role"], answer["stop_reason"]) == ("message", "assistant", "end_turn")
    assert engine.streams[0].request.max_tokens == 500


async def test_a_stream_says_what_one_answer_says() -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "thinking": THINKS}
    whole = (await post(FakeEngine(says(CALLING)), **fields)).json()
    streamed = read_message(named_events((await post(FakeEngine(says(CALLING)), stream=True, **fields)).text))
    for answer in (whole, streamed):
        answer.pop("id")
        assert answer["content"][2].pop("id").startswith("toolu_")
    assert whole == streamed
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use"]


async def test_input_tokens_are_without_those_that_were_cached() -> None:
    engine = FakeEngine(says("Hello!"))
    prompt = (await post(engine)).json()["usage"]["input_tokens"]
    engine.cached = lambda request: len(request.tokens) - 2
    whole = (await post(engine)).json()["usage"]
    events = named_events((await post(engine, stream=True)).text)
    assert (whole["input_tokens"], whole["cache_read_input_tokens"], whole["cache_creation_input_tokens"]) == (
        2,
        prompt - 2,
        0,
    )
    assert read_message(events)["usage"] == whole
    # Nothing is known of the cache before the first token; together they are the prompt's in both events.
    first = events[0][1]["message"]["usage"]
    assert (first["input_tokens"], first["cache_read_input_tokens"]) == (prompt, 0)


async def test_a_stop_sequence_ends_the_answer() -> None:
    answer = (await post(FakeEngine(says("Hello, END of it")), stop_sequences=["END"])).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "END")
    assert answer["content"][0]["text"] == "Hello, "


async def test_a_limit_above_the_models_length_is_no_error() -> None:
    engine = FakeEngine(says("x" * CHAT_MODEL.max_model_len))
    answer = (await post(engine, max_tokens=32_000)).json()
    assert engine.streams[0].request.max_tokens == CHAT_MODEL.max_model_len - len(engine.streams[0].request.tokens)
    assert answer["stop_reason"] == "model_context_window_exceeded"


async def test_errors_have_anthropics_form_wherever_they_come_from() -> None:
    engine = FakeEngine(endless_text)
    assert error_of(await post(engine, messages=[]), 400)["type"] == "invalid_request_error"
    missing = error_of(await post(engine, model="claude-opus-4-7"), 404)
    assert (missing["type"], "'small'" in missing["message"]) == ("not_found_error", True)
    async with chat_client(engine) as opened:
        assert "takes POST" in error_of(await opened.get("/v1/messages"), 405)["message"]
        large = await opened.post("/v1/messages/count_tokens", content=b" " * (BODY_BYTES_MAX + 1))
        assert error_of(large, 413)["type"] == "request_too_large"
        broken = await opened.post("/v1/messages/count_tokens", content=b"{")
        assert error_of(broken, 400)["type"] == "invalid_request_error"
        assert error_of(await opened.post("/v1/messages/batches", json={}), 404)["type"] == "not_found_error"
    engine.state = EngineState(phase="loading", detail="Stage 0: loading")
    loading = await post(engine)
    assert (error_of(loading, 503)["type"], "retry-after" in loading.headers) == ("overloaded_error", True)
    assert engine.streams == []


async def test_a_failure_in_mid_stream_is_an_event() -> None:
    events = named_events((await post(FakeEngine(endless_text, fail_after=2), stream=True)).text)
    assert events[0][0] == "message_start"
    assert (events[-1][0], events[-1][1]["error"]["type"]) == ("error", "overloaded_error")
    assert "Stage 1" in events[-1][1]["error"]["message"]


async def test_a_count_needs_no_engine_and_is_that_of_the_answer() -> None:
    engine = FakeEngine(says("x"))
    fields = {"system": "Be short.", "tools": TOOLS, "thinking": THINKS}
    used = (await post(engine, **fields)).json()["usage"]["input_tokens"]
    engine.state = EngineState(phase="loading", detail="Stage 0: loading")
    assert (await post(engine, "/v1/messages/count_tokens", **fields)).json() == {"input_tokens": used}
    # More than the model takes can be counted too, as clients ask in order to find that out.
    long = {"role": "user", "content": "abc" * 1000}
    counted = await post(engine, "/v1/messages/count_tokens", messages=[long])
    assert counted.json()["input_tokens"] > CHAT_MODEL.max_model_len
    error_of(await post(engine, "/v1/messages/count_tokens", model="other"), 404)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"x-api-key": "wrong"}, 401),
        ({"x-api-key": "secret"}, 200),
        ({"authorization": "Bearer secret"}, 200),
        ({"authorization": "Bearer other", "x-api-key": "secret"}, 200),
        ({"authorization": "Bearer secret", "x-api-key": "other"}, 200),
        ({"authorization": "secret"}, 401),
    ],
)
async def test_a_key_may_come_in_either_header(headers: dict[str, str], status: int) -> None:
    front = FrontSettings(api_keys=ApiKeys(["secret"]))
    async with chat_client(FakeEngine(says("x")), front=front) as opened:
        body = {"messages": [QUESTION], "max_tokens": 5}
        answer = await opened.post("/v1/messages", json=body, headers=headers)
        assert answer.status_code == status
        if status == 401:
            assert error_of(answer, 401)["type"] == "authentication_error"
        assert (await opened.get("/v1/models", headers=headers)).status_code == status


def test_anthropics_client_asks_and_reads_a_text() -> None:
    front = FrontSettings(api_keys=ApiKeys(["secret"]))
    with client_of(FakeEngine(says("Hello!")), front, api_key="secret") as client:
        message = client.messages.create(model="small", max_tokens=50, messages=[QUESTION])
        [block] = message.content
        assert block.type == "text"
        assert (block.text, message.stop_reason) == ("Hello!", "end_turn")
        counted = client.messages.count_tokens(model="small", messages=[QUESTION])
        assert counted.input_tokens == message.usage.input_tokens


def test_anthropics_client_calls_a_tool_and_gives_its_result_back() -> None:
    engine = FakeEngine(says(CALLING, "Sunny.</think>It is sunny."))
    with client_of(engine) as client:
        asked: dict[str, Any] = {"model": "small", "max_tokens": 500, "tools": TOOLS, "thinking": THINKS}
        message = client.messages.create(messages=[QUESTION], **asked)
        assert (message.stop_reason, [block.type for block in message.content]) == (
            "tool_use",
            ["thinking", "text", "tool_use"],
        )
        call = message.content[2]
        assert call.type == "tool_use"
        assert (call.name, call.input) == ("get_weather", {"city": "Lisbon"})
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
        turns = [QUESTION, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
        last = client.messages.create(messages=turns, **asked)
        assert [getattr(block, "text", None) for block in last.content] == [None, "It is sunny."]
    prompt = prompt_of(engine)
    assert "[assistant]<think>I should ask.</think>Let me see.<｜tool▁call▁begin｜>get_weather" in prompt
    assert prompt.endswith("[tool]sunny[assistant]<think>")


@pytest.mark.parametrize("eager", [False, True])
def test_anthropics_client_streams_blocks_as_they_grow(eager: bool) -> None:
    with client_of(FakeEngine(says(CALLING))) as client:
        tools: list[Any] = [{**TOOLS[0], "eager_input_streaming": eager}]
        seen: dict[str, str] = {}
        with client.messages.stream(
            model="small", max_tokens=500, messages=[QUESTION], tools=tools, thinking=THINKS
        ) as stream:
            for event in stream:
                if event.type in {"text", "thinking"}:
                    seen[event.type] = seen.get(event.type, "") + getattr(event, event.type)
            message = stream.get_final_message()
    assert seen == {"thinking": "I should ask.", "text": "Let me see."}
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert getattr(message.content[2], "input", None) == {"city": "Lisbon"}
    assert (message.stop_reason, message.usage.output_tokens > 0) == ("tool_use", True)


def test_anthropics_client_reads_arguments_that_are_no_json() -> None:
    text = f"</think>{call_text(('get_weather', '{city: Lisbon}'))}"
    with client_of(FakeEngine(says(text))) as client:
        asked: dict[str, Any] = {"model": "small", "max_tokens": 500, "messages": [QUESTION], "tools": TOOLS}
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert getattr(message.content[-1], "input", None) == {"INVALID_JSON": "{city: Lisbon}"}


def test_anthropics_client_tells_errors_apart() -> None:
    with client_of(FakeEngine(endless_text, fail_after=2)) as client:
        asked: dict[str, Any] = {"max_tokens": 50, "messages": [QUESTION]}
        with pytest.raises(anthropic.NotFoundError, match="'small'"):
            client.messages.create(model="claude-opus-4-7", **asked)
        image: Any = {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}
        with pytest.raises(anthropic.BadRequestError, match="'image'"):
            client.messages.create(model="small", max_tokens=50, messages=[image])
        with pytest.raises(anthropic.InternalServerError, match="Stage 1"):
            client.messages.create(model="small", **asked)
        with (
            pytest.raises(anthropic.APIStatusError, match="Stage 1"),
            client.messages.stream(model="small", **asked) as stream,
        ):
            stream.until_done()
