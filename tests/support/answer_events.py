"""Streams of typed events, read as strict clients read them, and the chunks that they are made of."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

from api.openai.answer_format import END_THINK, AnswerFormat
from api.openai.answer_stream import Chunk, ChunkFinish
from api.openai.bodies import Usage
from api.openai.chat import ChatTurn
from tests.support.chat_server import call_text

V31 = AnswerFormat("deepseek_v31", "deepseek_v31")

PROMPT_TOKENS = 7

NamedEvents = list[tuple[str, dict[str, Any]]]


def turn(*, in_thought: bool = True, **options: Any) -> ChatTurn:
    """The turn of a conversation with tools, in V3.1's format."""
    return ChatTurn(prompt="", format=V31, starts_in_thought=in_thought, may_call=True, **options)


def chunks_of(pieces: Sequence[str], finish: ChunkFinish = "stop", stop: int | str | None = None) -> list[Chunk]:
    """The chunks with these texts, a token each; the last one ends the answer."""
    last = len(pieces) - 1
    return [
        Chunk(0, piece, place + 1, finish if place == last else None, stop if place == last else None, None)
        for place, piece in enumerate(pieces)
    ]


def usage_of(chunks: Sequence[Chunk]) -> Usage:
    return Usage.of(PROMPT_TOKENS, chunks[-1].completion_tokens if chunks else 0)


@st.composite
def answers(draw: st.DrawFn) -> str:
    """Texts of models: a thought that may never end, texts, and calls whose arguments may be no JSON."""
    text = st.text('ab ö€<{"\n', max_size=8)
    arguments = st.one_of(
        st.dictionaries(st.sampled_from(["city", "ü"]), st.one_of(st.integers(), st.text('x"}\\ö', max_size=5))),
        st.sampled_from(["{}", "{1}", '{"a" 1}', '{"a": [}', '{"a": {"b": "}"}}', '{"city": "Par']),
    )
    calls = st.lists(st.tuples(st.sampled_from(["f", "get_weather"]), arguments), max_size=3)
    parts = [draw(text)]
    if draw(st.booleans()):
        parts += [END_THINK, draw(text)]
    if chosen := draw(calls):
        parts += [call_text(*chosen), draw(text)]
    return "".join(parts)


@st.composite
def cut_answers(draw: st.DrawFn) -> list[str]:
    """The same, cut anywhere."""
    text = draw(answers())
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def read_response(events: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Returns the last event's response, having checked that each item and its content begins, grows and ends."""
    stream = list(events)
    assert [event["sequence_number"] for _, event in stream] == list(range(len(stream)))
    names = [name for name, _ in stream]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] in {"response.completed", "response.incomplete"}
    response: dict[str, Any] = stream[-1][1]["response"]
    assert all(event["response"]["id"] == response["id"] for name, event in stream[:2])
    assert all(
        (event["response"]["status"], event["response"]["output"]) == ("in_progress", []) for _, event in stream[:2]
    )
    items = _read_items(iter(stream[2:-1]))
    assert items == response["output"]
    assert response["status"] == names[-1].removeprefix("response.")
    return response


def _read_items(events: Iterator[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    for name, event in events:
        assert name == "response.output_item.added"
        assert event["output_index"] == len(items)
        added = event["item"]
        assert added["status"] == "in_progress"
        items.append(_read_item(added, len(items), events))
    return items


def _read_item(added: dict[str, Any], index: int, events: Iterator[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    kind = {"reasoning": "reasoning_text", "message": "output_text", "function_call": "function_call_arguments"}
    has_parts = added["type"] != "function_call"
    if has_parts:
        assert added["content"] == []
        name, event = next(events)
        assert (name, event["part"]["text"]) == ("response.content_part.added", "")
    else:
        assert added["arguments"] == ""
    text = ""
    for name, event in events:
        assert (event["item_id"], event["output_index"], event.get("content_index", 0)) == (added["id"], index, 0)
        if name == f"response.{kind[added['type']]}.delta":
            assert event["delta"]
            text += event["delta"]
            continue
        assert name == f"response.{kind[added['type']]}.done"
        assert event["text" if has_parts else "arguments"] == text
        break
    if has_parts:
        name, event = next(events)
        assert (name, event["part"]["text"]) == ("response.content_part.done", text)
    name, event = next(events)
    assert (name, event["output_index"]) == ("response.output_item.done", index)
    item: dict[str, Any] = event["item"]
    assert ([part["text"] for part in item["content"]] if has_parts else item["arguments"]) == (
        [text] if has_parts else text
    )
    assert {**item, "status": "", "content": [], "arguments": ""} == {
        **added,
        "status": "",
        "content": [],
        "arguments": "",
    }
    return item


def read_message(events: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Returns the message that the events of a stream of Anthropic's form make, having checked their order."""
    stream = iter([(name, event) for name, event in events if name != "ping"])
    name, event = next(stream)
    assert name == "message_start"
    message: dict[str, Any] = event["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    for name, event in stream:
        if name != "content_block_start":
            break
        assert event["index"] == len(message["content"])
        message["content"].append(_read_block(event["content_block"], event["index"], stream))
    assert name == "message_delta"
    assert [name for name, _ in stream] == ["message_stop"]
    return {**message, **event["delta"], "usage": event["usage"]}


def _read_block(block: dict[str, Any], index: int, stream: Iterator[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    text = ""
    for name, event in stream:
        assert event["index"] == index
        if name == "content_block_stop":
            break
        assert name == "content_block_delta"
        delta = event["delta"]
        match block["type"], delta["type"]:
            case "text", "text_delta":
                text += delta["text"]
            case "thinking", "thinking_delta":
                text += delta["thinking"]
            case "thinking", "signature_delta":
                block = {**block, "signature": block["signature"] + delta["signature"]}
            case "tool_use", "input_json_delta":
                text += delta["partial_json"]
            case kinds:
                raise AssertionError(kinds)
    if block["type"] == "tool_use":
        assert block["input"] == {}
        return {**block, "input": json.loads(text) if text else {}}
    return {**block, block["type"]: text}
