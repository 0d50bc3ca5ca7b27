"""anthropic: messages, streams, thoughts, tools, and the count of tokens."""

import json
import sys
from pathlib import Path

import anthropic

TASK = json.loads(Path("task.json").read_text(encoding="utf-8"))
MODEL = TASK["model"]
GREEDY = {"extra_body": {"temperature": 0}}
"""Not an option of the client's own any more."""

client = anthropic.Anthropic(base_url=TASK["url"], api_key="-")


def user(text):
    return [{"role": "user", "content": text}]


def messages():
    asked = {"model": MODEL, "messages": user(TASK["question"]), "system": TASK["system"], "max_tokens": 64, **GREEDY}
    whole = client.messages.create(**asked)
    assert (whole.role, whole.type) == ("assistant", "message"), whole
    assert whole.content[0].text, whole
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        final = stream.get_final_message()
    assert (final.content[0].text, final.stop_reason) == (whole.content[0].text, whole.stop_reason)
    assert final.usage.output_tokens == whole.usage.output_tokens


def thought():
    asked = {"model": MODEL, "messages": user(TASK["question"]), "max_tokens": 1200, **GREEDY}
    asked["thinking"] = {"type": "enabled", "budget_tokens": 1024}
    whole = client.messages.create(**asked)
    assert [block.type for block in whole.content] == ["thinking", "text"], whole
    assert whole.content[0].thinking
    with client.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"], final
    assert final.content[0].thinking == whole.content[0].thinking


def tools():
    tool = TASK["tool"]
    offered = [{"name": tool["name"], "description": tool["description"], "input_schema": tool["parameters"]}]
    conversation = user(TASK["weather_question"])
    asked = {"model": MODEL, "tools": offered, "max_tokens": 128, **GREEDY}
    first = client.messages.create(**asked, messages=conversation)
    assert first.stop_reason == "tool_use", first
    call = next(block for block in first.content if block.type == "tool_use")
    assert (call.name, call.input) == ("get_weather", {"city": "Oslo"})
    with client.messages.stream(**asked, messages=conversation) as stream:
        streamed = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert [block.input for block in streamed] == [call.input]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": TASK["weather"]}
    conversation += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    answer = client.messages.create(**asked, messages=conversation)
    assert answer.stop_reason == "end_turn", answer
    assert TASK["weather"] in answer.content[0].text, answer


def count_tokens():
    asked = {"model": MODEL, "messages": user(TASK["question"])}
    counted = client.messages.count_tokens(**asked).input_tokens
    assert counted == client.messages.create(**asked, max_tokens=1).usage.input_tokens
    assert client.messages.count_tokens(**asked, system=TASK["system"]).input_tokens > counted


PARTS = [messages, thought, tools, count_tokens]

{part.__name__: part for part in PARTS}[sys.argv[1]]()
print("passed")
