"""POST /v1/responses: its body, and the chat request that it becomes."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from api.errors import RequestError
from api.openai.as_chat import Refused, chat_request, fields_named, limited, refuse_elsewhere, shared_fields
from api.openai.chat import ChatModel, ChatRequest, ChatTurn, chat_generation, chat_turn
from api.openai.generation import GenerationRequest
from api.openai.prompts import ALL_THAT_FITS, Check, CheckSize, go_on
from api.openai.protocol import GenerationFields, parse_body
from api.openai.responses.input import chat_messages, chat_tool_choice, chat_tools

INPUT_FORMS = "a string or a list of items"
LOGPROBS = "message.output_text.logprobs"
"""The value of `include` that asks for log-probabilities."""

ROOM_SHARE = 4
"""With truncation, the answer's room is at most this part of the model's length, so that some of the input is kept."""

Input = str | list[dict[str, Any]]


def _input(value: Any) -> str | list[Any]:
    is_input = isinstance(value, str | list)
    if not is_input:
        raise ValueError(INPUT_FORMS)
    given: str | list[Any] = value
    return given


class TextFormat(BaseModel):
    """The form of the answer's text."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(BaseModel):
    """What the answer's text is like; `verbosity` is without effect."""

    model_config = ConfigDict(extra="ignore")

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(BaseModel):
    """How much the model is to think; `summary` is without effect, as the thought itself is given."""

    model_config = ConfigDict(extra="ignore")

    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(GenerationFields):
    """The body of POST /v1/responses. Answers are not stored, whatever `store` says."""

    input: Annotated[str | list[Any], PlainValidator(_input, json_schema_input_type=Input)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None


REFUSED: Refused = {
    "previous_response_id": ((), "No answers are stored here: send the whole conversation as input."),
    "conversation": ((), "No conversations are stored here: send the whole conversation as input."),
    "prompt": ((), "No prompts are stored here: send the text as instructions and input."),
    "background": ((False,), "background is not served: stream the answer where it takes long."),
    "n": ((1,), "n is not served here: send several requests."),
    "max_tokens": ((), "The limit of an answer is called max_output_tokens here."),
    "response_format": ((), "The format of an answer is called text.format here."),
    "prompt_logprobs": ((), "prompt_logprobs is not served here: ask /v1/chat/completions."),
    "return_token_ids": ((False,), "return_token_ids is not served here: ask /v1/chat/completions."),
}

NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text",
    "reasoning_effort": "reasoning",
}
"""The names here of chat's fields."""


def parse_responses_request(body: bytes) -> ResponsesRequest:
    """Reads a request's body and checks what belongs to this route alone.

    Raises RequestError naming the field at fault, in a message of bounded length.
    """
    request = parse_body(ResponsesRequest, body)
    refuse_elsewhere(request, REFUSED)
    return request


def responses_chat(request: ResponsesRequest) -> ChatRequest:
    """The same request as one of chat. Raises RequestError naming the field at fault."""
    wants_logprobs = LOGPROBS in (request.include or [])
    fields: dict[str, Any] = {
        **shared_fields(request),
        "messages": chat_messages(request.input, request.instructions),
        "tools": chat_tools(request.tools) if request.tools else None,
        "tool_choice": chat_tool_choice(request.tool_choice),
        "parallel_tool_calls": request.parallel_tool_calls,
        "reasoning_effort": None if request.reasoning is None else request.reasoning.effort,
        "response_format": response_format(request.text),
        "logprobs": wants_logprobs or None,
        "top_logprobs": request.top_logprobs if wants_logprobs else None,
        "chat_template": request.chat_template,
        "chat_template_kwargs": request.chat_template_kwargs,
    }
    return chat_request(fields, NAMES)


def response_format(text: TextOptions | None) -> dict[str, Any] | None:
    """The format of the answer in the form of chat. Raises RequestError where a schema is wanted and none is given."""
    given = None if text is None else text.format
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return {"type": "json_object"}
    if given.json_schema is None:
        raise RequestError("text.format has no schema: give one, or the type json_object.", "text")
    named = {"name": given.name or "answer", "description": given.description, "strict": given.strict}
    schema = {name: value for name, value in named.items() if value is not None}
    return {"type": "json_schema", "json_schema": {**schema, "schema": given.json_schema}}


def responses_generation(
    request: ResponsesRequest,
    model: ChatModel,
    check: Check = go_on,
    check_size: CheckSize = lambda _, __: None,
) -> tuple[GenerationRequest, ChatTurn]:
    """Makes what is generated for a request, and how it is read. May run on a thread; see `completion_generation`.

    Raises RequestError where a field does not fit the model.
    """
    chat = responses_chat(request)
    if request.truncation == "auto" and chat.truncate_prompt_tokens is None:
        most = max(model.served.max_model_len // ROOM_SHARE, 1)
        room = {"max_tokens": min(request.max_output_tokens or most, most), "truncate_prompt_tokens": ALL_THAT_FITS}
        chat = chat.model_copy(update=room)
    with fields_named(NAMES):
        turn = chat_turn(chat, model)
        generation = chat_generation(chat, turn, model.served, check, check_size)
    return limited(generation, request.max_output_tokens), turn
