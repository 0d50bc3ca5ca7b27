"""A model that chats in DeepSeek's format, and an engine that answers with texts of the test's choice."""

import json
from collections.abc import Sequence
from typing import Any

import httpx
import msgspec

from api.messages.engine import AddRequest
from api.openai.answer_format import CALL, CALLS, END_CALL, END_CALLS, SEPARATOR
from api.openai.chat import ChatModel
from api.server.app import create_app
from api.settings.chat import ChatOptions
from api.settings.server import FrontSettings
from api.text.served_model import ServedModel
from api.text.tokenizer import TextTokenizer
from tests.support.api_server import MODEL
from tests.support.fake_engine import FakeEngine, Script
from tests.support.small_tokenizer import BOS, EOS, EOS_ID, small_tokenizer

TEMPLATE = """{{ bos_token }}
{%- for tool in tools or [] %}[tool {{ tool.function.name }}]{% endfor %}
{%- for message in messages %}[{{ message.role }}]
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}<｜tool▁call▁begin｜>{{ call.function.name }}<｜tool▁sep｜>
{{- call.function.arguments }}{% endfor %}
{%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}[assistant]{{ '<think>' if thinking else '</think>' }}{% endif %}"""
"""A template of V3.1's kind: thoughts where they are asked for, calls without a fence, and plain marks for roles."""

CHAT_TOKENIZER = TextTokenizer(
    small_tokenizer(),
    bos_token=BOS,
    eos_token=EOS,
    add_bos=True,
    config={"bos_token": BOS, "eos_token": EOS, "chat_template": TEMPLATE},
)

CHAT_MODEL = msgspec.structs.replace(MODEL, tokenizer=CHAT_TOKENIZER, max_model_len=2048)

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
"""The arguments of the tool that tests offer."""


def chat_model(served: ServedModel = CHAT_MODEL) -> ChatModel:
    """Returns the model with its template, whose format is found in it."""
    return ChatModel.of(served, ChatOptions())


def says(*texts: str) -> Script:
    """A script that answers each request with the next of these texts and EOS; the last one answers all that follow."""
    left = list(texts)

    def script(_: AddRequest) -> Sequence[int]:
        text = left.pop(0) if len(left) > 1 else left[0]
        return [*CHAT_TOKENIZER.encode(text, add_special_tokens=False), EOS_ID]

    return script


def call_text(*calls: tuple[str, dict[str, Any] | str]) -> str:
    """Tool calls as the model writes them; arguments that are a text are written as they are."""
    written = [
        f"{CALL}{name}{SEPARATOR}{given if isinstance(given, str) else json.dumps(given)}{END_CALL}"
        for name, given in calls
    ]
    return CALLS + "".join(written) + END_CALLS


def prompt_of(engine: FakeEngine, index: int = -1) -> str:
    """The prompt of one of the requests that reached the engine, as a text."""
    return CHAT_TOKENIZER.decode(engine.streams[index].request.tokens, skip_special_tokens=False)


def chat_client(
    engine: FakeEngine, served: ServedModel = CHAT_MODEL, front: FrontSettings | None = None
) -> httpx.AsyncClient:
    """A client of the application in this process."""
    transport = httpx.ASGITransport(create_app(served, engine, front=front), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def named_events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream, each with its name, which must be framed as in the standard and named by their type."""
    *parts, rest = text.split("\n\n")
    assert rest == ""
    events = []
    for part in parts:
        name, data = part.split("\n")
        fields = json.loads(data.removeprefix("data: "))
        assert name == f"event: {fields['type']}"
        events.append((fields["type"], fields))
    return events
