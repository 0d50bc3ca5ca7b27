"""Answers whose tokens come several in an output, as accepted drafts do, beside those that come one by one."""

import asyncio
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.openai.answer_format import END_THINK
from api.openai.answer_parts import PartReader, Step
from tests.support.answer_events import answers, chunks_of, turn
from tests.support.api_client import Events, complete, events_of, stream
from tests.support.api_server import TEXT_TOKENS, endless_text
from tests.support.chat_server import WEATHER, call_text, chat_client, named_events, says
from tests.support.fake_engine import FakeEngine, Script
from tests.support.small_tokenizer import EOS_ID

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"name": "get_weather", "parameters": WEATHER}
SPOKEN = f"I think so.{END_THINK}\n\nHello wörld, it is\n{call_text(('get_weather', {'city': 'Paris'}))}"
HEADERS = {"x-request-id": "7"}


def giving(script: Script, together: int) -> FakeEngine:
    engine = FakeEngine(script)
    engine.together = together
    return engine


def pieces_of(events: Events, index: int) -> list[dict[str, Any]]:
    """What a stream of completions has of one choice."""
    return [choice for event in events for choice in event["choices"] if choice["index"] == index]


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_completion_is_the_same_however_many_tokens_come_together(data: st.DataObject) -> None:
    vocabulary = st.sampled_from([EOS_ID, *TEXT_TOKENS, *range(2, 266)])
    tokens = data.draw(st.lists(vocabulary, min_size=1, max_size=20))
    together = data.draw(st.integers(2, 9))
    fields: dict[str, Any] = {
        "prompt": [data.draw(st.lists(vocabulary, min_size=1, max_size=8))],
        "max_tokens": data.draw(st.integers(1, len(tokens))),
        "stop": data.draw(st.lists(st.text("helo wörld€", min_size=1, max_size=3), max_size=4)),
        "stop_token_ids": data.draw(st.lists(st.sampled_from(TEXT_TOKENS), max_size=1)),
        "min_tokens": data.draw(st.sampled_from([0, 1])),
        "include_stop_str_in_output": data.draw(st.booleans()),
        "skip_special_tokens": data.draw(st.booleans()),
        "ignore_eos": data.draw(st.booleans()),
        "echo": data.draw(st.booleans()),
        "logprobs": data.draw(st.sampled_from([None, 0, 2])),
        "return_token_ids": data.draw(st.booleans()),
        "n": data.draw(st.integers(1, 2)),
    }

    async def told(count: int) -> tuple[dict[str, Any], Events]:
        engine = giving(lambda request: tokens[request.sampling.choice :] + tokens, count)
        return await complete(engine, **fields), await stream(engine, stream_options={"include_usage": True}, **fields)

    (alone, _), (answer, events) = asyncio.run(told(1)), asyncio.run(told(together))
    assert (answer["choices"], answer["usage"]) == (alone["choices"], alone["usage"])
    assert events[-1]["usage"] == alone["usage"]
    for choice in alone["choices"]:
        pieces = pieces_of(events, choice["index"])
        assert len(pieces) <= 1 + -(-fields["max_tokens"] // together)
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        for end in ("finish_reason", "stop_reason"):
            assert [piece[end] for piece in pieces] == [None] * (len(pieces) - 1) + [choice[end]]
        if fields["return_token_ids"]:
            assert [token for piece in pieces for token in piece["token_ids"]] == choice["token_ids"]
        if fields["logprobs"] is not None:
            for column, entries in choice["logprobs"].items():
                assert [entry for piece in pieces for entry in piece["logprobs"][column]] == entries


async def test_a_stream_has_a_chunk_for_each_output_as_in_vllm() -> None:
    options = {"continuous_usage_stats": True, "include_usage": True}
    events = await stream(giving(endless_text, 3), max_tokens=8, logprobs=0, stream_options=options)
    assert [len(event["choices"][0]["logprobs"]["tokens"]) for event in events[:-1]] == [1, 3, 3, 1]
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 4, 7, 8, 8]
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "hello wörld "


@pytest.mark.parametrize("together", [1, 2, 4, 20])
async def test_a_stop_string_within_an_output_ends_the_choice_there_and_aborts_it(together: int) -> None:
    """The tokens behind it, which came with it, are neither shown nor counted."""
    engine = giving(endless_text, together)
    answer = await complete(engine, max_tokens=200, stop=["rld"], logprobs=0)
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hello wö", "stop", "rld")
    assert answer["usage"]["completion_tokens"] == len(choice["logprobs"]["tokens"]) < 200
    assert engine.streams[0].aborted.is_set()


async def answered(path: str, together: int, script: Script, **fields: Any) -> httpx.Response:
    async with chat_client(giving(script, together)) as opened:
        response = await opened.post(path, json=fields, headers=HEADERS)
    assert response.status_code == 200, response.text
    return response


async def both(path: str, together: int, **fields: Any) -> list[dict[str, Any]]:
    """The whole answers where tokens come one by one, and where they come together."""
    return [(await answered(path, count, says(SPOKEN), **fields)).json() for count in (1, together)]


