"""openai for Python: completions, chat, thoughts, tools, structured output, and responses."""

import json
import sys
from pathlib import Path

import openai
from pydantic import BaseModel

TASK = json.loads(Path("task.json").read_text(encoding="utf-8"))
MODEL = TASK["model"]
SCHEMA = {"name": "city", "schema": TASK["city_schema"], "strict": True}

client = openai.OpenAI(base_url=f"{TASK['url']}/v1", api_key="-")


class City(BaseModel):
    city: str
    country: str
    population: int


class GetWeather(BaseModel):
    """Get the weather in a city."""

    city: str


def user(text):
    return [{"role": "user", "content": text}]


def completions():
    asked = {"model": MODEL, "prompt": TASK["prompt"], "max_tokens": 16, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=2)
    parts = client.completions.create(**asked, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert [model.id for model in client.models.list()] == [MODEL]


def chat():
    messages = [{"role": "system", "content": TASK["system"]}, *user(TASK["question"])]
    for question in (TASK["question"], TASK["next_question"]):
        asked = {"model": MODEL, "messages": messages, "max_completion_tokens": 64, "temperature": 0}
        whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        message = whole.choices[0].message
        assert message.role == "assistant", message
        assert message.content, question
        parts = [*client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})]
        deltas = [part.choices[0].delta.content or "" for part in parts if part.choices]
        assert "".join(deltas) == message.content
        assert parts[-1].usage == whole.usage
        with client.chat.completions.stream(**asked) as stream:
            assert stream.get_final_completion().choices[0].message.content == message.content
        messages += [{"role": "assistant", "content": message.content}, *user(TASK["next_question"])]


def thought():
    asked = {"model": MODEL, "messages": user(TASK["question"]), "temperature": 0, "max_completion_tokens": 128}
    whole = client.chat.completions.create(**asked, reasoning_effort="high")
    message = whole.choices[0].message
    assert message.reasoning_content == message.reasoning
    assert message.reasoning
    assert message.content
    assert whole.usage.completion_tokens_details.reasoning_tokens > 0
    deltas = [
        part.choices[0].delta
        for part in client.chat.completions.create(**asked, reasoning_effort="high", stream=True)
        if part.choices
    ]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == message.reasoning
    assert "".join(delta.content or "" for delta in deltas) == message.content
    plain = client.chat.completions.create(**asked, reasoning_effort="none").choices[0].message
    assert not getattr(plain, "reasoning", None)


def tools():
    offered = [{"type": "function", "function": TASK["tool"]}]
    messages = user(TASK["weather_question"])
    asked = {"model": MODEL, "messages": messages, "tools": offered, "temperature": 0, "max_completion_tokens": 128}
    choice = client.chat.completions.create(**asked, tool_choice="auto").choices[0]
    assert choice.finish_reason == "tool_calls", choice
    call = choice.message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls", final
    assert final.message.tool_calls[0].function.name == call.function.name
    assert final.message.tool_calls[0].function.arguments == call.function.arguments
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": TASK["weather"]}]
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.finish_reason == "stop", answer
    assert TASK["weather"] in answer.message.content, answer
    none = client.chat.completions.create(**{**asked, "messages": messages[:1]}, tool_choice="none").choices[0]
    assert not none.message.tool_calls, none


def strict_tools():
    strict = openai.pydantic_function_tool(GetWeather, name="get_weather")
    asked = {"model": MODEL, "messages": user(TASK["weather_question"]), "tools": [strict], "temperature": 0}
    for tool_choice in ("auto", "required", {"type": "function", "function": {"name": "get_weather"}}):
        parsed = client.chat.completions.parse(**asked, tool_choice=tool_choice, max_completion_tokens=128)
        assert parsed.choices[0].message.tool_calls[0].function.parsed_arguments == GetWeather(city="Oslo"), tool_choice


def structured():
    asked = {"model": MODEL, "messages": user(TASK["city_question"]), "temperature": 0, "max_completion_tokens": 128}
    form = {"type": "json_schema", "json_schema": SCHEMA}
    whole = client.chat.completions.create(**asked, response_format=form).choices[0].message.content
    assert City.model_validate_json(whole).city == "Oslo"
    parts = client.chat.completions.create(**asked, response_format=form, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole
    assert client.chat.completions.parse(**asked, response_format=City).choices[0].message.parsed.city == "Oslo"
    with client.chat.completions.stream(**asked, response_format=City) as stream:
        assert stream.get_final_completion().choices[0].message.parsed.city == "Oslo"
    loose = client.chat.completions.create(**asked, response_format={"type": "json_object"})
    assert isinstance(json.loads(loose.choices[0].message.content), dict)


def responses():
    asked = {"model": MODEL, "input": TASK["question"], "temperature": 0, "max_output_tokens": 128}
    whole = client.responses.create(**asked, instructions=TASK["system"])
    assert whole.status == "completed", whole
    assert whole.output_text, whole
    with client.responses.stream(**asked, instructions=TASK["system"]) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == whole.output_text
    thinking = client.responses.create(**asked, reasoning={"effort": "high"})
    assert [item.type for item in thinking.output] == ["reasoning", "message"], thinking.output
    events = [event.type for event in client.responses.create(**asked, reasoning={"effort": "high"}, stream=True)]
    assert events[0] == "response.created", events
    assert events[-1] == "response.completed", events
    assert "response.reasoning_text.delta" in events


def responses_tools():
    offered = [{"type": "function", **TASK["tool"], "strict": False}]
    items = user(TASK["weather_question"])
    asked = {"model": MODEL, "tools": offered, "temperature": 0, "max_output_tokens": 128}
    first = client.responses.create(**asked, input=items)
    call = next(item for item in first.output if item.type == "function_call")
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Oslo"})
    with client.responses.stream(**asked, input=items) as stream:
        streamed = [item for item in stream.get_final_response().output if item.type == "function_call"]
    assert [item.arguments for item in streamed] == [call.arguments]
    items += [*first.output, {"type": "function_call_output", "call_id": call.call_id, "output": TASK["weather"]}]
    assert TASK["weather"] in client.responses.create(**asked, input=items).output_text


def responses_structured():
    asked = {"model": MODEL, "input": TASK["city_question"], "temperature": 0, "max_output_tokens": 128}
    assert client.responses.parse(**asked, text_format=City).output_parsed.city == "Oslo"


PARTS = [completions, chat, thought, tools, strict_tools, structured, responses, responses_tools, responses_structured]

{part.__name__: part for part in PARTS}[sys.argv[1]]()
print("passed")
