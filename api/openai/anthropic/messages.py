"""POST /v1/messages of Anthropic's API and its count of tokens: their bodies, and the chat request that they become."""

from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from api.errors import RequestError
from api.openai.anthropic.input import chat_messages, chat_tool_choice, chat_tools
from api.openai.as_chat import Refused, chat_request, fields_named, limited, refuse_elsewhere, shared_fields
from api.openai.chat import NO_THOUGHT, ChatModel, ChatRequest, ChatTurn, chat_generation, chat_turn
from api.openai.generation import GenerationRequest
from api.openai.grammars.thought import ThoughtOptions, has_thoughts
from api.openai.prompts import Check, CheckSize, go_on
from api.openai.protocol import GenerationFields, Stops, parse_body


class Thinking(BaseModel):
    """Whether the model is to think, and whether the client gets its thoughts."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: str | None = None


class OutputConfig(BaseModel):
    """How much effort the model is to make, and the schema of its answer."""

    model_config = ConfigDict(extra="ignore")

    effort: str | None = None
    format: dict[str, Any] | None = None


class MessagesPrompt(BaseModel):
    """The fields that make a prompt, which requests for an answer and for a count of tokens share."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    messages: list[dict[str, Any]]
    system: str | list[Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    container: Any = None
    mcp_servers: Any = None


class CountTokensRequest(MessagesPrompt):
    """The body of POST /v1/messages/count_tokens."""


class MessagesRequest(GenerationFields, MessagesPrompt):
    """The body of POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    stop_sequences: Stops = []


REFUSED_IN_PROMPTS: Refused = {
    "container": ((), "container is not served: leave it out."),
    "mcp_servers": (([],), "mcp_servers is not served: let the client call their tools."),
}

REFUSED: Refused = {
    **REFUSED_IN_PROMPTS,
    "n": ((1,), "n is not served here: send several requests."),
    "response_format": ((), "The format of an answer is called output_config.format here."),
    "prompt_logprobs": ((), "prompt_logprobs is not served here: ask /v1/chat/completions."),
    "return_token_ids": ((False,), "return_token_ids is not served here: ask /v1/chat/completions."),
    "cache_salt": ((), "cache_salt is not served here: ask /v1/chat/completions."),
}

NAMES = {"response_format": "output_config", "reasoning_effort": "output_config", "thinking_token_budget": "thinking"}
"""The names here of chat's fields."""


def parse_messages_request(body: bytes) -> MessagesRequest:
    """Reads a request's body and checks what belongs to this route alone.

    Raises RequestError naming the field at fault, in a message of bounded length.
    """
    request = parse_body(MessagesRequest, body)
    refuse_elsewhere(request, REFUSED)
    return request


def parse_count_request(body: bytes) -> CountTokensRequest:
    """Reads the body of a request for a count. Raises RequestError naming the field at fault."""
    request = parse_body(CountTokensRequest, body)
    refuse_elsewhere(request, REFUSED_IN_PROMPTS)
    return request


def counted_chat(request: CountTokensRequest) -> ChatRequest:
    """The request of chat whose prompt is to be counted. Raises RequestError naming the field at fault."""
    return chat_request({"model": request.model, **_prompt_fields(request)}, NAMES)


def messages_chat(request: MessagesRequest) -> ChatRequest:
    """The same request as one of chat. Raises RequestError naming the field at fault."""
    fields = {
        **shared_fields(request),
        **_prompt_fields(request),
        "stop": [*request.stop_sequences, *request.stop],
        "response_format": response_format(request.output_config),
    }
    budget = None if request.thinking is None else request.thinking.budget_tokens
    if budget is not None:
        fields["thinking_token_budget"] = budget
    return chat_request(fields, NAMES)


def messages_generation(
    request: MessagesRequest,
    model: ChatModel,
    check: Check = go_on,
    check_size: CheckSize = lambda _, __: None,
) -> tuple[GenerationRequest, ChatTurn]:
    """Makes what is generated for a request, and how it is read. May run on a thread; see `completion_generation`.

    Raises RequestError where a field does not fit the model.
    """
    chat = messages_chat(request)
    with fields_named(NAMES):
        turn = chat_turn(chat, model)
        generation = chat_generation(chat, turn, model.served, check, check_size)
    if not has_thoughts(model.served.tokenizer):
        # Clients send a budget to every model; one without thoughts keeps it.
        generation = msgspec.structs.replace(generation, thought=ThoughtOptions())
    return limited(generation, request.max_tokens), turn


def eager_tools(tools: list[dict[str, Any]] | None) -> frozenset[str]:
    """The names of the tools whose arguments the client wants as they come, whether they become JSON or not."""
    return frozenset(tool["name"] for tool in tools or [] if tool.get("eager_input_streaming") is True)


def _prompt_fields(prompt: MessagesPrompt) -> dict[str, Any]:
    messages = chat_messages(prompt.messages, prompt.system)
    continues = messages[-1]["role"] == "assistant"
    if continues and (messages[-1].get("tool_calls") or not messages[-1]["content"]):
        raise RequestError(
            "The last message is the assistant's and ends in no text to go on from: send a message of the user, or "
            "the results of its tools.",
            "messages",
        )
    choice = prompt.tool_choice
    return {
        "messages": messages,
        "tools": chat_tools(prompt.tools) if prompt.tools else None,
        "tool_choice": chat_tool_choice(choice),
        "parallel_tool_calls": False if choice and choice.get("disable_parallel_tool_use") is True else None,
        "add_generation_prompt": False if continues else None,
        "continue_final_message": True if continues else None,
        "chat_template": prompt.chat_template,
        **_thinking_fields(prompt),
    }


def _thinking_fields(prompt: MessagesPrompt) -> dict[str, Any]:
    """What says whether the model thinks: where the request does not, the model's own way.

    Thoughts are shown to those alone who ask for them: clients that do not, take the first block for the text.
    """
    thinking, given = prompt.thinking, prompt.chat_template_kwargs
    if thinking is None:
        return {"include_reasoning": False, "chat_template_kwargs": given}
    if thinking.type == "disabled":
        return {"include_reasoning": False, "reasoning_effort": NO_THOUGHT, "chat_template_kwargs": given}
    return {
        "include_reasoning": thinking.display != "omitted",
        "reasoning_effort": None if prompt.output_config is None else prompt.output_config.effort,
        "chat_template_kwargs": {"thinking": True, "enable_thinking": True, **(given or {})},
    }


def response_format(config: OutputConfig | None) -> dict[str, Any] | None:
    """The format of the answer in the form of chat. Raises RequestError for another one than a schema."""
    form = None if config is None else config.format
    if form is None:
        return None
    if form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
        raise RequestError("output_config.format must have the type json_schema, and a schema.", "output_config")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": form["schema"], "strict": True}}
