"""The conversations of the chaos benchmark's clients, on three routes: with thoughts, tools and grammars."""

import random
from typing import Any, Literal

import msgspec

ChatStyle = Literal["plain", "two choices", "thought", "tools", "required", "schema", "schema after a thought"]
CHAT_STYLES: tuple[ChatStyle, ...] = (
    "plain",
    "required",
    "thought",
    "schema",
    "two choices",
    "tools",
    "plain",
    "schema after a thought",
)
"""The styles that conversations take in turn."""

Route = Literal["responses", "messages"]
ROUTES: tuple[Route, ...] = ("responses", "messages")
LENGTHS = (24, 64, 128)
"""The most tokens of an answer; many end before."""
STREAMED_SHARE = 0.75
THOUGHT_TOKENS = 24

QUESTIONS = (
    "Hello!",
    "Tell me a story.",
    "What can you do?",
    "What is a pipeline?",
    "What is the capital of Norway?",
    "Tell me a long story about the lighthouse keeper.",
    "Repeat after me: The old captain counts seven boats.",
    "Give me Oslo as JSON with the keys city, country and population.",
    "Why is the sky blue?",
)
TOOL_QUESTIONS = ("What is the weather in Oslo and Lisbon?", "What is 12 plus 30?", "What is the weather in Rome?")
"""Questions for which the sample model calls tools."""


def _tool(name: str, description: str, **types: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": list(types)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    _tool("get_weather", "Get the weather in a city.", city="string"),
    _tool("add", "Adds two integers.", a="integer", b="integer"),
]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 30},
        "population": {"type": "integer", "minimum": 0, "maximum": 40000000},
        "tags": {"type": "array", "items": {"enum": ["sea", "hill", "old", "new"]}, "maxItems": 3},
    },
    "required": ["city", "population", "tags"],
    "additionalProperties": False,
}
AS_SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}}

SAMPLED = {"temperature": 1, "top_p": 0.95}
FIELDS: dict[ChatStyle, dict[str, Any]] = {
    "plain": {"temperature": 0, "logprobs": True},
    "two choices": {**SAMPLED, "n": 2},
    "thought": {**SAMPLED, "reasoning_effort": "high"},
    "tools": {"temperature": 0, "tools": TOOLS},
    "required": {**SAMPLED, "tools": TOOLS, "tool_choice": "required"},
    "schema": {**SAMPLED, **AS_SCHEMA},
    "schema after a thought": {
        **SAMPLED,
        **AS_SCHEMA,
        "reasoning_effort": "high",
        "thinking_token_budget": THOUGHT_TOKENS,
    },
}
"""What a body of each style has beside its conversation."""


class ChatQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """A body of POST /v1/chat/completions whose answer always is the same; see `Question`."""

    style: ChatStyle
    turns: list[str]
    max_tokens: int
    seed: int
    is_streamed: bool

    path = "/v1/chat/completions"

    @property
    def choices(self) -> int:
        """The number of choices."""
        return int(FIELDS[self.style].get("n", 1))

    def __str__(self) -> str:
        way = "streamed" if self.is_streamed else "whole"
        return f"chat, {self.style}, {way}, {self.max_tokens} tokens after {self.turns[-1]!r}"

    def body(self) -> dict[str, object]:
        """The JSON object of the body."""
        roles = ("user", "assistant")
        return {
            "messages": [{"role": roles[place % 2], "content": turn} for place, turn in enumerate(self.turns)],
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "stream": self.is_streamed,
            "return_token_ids": True,
            **FIELDS[self.style],
        }


class RouteQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """A body of POST /v1/responses or /v1/messages with tools, whose answer always is the same; see `Question`."""

    route: Route
    question: str
    max_tokens: int
    seed: int
    is_streamed: bool

    choices = 1

    @property
    def path(self) -> str:
        """The route's path."""
        return f"/v1/{self.route}"

    def __str__(self) -> str:
        way = "streamed" if self.is_streamed else "whole"
        return f"{self.route}, {way}, {self.max_tokens} tokens after {self.question!r}"

    def body(self) -> dict[str, object]:
        """The JSON object of the body."""
        tools = [tool["function"] for tool in TOOLS]
        fields = {**SAMPLED, "seed": self.seed, "stream": self.is_streamed}
        if self.route == "responses":
            own = [{"type": "function", **tool} for tool in tools]
            return {**fields, "input": self.question, "max_output_tokens": self.max_tokens, "tools": own}
        own = [{"name": tool["name"], "input_schema": tool["parameters"]} for tool in tools]
        messages = [{"role": "user", "content": self.question}]
        return {**fields, "messages": messages, "max_tokens": self.max_tokens, "tools": own}


def conversations(count: int, seed: int) -> list[ChatQuestion]:
    """Makes `count` questions of all styles, which follow from the seed; a third of them come after another turn."""
    draw = random.Random(f"chat {seed}")
    styles = [CHAT_STYLES[number % len(CHAT_STYLES)] for number in range(count)]
    return [
        ChatQuestion(
            style=style,
            turns=[*(["Hello!", "Hello."] if draw.random() < 1 / 3 else []), _question(style, draw)],
            max_tokens=draw.choice(LENGTHS),
            seed=draw.randrange(1 << 31),
            is_streamed=draw.random() < STREAMED_SHARE,
        )
        for style in styles
    ]


def _question(style: ChatStyle, draw: random.Random) -> str:
    return draw.choice(TOOL_QUESTIONS if style == "tools" else QUESTIONS)


def questions_of_other_routes(seed: int) -> list[RouteQuestion]:
    """Makes a streamed and a whole question of each other route, which follow from the seed."""
    draw = random.Random(f"routes {seed}")
    return [
        RouteQuestion(
            route=route,
            question=draw.choice(TOOL_QUESTIONS),
            max_tokens=draw.choice(LENGTHS),
            seed=draw.randrange(1 << 31),
            is_streamed=is_streamed,
        )
        for route in ROUTES
        for is_streamed in (True, False)
    ]
