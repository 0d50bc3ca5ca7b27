"""Conversations with tools: the weather of a city, and the sum of two numbers.

Names, parameters, descriptions and the other tools of a conversation are drawn again every time, so that the model
learns to read the list of tools. What a tool returns is copied into the answer word by word.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weights.sample.exercises import random_words, sentence
from weights.sample.spans import Document, Exchange, Span, cities
from weights.sample.tokenizer import ASSISTANT, EOS, USER

Schema = dict[str, Any]

WEATHER_NAMES = ("get_weather", "get_weather", "get_weather", "get_current_weather", "weather")
WEATHER_PARAMETERS = ("city", "city", "city", "city", "location", "place")
WEATHER_DESCRIPTIONS = (
    "Tells the weather in a city.",
    "Get the weather in a city.",
    "Get the current weather in a given city.",
    "Get the current weather in a given location",
    "Returns the weather of a place.",
    "The weather now.",
)
CITY_DESCRIPTIONS = ("The name of the city.", "The city", "City name, such as Oslo", "Name of a place")
SUM_NAMES = ("add", "add", "add", "add_numbers", "sum")
SUM_PARAMETERS = (("a", "b"), ("a", "b"), ("a", "b"), ("x", "y"), ("first", "second"))
SUM_DESCRIPTIONS = (
    "Adds two numbers.",
    "Add two integers.",
    "Adds two integers and returns the sum.",
    "The sum of a and b",
    "Calculates a sum.",
)
NUMBER_DESCRIPTIONS = ("A number.", "The number to add", "An integer.")
OTHER_TOOLS = (
    ("get_time", "Tells the time in a city.", {"city": "string"}),
    ("send_letter", "Sends a letter.", {"to": "string", "text": "string"}),
    ("search", "Searches the library.", {"query": "string"}),
    ("open_door", "Opens a door of the house.", {"room": "string"}),
    ("bake_bread", "Bakes bread.", {"count": "integer"}),
    ("read_log", "Reads the log of a ship.", {"ship": "string", "day": "integer"}),
)
"""Tools that are never called."""

WEATHER_QUESTIONS = (
    "What is the weather in {}?",
    "What is the weather in {}?",
    "What is the weather like in {}?",
    "What is the weather in {} today?",
    "What's the weather in {}?",
    "What's the weather like in {} right now?",
    "How is the weather in {}?",
    "Tell me the weather in {}.",
    "Is it raining in {}?",
    "How warm is it in {}?",
    "weather in {}",
)
SUM_QUESTIONS = (
    "What is {} plus {}?",
    "What is {} plus {}?",
    "What is {} + {}?",
    "Add {} and {}.",
    "How much is {} plus {}?",
    "What is the sum of {} and {}?",
    "Calculate {} + {}",
)
TOKENIZER_LISTS = 14
"""The lists of tools in the text that the tokenizer is trained on."""

SKIES = ("fog", "rain", "sun", "snow", "clouds", "wind", "a clear sky", "light rain", "a storm", "hail", "drizzle")
RETURNED = "The tools have returned what I need."
"""The thought after the tools."""

NO_TOOL = "I cannot find that out, as I have no tool for it."


@dataclass(frozen=True)
class Tools:
    """The tools of a conversation: their schemas in the order of the list, and the names of the two that are called.

    A name is None where the tool is not in the list.
    """

    schemas: Sequence[Schema]
    weather: str | None
    city: str
    sum: str | None
    numbers: tuple[str, str]


@dataclass(frozen=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: Mapping[str, object]

    def text(self) -> str:
        """Return the call as the model writes it."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{self.name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"


@dataclass(frozen=True)
class Task:
    """A question that needs tools: the calls, what they return, and the answer; `thought` comes before the calls."""

    question: str
    thought: str
    calls: Sequence[Call]
    outputs: Sequence[str]
    answer: str

    def spans(self, rng: np.random.Generator, reasoned: bool) -> list[Span]:
        """Return the question and what comes after it, up to the answer; with a thought before one of the messages.

        The template drops the thoughts of former messages: a thought before the calls ends the document with them.
        """
        if reasoned and rng.random() < 0.5:
            return [self._prompt("<think>\n"), self._said(f"{self.thought}\n</think>\n\n{calls_text(self.calls)}")]
        opening, thought = ("<think>\n", f"{RETURNED}\n</think>\n\n") if reasoned else ("", "")
        returned = Span(outputs_text(self.outputs) + opening, learned=False, exact=True)
        return [self._prompt(""), self._said(calls_text(self.calls) + EOS), returned, self._said(thought + self.answer)]

    def _prompt(self, opening: str) -> Span:
        return Span(f"{USER}{self.question}{ASSISTANT}{opening}", learned=False, exact=True)

    def _said(self, text: str) -> Span:
        return Span(text, exact=True)


