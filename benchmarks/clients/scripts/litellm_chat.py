"""litellm: chat in one answer and streamed, thoughts, tools, and structured output."""

import json
import sys
from pathlib import Path

import litellm
from pydantic import BaseModel

TASK = json.loads(Path("task.json").read_text(encoding="utf-8"))
ASKED = {"model": f"openai/{TASK['model']}", "api_base": f"{TASK['url']}/v1", "api_key": "-", "temperature": 0}


class City(BaseModel):
    city: str
    country: str
    population: int


def user(text):
    return [{"role": "user", "content": text}]


def chat():
    asked = {**ASKED, "messages": user(TASK["question"]), "max_tokens": 64}
    whole = litellm.completion(**asked).choices[0].message.content
    assert whole
    parts = litellm.completion(**asked, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole


def thought():
    asked = {**ASKED, "messages": user(TASK["question"]), "max_tokens": 128}
    asked |= {"reasoning_effort": "high", "allowed_openai_params": ["reasoning_effort"]}
    message = litellm.completion(**asked).choices[0].message
    assert message.reasoning_content
    assert message.content
    deltas = [part.choices[0].delta for part in litellm.completion(**asked, stream=True)]
    streamed = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert streamed == message.reasoning_content


def tools():
    messages = user(TASK["weather_question"])
    asked = {
        **ASKED,
        "messages": messages,
        "tools": [{"type": "function", "function": TASK["tool"]}],
        "max_tokens": 128,
    }
    choice = litellm.completion(**asked, tool_choice="auto").choices[0]
    assert choice.finish_reason == "tool_calls", choice
    call = choice.message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})
    rebuilt = litellm.stream_chunk_builder([*litellm.completion(**asked, stream=True)])
    assert rebuilt.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": TASK["weather"]}]
    answer = litellm.completion(**asked).choices[0].message.content
    assert TASK["weather"] in answer, answer


def structured():
    asked = {**ASKED, "messages": user(TASK["city_question"]), "max_tokens": 128}
    answer = litellm.completion(**asked, response_format=City).choices[0].message.content
    assert City.model_validate_json(answer).city == "Oslo"


PARTS = [chat, thought, tools, structured]

{part.__name__: part for part in PARTS}[sys.argv[1]]()
print("passed")