CHAT: dict[str, Any] = {
    "messages": HELLO,
    "tools": [{"type": "function", "function": TOOL}],
    "chat_template_kwargs": {"thinking": True},
    "logprobs": True,
    "top_logprobs": 1,
}


@pytest.mark.parametrize("together", [2, 3, 7, 50])
@pytest.mark.parametrize("more", [{}, {"max_tokens": 30}, {"stop": ["it is"]}])
async def test_a_chat_is_the_same_however_many_tokens_come_together(together: int, more: dict[str, Any]) -> None:
    fields = {**CHAT, **more}
    alone, answer = await both("/v1/chat/completions", together, **fields)
    assert (answer["choices"], answer["usage"]) == (alone["choices"], alone["usage"])
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    options = {"include_usage": True}
    events = events_of(
        await answered("/v1/chat/completions", together, says(SPOKEN), stream=True, stream_options=options, **fields)
    )
    assert events[-1]["usage"] == alone["usage"]
    choices = [event["choices"][0] for event in events[:-1]]
    message = alone["choices"][0]["message"]
    for part in ("content", "reasoning"):
        assert "".join(choice["delta"].get(part, "") for choice in choices) == (message.get(part) or "")
    arguments = "".join(
        call["function"]["arguments"] for choice in choices for call in choice["delta"].get("tool_calls", [])
    )
    assert arguments == "".join(call["function"]["arguments"] for call in message.get("tool_calls", []))
    entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert entries == alone["choices"][0]["logprobs"]["content"]
    assert choices[-1]["finish_reason"] == alone["choices"][0]["finish_reason"]


async def test_parts_of_one_kind_that_come_together_are_one_delta() -> None:
    """An output with the end of a thought, the answer and a call has an event for each of them."""
    events = events_of(await answered("/v1/chat/completions", 500, says(SPOKEN), stream=True, **CHAT))
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    # The first token comes alone.
    kinds = [next(iter(delta)) for delta in deltas[1:]]
    assert kinds == ["reasoning", "reasoning", "content", "tool_calls"]


RESPONSES: dict[str, Any] = {
    "input": "Hello",
    "tools": [{"type": "function", **TOOL}],
    "reasoning": {"effort": "high"},
    "include": ["message.output_text.logprobs"],
    "top_logprobs": 1,
}
MESSAGES: dict[str, Any] = {
    "model": "small",
    "messages": HELLO,
    "max_tokens": 500,
    "tools": [{"name": TOOL["name"], "input_schema": WEATHER}],
    "thinking": {"type": "enabled", "budget_tokens": 1024},
}


@pytest.mark.parametrize("together", [2, 7, 500])
async def test_a_response_is_the_same_however_many_tokens_come_together(together: int) -> None:
    alone, answer = await both("/v1/responses", together, **RESPONSES)
    for part in ("output", "usage", "status"):
        assert answer[part] == alone[part]
    events = named_events((await answered("/v1/responses", together, says(SPOKEN), stream=True, **RESPONSES)).text)
    last = events[-1][1]["response"]
    assert (last["output"], last["usage"]) == (alone["output"], alone["usage"])
    texts = [fields for name, fields in events if name == "response.output_text.delta"]
    [message] = [item for item in alone["output"] if item["type"] == "message"]
    assert "".join(fields["delta"] for fields in texts) == message["content"][0]["text"]
    assert [one for fields in texts for one in fields["logprobs"]] == message["content"][0]["logprobs"]
    if together == 500:
        assert len(texts) == 1


@pytest.mark.parametrize("together", [2, 7, 500])
async def test_a_message_is_the_same_however_many_tokens_come_together(together: int) -> None:
    alone, answer = await both("/v1/messages", together, **MESSAGES)
    assert answer == alone
    events = named_events((await answered("/v1/messages", together, says(SPOKEN), stream=True, **MESSAGES)).text)
    [end] = [fields for name, fields in events if name == "message_delta"]
    assert end["usage"] == alone["usage"]
    texts = [fields["delta"]["text"] for _, fields in events if fields.get("delta", {}).get("type") == "text_delta"]
    assert "".join(texts) == next(block["text"] for block in alone["content"] if block["type"] == "text")
    if together == 500:
        assert len(texts) == 1


@given(text=answers(), data=st.data())
def test_parts_and_tokens_of_thoughts_do_not_depend_on_what_comes_together(text: str, data: st.DataObject) -> None:
    pieces = list(text) or [""]
    chunks = chunks_of(pieces)
    alone, joined = PartReader(turn()), PartReader(turn())
    steps = [step for chunk in chunks for step in alone.add([chunk])]
    together: list[Step] = []
    while chunks:
        count = data.draw(st.integers(1, 9))
        together += joined.add(chunks[:count])
        del chunks[:count]
    assert joined.parts == alone.parts
    assert joined.reasoning_tokens == alone.reasoning_tokens
    for part in range(len(joined.parts)):
        own = [[step for step in every if step.part.place == part] for every in (steps, together)]
        texts = ["".join(step.text for step in every) for every in own]
        kinds = [[step.kind for step in every if step.kind != "more"] for every in own]
        assert texts[0] == texts[1]
        assert kinds == [["begin", "end"]] * 2
