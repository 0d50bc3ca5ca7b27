"""Messages as templates want them: text parts joined, earlier thoughts under all their names, calls in their form."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import msgspec

from api.errors import RequestError

Message = dict[str, Any]

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""The types of parts of a content that are text, and the key of the text."""

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""The names of a thought in clients' messages, the one that most templates read first."""

TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What a template can end with."""


def normalise_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Returns messages whose content is a text, or None beside tool calls, and whose thought has all its names.

    Raises RequestError where a part of a content is not text.
    """
    return [_normal(message, f"messages[{place}].content") for place, message in enumerate(messages)]


def joined_parts(content: object, field: str) -> str | None:
    """The text of a content: parts become lines, as in vLLM. Raises RequestError naming the type of another part."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{field} must be a string or a list of text parts.", field)
    return "\n".join(_text(part, f"{field}[{place}]") for place, part in enumerate(content))


def _text(part: object, field: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        raise RequestError(f"{field} must be an object with a type.", field)
    key = TEXT_PARTS.get(kind)
    if key is None:
        raise RequestError(f"{field} is of type {kind[:64]!r}: only text is served.", field)
    text = part.get(key)
    if not isinstance(text, str):
        raise RequestError(f"{field}.{key} must be a string.", f"{field}.{key}")
    return text


def _normal(message: Mapping[str, Any], field: str) -> Message:
    content = joined_parts(message.get("content"), field)
    normal = {**message, "content": content}
    if not message.get("tool_calls"):
        # A template may look for the key alone.
        normal.pop("tool_calls", None)
        normal["content"] = content or ""
    thought = next((message[key] for key in REASONING_KEYS if message.get(key) is not None), None)
    if thought is not None:
        normal |= dict.fromkeys(REASONING_KEYS, thought)
    return normal


class CallForm(msgspec.Struct, frozen=True):
    """How a template wants a message with tool calls: an empty content as `content`, arguments as text or as object."""

    content: str | None = None
    takes_objects: bool = False

    @classmethod
    def of(cls, render: Callable[[list[Message]], str]) -> "CallForm":
        """Finds the form in which a template shows a call as it should be, by trying all."""
        forms = [cls(content, takes_objects) for takes_objects in (False, True) for content in (None, "")]
        return max(forms, key=lambda form: _shown(form, render))

    def apply(self, messages: Sequence[Message]) -> list[Message]:
        """Returns messages in this form."""
        return [self._applied(message) for message in messages]

    def _applied(self, message: Message) -> Message:
        calls = message.get("tool_calls")
        if not calls:
            return message
        return {
            **message,
            "content": message.get("content") or self.content,
            "tool_calls": [self._call(call) for call in calls],
        }

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = function["arguments"]
        if self.takes_objects and isinstance(arguments, str):
            arguments = _parsed(arguments)
        elif not self.takes_objects and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": "{}" if arguments == "" else arguments}}


def _parsed(arguments: str) -> Any:
    """Arguments as an object. What a model wrote wrongly stays a text: refused, it would end the conversation."""
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments


TRIED_NAME = "name_of_a_function"
TRIED_KEY = "key_of_an_argument"
TRIED_OBJECT = re.compile(rf'\{{\s*"{TRIED_KEY}"\s*:\s*1\s*\}}')


def _shown(form: CallForm, render: Callable[[list[Message]], str]) -> int:
    """How well a template shows a call of this form.

    2 where the call's arguments stand in the text as JSON, 1 where they stand there otherwise, 0 where the template has
    no calls in its text, and -1 where it fails.
    """
    function = {"name": TRIED_NAME, "arguments": json.dumps({TRIED_KEY: 1})}
    call = {"id": "call_1", "type": "function", "function": function}
    messages = form.apply(
        [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "name": TRIED_NAME, "content": "result"},
        ]
    )
    try:
        text = render(messages)
    except TEMPLATE_ERRORS:
        return -1
    if TRIED_NAME not in text or TRIED_KEY not in text:
        return 0
    return 2 if TRIED_OBJECT.search(text) else 1
