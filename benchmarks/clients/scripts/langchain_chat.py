"""langchain's ChatOpenAI: chat, bound tools, and structured output."""

import json
import sys
from pathlib import Path

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

TASK = json.loads(Path("task.json").read_text(encoding="utf-8"))


class City(BaseModel):
    """A city."""

    city: str
    country: str
    population: int


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return TASK["weather"]


model = ChatOpenAI(
    model=TASK["model"], base_url=f"{TASK['url']}/v1", api_key="-", temperature=0, max_completion_tokens=128
)


def chat():
    whole = model.invoke(TASK["question"])
    assert whole.content
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(part.content for part in model.stream(TASK["question"])) == whole.content


def tools():
    bound = model.bind_tools([get_weather])
    messages = [HumanMessage(TASK["weather_question"])]
    first = bound.invoke(messages)
    assert [(call["name"], call["args"]) for call in first.tool_calls] == [("get_weather", {"city": "Oslo"})], first
    streamed = None
    for part in bound.stream(messages):
        streamed = part if streamed is None else streamed + part
    assert [call["args"] for call in streamed.tool_calls] == [{"city": "Oslo"}], streamed
    call = first.tool_calls[0]
    messages += [first, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
    answer = bound.invoke(messages)
    assert TASK["weather"] in answer.content, answer


def structured():
    for method in ("json_schema", "function_calling", "json_mode"):
        city = model.with_structured_output(City, method=method).invoke(TASK["city_question"])
        assert city.city == "Oslo", (method, city)


PARTS = [chat, tools, structured]

{part.__name__: part for part in PARTS}[sys.argv[1]]()
print("passed")
