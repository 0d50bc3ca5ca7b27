"""Requests to /v1/chat/completions of a real server, and the messages that come of whole and of streamed answers."""

import json
from typing import Any

import httpx
import msgspec

from tests.support.scrape import Scrape

Json = dict[str, Any]

WEATHER: Json = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ADD: Json = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two integers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
TOOLS = [WEATHER, ADD]
"""The tools that the sample model knows how to call."""


class Call(msgspec.Struct, frozen=True):
    """A tool call with its arguments as they were written."""

    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one choice, whichever way it came."""

    content: str
    reasoning: str
    calls: list[Call]
    finish_reason: str
    tokens: list[int]


class Chat:
    """A client of a server's chat."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def answer(self, asked: str | list[Json], **fields: Any) -> Json:
        """Returns the whole answer to a question, or to a conversation."""
        return await self.post("/v1/chat/completions", **_body(asked, fields))

    async def message(self, asked: str | list[Json], **fields: Any) -> Message:
        """Returns the only message of the answer."""
        [message] = await self.messages(asked, **fields)
        return message

    async def messages(self, asked: str | list[Json], **fields: Any) -> list[Message]:
        """Returns the messages of all choices."""
        choices = (await self.answer(asked, **fields))["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        return [_whole(choice) for choice in choices]

    async def streamed(self, asked: str | list[Json], **fields: Any) -> list[Message]:
        """Returns the messages that the deltas of a stream make; none has reasoning and content together."""
        body = _body(asked, {**fields, "stream": True})
        parts: dict[int, list[Json]] = {}
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200, (await response.aread()).decode()
            lines = [line async for line in response.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        for line in lines[:-1]:
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            for choice in event["choices"]:
                parts.setdefault(choice["index"], []).append(choice)
        return [_joined(parts[index]) for index in sorted(parts)]

    async def post(self, path: str, **body: Any) -> Json:
        """Returns the answer to a body, which must be accepted."""
        response = await self._http.post(path, json=body)
        assert response.status_code == 200, response.text
        answer: Json = response.json()
        return answer

    async def metric(self, name: str) -> float:
        """Returns the sum of the samples of one of the server's metrics."""
        samples = Scrape((await self._http.get("/metrics")).text).samples
        return sum(value for (sample, _), value in samples.items() if sample == name)


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def said(text: str) -> Json:
    return {"role": "assistant", "content": text}


def _body(asked: str | list[Json], fields: Json) -> Json:
    messages = [user(asked)] if isinstance(asked, str) else asked
    return {"messages": messages, "temperature": 0, "return_token_ids": True, **fields}


def _whole(choice: Json) -> Message:
    message = choice["message"]
    assert message["role"] == "assistant"
    calls = message.get("tool_calls", [])
    assert len({call["id"] for call in calls}) == len(calls)
    return Message(
        content=message["content"] or "",
        reasoning=message.get("reasoning", ""),
        calls=[Call(call["function"]["name"], call["function"]["arguments"]) for call in calls],
        finish_reason=choice["finish_reason"],
        tokens=choice["token_ids"],
    )


def _joined(parts: list[Json]) -> Message:
    deltas = [part["delta"] for part in parts]
    assert not any(delta.get("reasoning") and delta.get("content") for delta in deltas)
    calls: list[list[str]] = []
    for call in (call for delta in deltas for call in delta.get("tool_calls", [])):
        function = call["function"]
        if call["index"] == len(calls):
            assert call["id"]
            calls.append([function["name"], ""])
        calls[call["index"]][1] += function["arguments"]
    # Only the last part has a reason.
    assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
    return Message(
        content="".join(delta.get("content") or "" for delta in deltas),
        reasoning="".join(delta.get("reasoning") or "" for delta in deltas),
        calls=[Call(name, arguments) for name, arguments in calls],
        finish_reason=parts[-1]["finish_reason"],
        tokens=[token for part in parts for token in part.get("token_ids") or []],
    )