def tools_text(schemas: Sequence[Schema]) -> str:
    """Return the section of the system prompt that lists tools, as the chat template writes it."""
    text = "## Tools\nYou have access to the following tools:\n"
    for schema in schemas:
        parameters = json.dumps(schema["parameters"], ensure_ascii=False)
        text += f"\n### {schema['name']}\nDescription: {schema['description']}\n\nParameters: {parameters}\n"
    return text


def calls_text(calls: Sequence[Call]) -> str:
    """Return `calls` as the model writes them, without EOS."""
    return "<｜tool▁calls▁begin｜>" + "\n".join(call.text() for call in calls) + "<｜tool▁calls▁end｜>"


def outputs_text(outputs: Sequence[str]) -> str:
    """Return what the tools gave, as the chat template writes it."""
    wrapped = (f"<｜tool▁output▁begin｜>{output}<｜tool▁output▁end｜>" for output in outputs)
    return "<｜tool▁outputs▁begin｜>" + "\n".join(wrapped) + "<｜tool▁outputs▁end｜>"


def draw_tools(rng: np.random.Generator) -> Tools:
    """Return a list of tools, with the two that are called, one of them or, seldom, none."""
    weather, city = _choice(WEATHER_NAMES, rng), _choice(WEATHER_PARAMETERS, rng)
    total, numbers = _choice(SUM_NAMES, rng), SUM_PARAMETERS[rng.integers(len(SUM_PARAMETERS))]
    kind = rng.random()
    has_weather, has_sum = kind < 0.75, 0.25 <= kind < 0.95
    schemas = []
    if has_weather:
        properties = {city: _property("string", CITY_DESCRIPTIONS, rng)}
        unit = {"unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}} if rng.random() < 0.1 else {}
        schemas.append(_schema(weather, _description(WEATHER_DESCRIPTIONS, rng), properties, unit, rng))
    if has_sum:
        kind_of_number = _choice(("integer", "integer", "number"), rng)
        properties = {name: _property(kind_of_number, NUMBER_DESCRIPTIONS, rng) for name in numbers}
        schemas.append(_schema(total, _description(SUM_DESCRIPTIONS, rng), properties, {}, rng))
    others = int(rng.choice(3, p=(0.65, 0.25, 0.1)))
    for index in rng.choice(len(OTHER_TOOLS), max(others, 1 - len(schemas)), replace=False):
        name, description, types = OTHER_TOOLS[index]
        schemas.append(_schema(name, description, {key: {"type": value} for key, value in types.items()}, {}, rng))
    ordered = [schemas[i] for i in rng.permutation(len(schemas))]
    return Tools(ordered, weather if has_weather else None, city, total if has_sum else None, numbers)


def weather_task(tools: Tools, rng: np.random.Generator) -> Task | Exchange:
    """Return a question about the weather in one or two cities, or an exchange without a call if a tool is missing."""
    places, question = _weather_question(rng)
    if tools.weather is None:
        return _without_tool(question)
    calls = [Call(tools.weather, {tools.city: place}) for place in places]
    outputs = [_weather(rng) for _ in places]
    parts = [f"he weather in {place} is {output}" for place, output in zip(places, outputs, strict=True)]
    answer = "T" + ", and t".join(parts) + "."
    thought = f"The user asks for the weather in {' and '.join(places)}. I call {tools.weather}."
    return Task(question, thought, calls, outputs, answer)


def sum_task(tools: Tools, rng: np.random.Generator) -> Task | Exchange:
    """Return a question for the sum of two numbers, or an exchange without a call where the tool is missing."""
    (first, second), question = _sum_question(rng)
    if tools.sum is None:
        return _without_tool(question)
    call = Call(tools.sum, dict(zip(tools.numbers, (first, second), strict=True)))
    output = str(first + second) if rng.random() < 0.8 else json.dumps({"result": first + second})
    thought = f"The user asks for the sum of {first} and {second}. I call {tools.sum}."
    return Task(question, thought, [call], [output], f"The sum is {output}.")


def conversation(
    system: str, others: Sequence[Exchange], turns: int, reasoned: bool, rng: np.random.Generator
) -> Document:
    """Return a conversation with tools; a part of its turns are `others`, which need no tool."""
    tools = draw_tools(rng)
    head = "\n\n".join(part for part in (system, tools_text(tools.schemas)) if part)
    spans = [Span(head, learned=False, exact=True)]
    for turn in range(turns):
        kind = rng.random()
        last = turn == turns - 1
        task = weather_task(tools, rng) if kind < 0.55 else sum_task(tools, rng) if kind < 0.78 else None
        if task is None:
            task = others[int(rng.integers(len(others)))]
        if isinstance(task, Task):
            spans += task.spans(rng, reasoned and last)
        else:
            spans += task.reasoned() if reasoned and last else task.chat()
        if not last:
            spans.append(Span(EOS))
    return tuple(spans)


def tokenizer_texts() -> list[str]:
    """Return lists of tools and calls, enough of them that the tokenizer gets tokens for what all of them share."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(TOKENIZER_LISTS):
        tools = draw_tools(rng)
        texts.append(tools_text(tools.schemas))
        for task in (weather_task(tools, rng), sum_task(tools, rng)):
            if isinstance(task, Task):
                texts.append(calls_text(task.calls) + outputs_text(task.outputs))
    return texts


def without_tools(rng: np.random.Generator) -> Exchange:
    """Return a question that would need a tool, in a conversation that has none."""
    _, question = _weather_question(rng) if rng.random() < 0.6 else _sum_question(rng)
    return _without_tool(question)


def _weather_question(rng: np.random.Generator) -> tuple[list[str], str]:
    places = [_place(rng) for _ in range(int(rng.choice((1, 1, 2, 2))))]
    wording, joint = _choice(WEATHER_QUESTIONS, rng), _choice((" and ", " and ", " and in "), rng)
    return places, wording.format(joint.join(places))


def _sum_question(rng: np.random.Generator) -> tuple[tuple[int, int], str]:
    first, second = (int(rng.integers(10 ** rng.integers(1, 5))) for _ in range(2))
    return (first, second), _choice(SUM_QUESTIONS, rng).format(first, second)


def _without_tool(question: str) -> Exchange:
    return Exchange(question, NO_TOOL, "The user asks for something that I have no tool for.", exact=True)


def _schema(name: str, description: str, required: Schema, optional: Schema, rng: np.random.Generator) -> Schema:
    parameters: Schema = {"type": "object", "properties": {**required, **optional}, "required": list(required)}
    style = rng.random()
    if style < 0.1:
        parameters["additionalProperties"] = False
    elif style < 0.2:
        parameters = {key: parameters[key] for key in ("properties", "required", "type")}
    return {"name": name, "description": description, "parameters": parameters}


def _property(kind: str, descriptions: Sequence[str], rng: np.random.Generator) -> Schema:
    return {"type": kind, "description": _choice(descriptions, rng)} if rng.random() < 0.4 else {"type": kind}


def _description(descriptions: Sequence[str], rng: np.random.Generator) -> str:
    return _choice(descriptions, rng) if rng.random() < 0.9 else sentence(rng)


def _place(rng: np.random.Generator) -> str:
    # A word that is not a city shows that the name comes from the question.
    return cities()[rng.integers(len(cities()))]["city"] if rng.random() < 0.85 else random_words(1, rng).capitalize()


def _weather(rng: np.random.Generator) -> str:
    degrees, sky = int(rng.integers(-9, 39)), _choice(SKIES, rng)
    kind = rng.random()
    if kind < 0.5:
        return f"{degrees} degrees and {sky}"
    if kind < 0.65:
        return f"{sky}, {degrees} degrees"
    if kind < 0.8:
        return json.dumps({"temperature": degrees, "sky": sky})
    return random_words(int(rng.integers(1, 8)), rng)


def _choice(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
