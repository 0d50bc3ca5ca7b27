"""What a request of /v1/responses says, as a conversation of chat: its items become messages, its tools functions."""

from collections.abc import Mapping
from typing import Any

from api.errors import RequestError
from api.openai.as_chat import NAME_CHARACTERS_MAX
from api.text.template_messages import joined_parts

SYSTEM_ROLES = {"system": "system", "developer": "system"}
"""The roles that instruct the model: templates of models that are served know the first name alone."""

Message = dict[str, Any]


def chat_messages(items: str | list[Any], instructions: str | None) -> list[Message]:
    """The messages that these items are, behind the instructions.

    Raises RequestError naming the item at fault.
    """
    reader = _ItemReader()
    if instructions:
        reader.messages.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        reader.messages.append({"role": "user", "content": items})
        return reader.messages
    for place, item in enumerate(items):
        reader.add(item, f"input[{place}]")
    if not any(message["role"] != "system" for message in reader.messages):
        raise RequestError("input has no message: give at least one.", "input")
    return reader.messages


class _ItemReader:
    """Joins items to messages: a thought, a text and the calls that follow it are one message of the assistant."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._thoughts: list[str] = []

    def add(self, item: Any, field: str) -> None:
        kind = _type_of(item, field, default="message" if isinstance(item, dict) and "role" in item else None)
        match kind:
            case "message":
                self._add_message(item, field)
            case "reasoning":
                self._thoughts += _thought(item, field)
            case "function_call":
                self._add_call(item, field)
            case "function_call_output":
                output = joined_parts(item.get("output"), f"{field}.output")
                self._add({"role": "tool", "tool_call_id": _text(item, "call_id", field), "content": output or ""})
            case "item_reference":
                raise RequestError(
                    f"{field} is of type 'item_reference', but this server stores no items: send the item itself.",
                    "input",
                )
            case _:
                raise RequestError(f"{field} is of type {kind!r}, which is not served: leave it out.", "input")

    def _add_message(self, item: Mapping[str, Any], field: str) -> None:
        role = item.get("role")
        if role not in {"user", "assistant", *SYSTEM_ROLES}:
            raise RequestError(f"{field}.role must be one of user, assistant, system and developer.", "input")
        content = joined_parts(item.get("content"), f"{field}.content") or ""
        if role != "assistant":
            self._add({"role": SYSTEM_ROLES.get(role, role), "content": content})
            return
        last = self._open_message()
        if last is not None and last.get("tool_calls"):
            # The results of calls have to follow them.
            last["content"] = "\n".join(filter(None, (last["content"], content)))
        else:
            self._begin_answer()["content"] = content

    def _add_call(self, item: Mapping[str, Any], field: str) -> None:
        function = {"name": _text(item, "name", field), "arguments": _text(item, "arguments", field)}
        call = {"id": _text(item, "call_id", field), "type": "function", "function": function}
        message = self._open_message()
        if message is None:
            message = self._begin_answer()
        message.setdefault("tool_calls", []).append(call)

    def _open_message(self) -> Message | None:
        """The answer to which an item still belongs: the last message, unless a thought has begun another one."""
        is_open = bool(self.messages) and self.messages[-1]["role"] == "assistant" and not self._thoughts
        return self.messages[-1] if is_open else None

    def _begin_answer(self) -> Message:
        message: Message = {"role": "assistant", "content": None}
        if self._thoughts:
            message["reasoning_content"] = "\n".join(self._thoughts)
        self._add(message)
        return message

    def _add(self, message: Message) -> None:
        self._thoughts = []
        self.messages.append(message)


def _thought(item: Mapping[str, Any], field: str) -> list[str]:
    """The texts of a thought: its content, or the summary where it has none."""
    parts = item.get("content") or item.get("summary") or []
    if not isinstance(parts, list):
        raise RequestError(f"{field}.content must be a list.", "input")
    return [_text(part, "text", field) for part in parts]


def chat_tools(tools: list[Any], field: str = "tools") -> list[dict[str, Any]]:
    """The functions in the form of chat. Raises RequestError naming the type of a tool that is none."""
    return [_chat_tool(tool, f"{field}[{place}]") for place, tool in enumerate(tools)]


def _chat_tool(tool: Any, field: str) -> dict[str, Any]:
    kind = _type_of(tool, field)
    if kind != "function":
        raise RequestError(f"{field} is of type {kind!r}: only functions are served, so leave it out.", "tools")
    given = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in given if tool.get(name) is not None}}


def chat_tool_choice(choice: Any) -> Any:
    """The tool_choice in the form of chat. Raises RequestError where it is of another type than a function's."""
    if not isinstance(choice, Mapping):
        return choice
    kind = _type_of(choice, "tool_choice")
    if kind != "function":
        raise RequestError(
            f"tool_choice is of type {kind!r}: only none, auto, required and functions are served.", "tool_choice"
        )
    return {"type": "function", "function": {"name": _text(choice, "name", "tool_choice")}}


def _type_of(part: Any, field: str, default: str | None = None) -> str:
    kind = part.get("type", default) if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise RequestError(f"{field} must be an object with a type.", field.partition("[")[0])
    return kind[:NAME_CHARACTERS_MAX]


def _text(part: Any, name: str, field: str) -> str:
    text = part.get(name) if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise RequestError(f"{field}.{name} must be a string.", field.partition("[")[0])
    return text
