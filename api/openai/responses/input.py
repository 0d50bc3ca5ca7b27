"""What a request of /v1/responses says, as a conversation of chat: its items become messages, its tools functions."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec

from api.errors import RequestError
from api.openai.as_chat import NAME_CHARACTERS_MAX
from api.text.template_messages import joined_parts

SYSTEM_ROLES = {"system": "system", "developer": "system"}
"""The roles that instruct the model: templates of models that are served know the first name alone."""

FUNCTION = "function"
NAMESPACE = "namespace"
NAMESPACE_END = "__"
"""What stands between a namespace and a name in chat, which knows no namespaces."""

TOOL_NAME_CHARACTERS_MAX = 64

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
        name = chat_name(_text(item, "name", field), item.get("namespace"))
        function = {"name": name, "arguments": _text(item, "arguments", field)}
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


class CalledName(msgspec.Struct, frozen=True):
    """A function as the client knows it: by its name, within a namespace or not."""

    name: str
    namespace: str | None = None


def chat_name(name: str, namespace: object) -> str:
    """The name in chat of a function: behind its namespace, unless that makes it longer than names may be."""
    joined = f"{namespace}{NAMESPACE_END}{name}"
    return joined if isinstance(namespace, str) and namespace and len(joined) <= TOOL_NAME_CHARACTERS_MAX else name


def called_names(tools: list[dict[str, Any]]) -> dict[str, CalledName]:
    """The functions in namespaces by the names that a model may give them: the plain one too, where one has it."""
    spaces = [tool for tool in tools if tool.get("type") == NAMESPACE]
    inner = [CalledName(function["name"], space["name"]) for space in spaces for function in space["tools"]]
    plain = Counter([*(name.name for name in inner), *(tool["name"] for tool in tools if tool["type"] == FUNCTION)])
    unique = {name.name: name for name in inner if plain[name.name] == 1}
    return {**unique, **{chat_name(name.name, name.namespace): name for name in inner}}


def chat_tools(tools: list[Any]) -> list[dict[str, Any]]:
    """The functions in the form of chat, with those in namespaces. Raises RequestError naming another tool's type."""
    functions: list[dict[str, Any]] = []
    for place, tool in enumerate(tools):
        field = f"tools[{place}]"
        if _type_of(tool, field) != NAMESPACE:
            functions.append(_chat_tool(tool, field, None))
            continue
        inner = tool.get("tools")
        if not isinstance(inner, list):
            raise RequestError(f"{field}.tools must be a list.", "tools")
        namespace = _text(tool, "name", field)
        functions += [_chat_tool(one, f"{field}.tools[{index}]", namespace) for index, one in enumerate(inner)]
    return functions


def _chat_tool(tool: Any, field: str, namespace: str | None) -> dict[str, Any]:
    kind = _type_of(tool, field)
    if kind != FUNCTION:
        raise RequestError(f"{field} is of type {kind!r}: only functions are served, so leave it out.", "tools")
    function = {"name": chat_name(_text(tool, "name", field), namespace)}
    given = ("description", "parameters", "strict")
    return {"type": FUNCTION, FUNCTION: function | {name: tool[name] for name in given if tool.get(name) is not None}}


def chat_tool_choice(choice: Any) -> Any:
    """The tool_choice in the form of chat. Raises RequestError where it is of another type than a function's."""
    if not isinstance(choice, Mapping):
        return choice
    kind = _type_of(choice, "tool_choice")
    if kind != FUNCTION:
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
