"""POST /v1/responses with an engine whose answer is known, and as the openai client reads it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from api.messages.engine import EngineState
from api.settings.server import ApiKeys, FrontSettings
from tests.support.answer_events import read_response
from tests.support.api_client import error_of
from tests.support.api_server import endless_text, serving_app
from tests.support.chat_server import CHAT_MODEL, WEATHER, call_text, chat_client, named_events, prompt_of, says
from tests.support.fake_engine import FakeEngine

TOOLS: list[Any] = [
    {"type": "function", "name": "get_weather", "description": "Asks.", "parameters": WEATHER, "strict": False}
]
CALLING = f"I should ask.</think>Let me see.{call_text(('get_weather', {'city': 'Lisbon'}))}"


async def post(engine: FakeEngine, **fields: Any) -> httpx.Response:
    async with chat_client(engine) as opened:
        return await opened.post("/v1/responses", json={"input": "hi", **fields})


@contextmanager
def client_of(engine: FakeEngine) -> Iterator[openai.OpenAI]:
    with (
        serving_app(engine, CHAT_MODEL) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        yield client


async def test_an_answer_and_the_prompt_that_it_answers() -> None:
    engine = FakeEngine(says("Hello!"))
    response = await post(engine, model="small", instructions="Be short.", max_output_tokens=50, seed=3, top_k=5)
    answer = response.json()
    assert prompt_of(engine) == "<｜begin▁of▁sentence｜>[system]Be short.[user]hi[assistant]</think>"
    assert answer["id"] == f"resp_{response.headers['x-request-id']}"
    [item] = answer["output"]
    assert item["content"] == [{"type": "output_text", "text": "Hello!", "annotations": [], "logprobs": []}]
    assert (answer["status"], answer["store"], answer["model"]) == ("completed", False, "small")
    sampling = engine.streams[0].request.sampling
    assert (engine.streams[0].request.max_tokens, sampling.seed, sampling.top_k) == (50, 3, 5)


async def test_a_stream_says_what_one_answer_says() -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "reasoning": {"effort": "high"}}
    whole = (await post(FakeEngine(says(CALLING)), **fields)).json()
    response = await post(FakeEngine(says(CALLING)), stream=True, **fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    streamed = read_response(named_events(response.text))
    names = {"id", "call_id", "created_at", "completed_at"}

    def compared(answer: dict[str, Any]) -> Any:
        output = [{name: value for name, value in item.items() if name not in names} for item in answer["output"]]
        return {name: value for name, value in answer.items() if name not in names} | {"output": output}

    assert compared(whole) == compared(streamed)
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]


async def test_usage_has_what_was_cached_of_the_input() -> None:
    engine = FakeEngine(says("Hello!"))
    engine.cached = lambda request: len(request.tokens) - 2
    whole = (await post(engine)).json()
    streamed = read_response(named_events((await post(engine, stream=True)).text))
    assert whole["usage"] == streamed["usage"]
    cached = whole["usage"]["input_tokens"] - 2
    assert whole["usage"]["input_tokens_details"] == {"cached_tokens": cached, "cache_write_tokens": 0}


async def test_log_probabilities_are_those_of_the_text_alone() -> None:
    fields = {"reasoning": {"effort": "high"}, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    answer = (await post(FakeEngine(says("hm</think>Hello <x")), **fields)).json()
    [part] = answer["output"][1]["content"]
    assert "".join(entry["token"] for entry in part["logprobs"]) == part["text"] == "Hello <x"
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    stream = named_events((await post(FakeEngine(says("hm</think>Hello <x")), stream=True, **fields)).text)
    deltas = [event for name, event in stream if name == "response.output_text.delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == part["logprobs"]
    without = (await post(FakeEngine(says("Hello")), top_logprobs=2)).json()
    assert without["output"][0]["content"][0]["logprobs"] == []


async def test_what_is_refused_and_how() -> None:
    engine = FakeEngine(endless_text)
    refused = error_of(await post(engine, previous_response_id="resp_1"), 400)
    assert (refused["param"], "send the whole conversation as input" in refused["message"]) == (
        "previous_response_id",
        True,
    )
    assert "'small'" in error_of(await post(engine, model="gpt-5"), 404)["message"]
    assert error_of(await post(engine, input=[]), 400)["param"] == "input"
    engine.state = EngineState(phase="loading", detail="Stage 0: loading")
    error_of(await post(engine), 503)
    assert engine.streams == []


async def test_a_failure_in_mid_stream_ends_the_response() -> None:
    response = await post(FakeEngine(endless_text, fail_after=2), stream=True)
    events = named_events(response.text)
    assert [name for name, _ in events[-2:]] == ["error", "response.failed"]
    assert "Stage 1" in events[-1][1]["response"]["error"]["message"]


async def test_a_request_gets_its_first_event_before_its_first_token() -> None:
    engine = FakeEngine(lambda _: [])
    async with chat_client(engine) as opened:
        body = {"input": "hi", "stream": True}
        response = await opened.post("/v1/responses", json=body, headers={"x-request-timeout": "0.2"})
    events = named_events(response.text)
    assert [name for name, _ in events] == ["response.created", "response.in_progress", "error", "response.failed"]


async def test_it_wants_a_key_like_all_others() -> None:
    front = FrontSettings(api_keys=ApiKeys(["secret"]))
    async with chat_client(FakeEngine(says("x")), front=front) as opened:
        error_of(await opened.post("/v1/responses", json={"input": "hi"}), 401)
        headers = {"authorization": "Bearer secret"}
        assert (await opened.post("/v1/responses", json={"input": "hi"}, headers=headers)).status_code == 200


def test_openais_client_asks_and_reads_a_text() -> None:
    with client_of(FakeEngine(says("Hello!"))) as client:
        answer = client.responses.create(model="small", input="hi", store=True, metadata={"a": "b"})
        assert (answer.output_text, answer.status, answer.metadata) == ("Hello!", "completed", {"a": "b"})
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
        cut = client.responses.create(model="small", input="hi", max_output_tokens=2)
        assert cut.status == "incomplete"
        assert cut.incomplete_details is not None
        assert cut.incomplete_details.reason == "max_output_tokens"


def test_openais_client_calls_a_tool_and_gives_its_result_back() -> None:
    engine = FakeEngine(says(CALLING, "Sunny.</think>It is sunny."))
    with client_of(engine) as client:
        items: list[Any] = [{"role": "user", "content": "How is Lisbon?"}]
        answer = client.responses.create(model="small", input=items, tools=TOOLS, reasoning={"effort": "low"})
        assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
        call = answer.output[2]
        assert call.type == "function_call"
        assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Lisbon"})
        items += [item.model_dump() for item in answer.output]
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
        last = client.responses.create(model="small", input=items, tools=TOOLS, reasoning={"effort": "low"})
        assert last.output_text == "It is sunny."
    prompt = prompt_of(engine)
    assert "[assistant]<think>I should ask.</think>Let me see.<｜tool▁call▁begin｜>get_weather" in prompt
    assert prompt.endswith("[tool]sunny[assistant]<think>")


def test_openais_client_streams_items_as_they_grow() -> None:
    with client_of(FakeEngine(says(CALLING))) as client:
        texts: dict[str, str] = {}
        with client.responses.stream(
            model="small", input="How is Lisbon?", tools=TOOLS, reasoning={"effort": "low"}
        ) as stream:
            for event in stream:
                if event.type in {
                    "response.output_text.delta",
                    "response.reasoning_text.delta",
                    "response.function_call_arguments.delta",
                }:
                    texts[event.type] = texts.get(event.type, "") + event.delta
            final = stream.get_final_response()
    assert list(texts.values()) == ["I should ask.", "Let me see.", '{"city": "Lisbon"}']
    assert final.output_text == "Let me see."
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]


def test_openais_client_streams_plain_events() -> None:
    with client_of(FakeEngine(says("Hello!"))) as client:
        events = list(client.responses.create(model="small", input="hi", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")


def test_openais_client_reads_refusals() -> None:
    with client_of(FakeEngine(says("Hello!"))) as client:
        with pytest.raises(openai.BadRequestError, match="send the whole conversation as input"):
            client.responses.create(model="small", input="hi", previous_response_id="resp_1")
        with pytest.raises(openai.BadRequestError, match="'web_search': only functions"):
            client.responses.create(model="small", input="hi", tools=[{"type": "web_search"}])
        with pytest.raises(openai.NotFoundError, match="'small'"):
            client.responses.create(model="gpt-5", input="hi")
