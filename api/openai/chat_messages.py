"""The messages and tools of a chat request: their types and bounds, and how templates get them."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta
from pydantic import PlainValidator

from api.errors import RequestError
from api.text.template_messages import Message, normalise_messages

MESSAGES_MAX = 4096
CALLS_MAX = 128
TOOLS_MAX = 128
"""The most tools of a request, as with OpenAI."""

MESSAGE_CHARACTERS_MAX = 300

Content = str | list[Any]

Label = Annotated[str, Meta(max_length=1024)]

ToolName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]

CalledName = Annotated[str, Meta(min_length=1, max_length=1024)]
"""A name that a model called, which may be none of the tools': refused, it would end the conversation."""

EMPTY_PARAMETERS = {"type": "object", "properties": {}}
"""The parameters of a function without any, which templates cannot do without."""


class FunctionCall(msgspec.Struct, frozen=True):
    """The function that a model called. Arguments are JSON; some clients send the object itself."""

    name: CalledName
    arguments: str | dict[str, Any] = ""


class ToolCall(msgspec.Struct, frozen=True):
    """One call of an assistant's message, with the id that its result refers to."""

    id: Label
    function: FunctionCall
    type: Literal["function"] = "function"

    def for_template(self) -> dict[str, Any]:
        """Returns the call as templates get it."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": self.type, "function": function}


class ChatMessage(msgspec.Struct, frozen=True, tag_field="role", kw_only=True):
    """What all messages have. Fields that are not listed are ignored."""

    template_role: ClassVar[str]

    name: Label | None = None

    def for_template(self) -> Message:
        """Returns the message as templates get it: without the fields that are absent."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        present = {name: value for name, value in fields.items() if value is not None}
        return {"role": self.template_role, **present}


class SystemMessage(ChatMessage, frozen=True, tag="system"):
    """Instructions to the model."""

    template_role = "system"

    content: Content


class DeveloperMessage(SystemMessage, frozen=True, tag="developer"):
    """Instructions under OpenAI's newer name; templates know the older one."""


class UserMessage(ChatMessage, frozen=True, tag="user"):
    """What the user says."""

    template_role = "user"

    content: Content


class AssistantMessage(ChatMessage, frozen=True, tag="assistant"):
    """What the model said: its answer, its thought under either name, its calls.

    With `prefix` the message is the beginning of an answer, which some templates look for.
    """

    template_role = "assistant"

    content: Content | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=CALLS_MAX)] | None = None
    prefix: bool | None = None

    def for_template(self) -> Message:
        """Returns the message as templates get it."""
        message = super().for_template()
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


class ToolMessage(ChatMessage, frozen=True, tag="tool"):
    """The result of a call."""

    template_role = "tool"

    content: Content
    tool_call_id: Label | None = None


AnyMessage = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class FunctionTool(msgspec.Struct, frozen=True):
    """A function that the model may call. With `strict`, its arguments follow `parameters`, a JSON schema."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    """A tool of a request; only functions are served."""

    type: Literal["function"]
    function: FunctionTool

    def for_template(self) -> dict[str, Any]:
        """Returns the tool as templates get it: all clients' alike, so that they share cached prompts."""
        function = {
            "name": self.function.name,
            "description": self.function.description or "",
            "parameters": EMPTY_PARAMETERS if self.function.parameters is None else self.function.parameters,
        }
        return {"type": self.type, "function": function}


class ToolChoice(msgspec.Struct, frozen=True):
    """Whether the model may or must call, and the only function that it may call."""

    mode: Literal["none", "auto", "required"]
    name: str | None = None


class _Name(msgspec.Struct, frozen=True):
    name: ToolName


class _NamedChoice(msgspec.Struct, frozen=True):
    type: Literal["function"]
    function: _Name


def parse_messages(value: object) -> list[Message]:
    """Reads the field `messages`, and returns them as templates get them, their text parts joined.

    Raises RequestError naming the place at fault.
    """
    if isinstance(value, list) and not value:
        raise RequestError("messages is empty: give at least one message.", "messages")
    _check_count("messages", value, MESSAGES_MAX)
    messages = _converted("messages", value, list[AnyMessage])
    return normalise_messages([message.for_template() for message in messages])


def parse_tools(value: object) -> list[Tool]:
    """Reads the field `tools`; without any the list is empty. Raises RequestError naming the place at fault."""
    if value is None:
        return []
    _check_count("tools", value, TOOLS_MAX)
    tools: list[Tool] = _converted("tools", value, list[Tool])
    return tools


def parse_tool_choice(value: object, tools: Sequence[Tool]) -> ToolChoice:
    """Reads the field `tool_choice`; without it the model may call if there are tools.

    Raises RequestError where it is malformed, or asks for a call that no tool can be.
    """
    if value is None:
        return ToolChoice("auto" if tools else "none")
    if isinstance(value, str):
        mode = _converted("tool_choice", value, Literal["none", "auto", "required"])
        if mode == "required" and not tools:
            raise RequestError("tool_choice is 'required', but the request has no tools.", "tool_choice")
        return ToolChoice(mode if tools else "none")
    name = _converted("tool_choice", value, _NamedChoice).function.name
    if all(tool.function.name != name for tool in tools):
        raise RequestError(f"tool_choice names {name!r}, which is not one of the tools.", "tool_choice")
    return ToolChoice("required", name)


Messages = Annotated[list[Message], PlainValidator(parse_messages, json_schema_input_type=list[dict[str, Any]])]

Tools = Annotated[list[Tool], PlainValidator(parse_tools, json_schema_input_type=list[dict[str, Any]] | None)]

PLACE = re.compile(r" - at `(?:key in )?\$(.*)`$")


def _check_count(field: str, value: object, most: int) -> None:
    if not isinstance(value, list):
        raise RequestError(f"{field} must be a list.", field)
    if len(value) > most:
        raise RequestError(f"{field} has {len(value)} entries: at most {most} are allowed.", field)


def _converted(field: str, value: object, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message = str(error)
        place = PLACE.search(message)
        where = (field + place.group(1) if place else field)[:MESSAGE_CHARACTERS_MAX]
        reason = PLACE.sub("", message)[:MESSAGE_CHARACTERS_MAX]
        raise RequestError(f"{where}: {reason}.", where) from None
