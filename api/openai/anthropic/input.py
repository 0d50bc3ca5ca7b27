"""What a request of /v1/messages says, as a conversation of chat: its blocks become messages, its tools functions."""

import json
from collections.abc import Mapping
from typing import Any

from api.errors import RequestError
from api.openai.as_chat import NAME_CHARACTERS_MAX
from api.text.template_messages import joined_parts

ERROR_PREFIX = "Error: "
"""What goes before the result of a tool that failed, as messages of chat have no field for that."""

Message = dict[str, Any]


def chat_messages(messages: list[Any], system: Any) -> list[Message]:
    """The messages of chat that these are, behind the system's. Raises RequestError naming the block at fault."""
    converted: list[Message] = []
    if instructions := joined_parts(system, "system"):
        converted.append({"role": "system", "content": instructions})
    if not messages:
        raise RequestError("messages is empty: give at least one.", "messages")
    for place, message in enumerate(messages):
        converted += _chat_messages(message, f"messages[{place}]")
    return converted


def _chat_messages(message: Any, field: str) -> list[Message]:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in {"user", "assistant", "system"}:
        raise RequestError(f"{field} must be an object with the role user, assistant or system.", "messages")
    content = message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise RequestError(f"{field}.content must be a string or a list of blocks.", "messages")
    blocks = [(_typed(block, f"{field}.content[{place}]")) for place, block in enumerate(content)]
    return [_answer(blocks, field)] if role == "assistant" else _question(blocks, role, field)


def _question(blocks: list[Mapping[str, Any]], role: str, field: str) -> list[Message]:
    """Each result of a tool is a message of its own, and so are the texts between them."""
    messages: list[Message] = []
    texts: list[str] = []

    def end_text() -> None:
        if texts:
            messages.append({"role": role, "content": "\n".join(texts)})
            texts.clear()

    for place, block in enumerate(blocks):
        where = f"{field}.content[{place}]"
        if block["type"] == "tool_result" and role == "user":
            end_text()
            messages.append(_result(block, where))
        else:
            texts.append(_text_of(block, where))
    end_text()
    return messages or [{"role": role, "content": ""}]


def _result(block: Mapping[str, Any], field: str) -> Message:
    output = joined_parts(block.get("content"), f"{field}.content") or ""
    if block.get("is_error"):
        output = ERROR_PREFIX + output
    return {"role": "tool", "tool_call_id": _string(block, "tool_use_id", field), "content": output}


def _answer(blocks: list[Mapping[str, Any]], field: str) -> Message:
    """One message with the thoughts, the texts and the calls; what is redacted is left out."""
    thoughts: list[str] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for place, block in enumerate(blocks):
        where = f"{field}.content[{place}]"
        match block["type"]:
            case "thinking":
                thoughts.append(_string(block, "thinking", where))
            case "redacted_thinking":
                pass
            case "tool_use":
                calls.append(_call(block, where))
            case _:
                texts.append(_text_of(block, where))
    message: Message = {"role": "assistant", "content": "\n".join(texts) if texts or not calls else None}
    if thoughts := list(filter(None, thoughts)):
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: Mapping[str, Any], field: str) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, Mapping):
        raise RequestError(f"{field}.input must be an object.", "messages")
    function = {"name": _string(block, "name", field), "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": _string(block, "id", field), "type": "function", "function": function}


def _text_of(block: Mapping[str, Any], field: str) -> str:
    if block["type"] != "text":
        kind = block["type"][:NAME_CHARACTERS_MAX]
        raise RequestError(f"{field} is of type {kind!r}, which is not served here: leave it out.", "messages")
    return _string(block, "text", field)


def chat_tools(tools: list[Any]) -> list[dict[str, Any]]:
    """The functions in the form of chat. Raises RequestError naming the type of a tool that is none."""
    return [_chat_tool(tool, f"tools[{place}]") for place, tool in enumerate(tools)]


def _chat_tool(tool: Any, field: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise RequestError(f"{field} must be an object.", "tools")
    kind = tool.get("type")
    if kind not in {None, "custom"}:
        raise RequestError(
            f"{field} is of type {str(kind)[:NAME_CHARACTERS_MAX]!r}: only the client's own tools are served, "
            "so leave it out.",
            "tools",
        )
    function: dict[str, Any] = {"name": _string(tool, "name", field, "tools")}
    for ours, theirs in (("description", "description"), ("parameters", "input_schema"), ("strict", "strict")):
        if tool.get(theirs) is not None:
            function[ours] = tool[theirs]
    return {"type": "function", "function": function}


def chat_tool_choice(choice: Mapping[str, Any] | None) -> Any:
    """The tool_choice in the form of chat. Raises RequestError for a type that is none of Anthropic's."""
    match None if choice is None else choice.get("type"):
        case None if choice is None:
            return None
        case "auto" | "none" as kind:
            return kind
        case "any":
            return "required"
        case "tool":
            return {"type": "function", "function": {"name": _string(choice, "name", "tool_choice", "tool_choice")}}
    raise RequestError("tool_choice.type must be one of auto, any, tool and none.", "tool_choice")


def _typed(block: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
        raise RequestError(f"{field} must be an object with a type.", "messages")
    return block


def _string(block: Any, name: str, field: str, param: str = "messages") -> str:
    text = block.get(name)
    if not isinstance(text, str):
        raise RequestError(f"{field}.{name} must be a string.", param)
    return text
