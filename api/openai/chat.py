"""POST /v1/chat/completions: its body, and the prompt that a conversation becomes."""

import math
from typing import Annotated, Any

import msgspec
from pydantic import BaseModel, Field

from api.errors import RequestError
from api.openai.answer import AnswerParser
from api.openai.answer_format import END_THINK, AnswerFormat, ends_in_thought
from api.openai.chat_messages import Messages, ToolChoice, Tools, parse_tool_choice
from api.openai.generation import DetailOptions, GenerationRequest, generation_request, logprob_count
from api.openai.grammars.thought import has_thoughts
from api.openai.grammars.tool_calls import DEEPSEEK_V3, DEEPSEEK_V31, Choice, Function, tool_grammar
from api.openai.prompts import Check, CheckSize, PromptReader, go_on
from api.openai.protocol import (
    NOT_SERVED,
    GenerationFields,
    parse_body,
    refuse_contradictions,
    refuse_not_served,
)
from api.settings.chat import ChatOptions
from api.text.chat_template import ChatTemplate
from api.text.served_model import ServedModel
from stages.step import Grammar

TEMPLATE_ROOM = 4
"""So many times the longest prompt's characters may come out of a template: a prompt may be truncated after that."""

NO_THOUGHT = "none"
"""The reasoning_effort without a thought."""


class PromptFields(BaseModel):
    """The fields that a conversation's prompt follows from."""

    messages: Messages
    tools: Tools = []
    tool_choice: Any = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None

    @property
    def calls(self) -> ToolChoice:
        """Which calls are wanted. Raises RequestError where that does not fit the tools."""
        return parse_tool_choice(self.tool_choice, self.tools)


class ChatRequest(GenerationFields, PromptFields):
    """The body of POST /v1/chat/completions."""

    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=-1)] | None = None

    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    echo: bool | None = None

    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    prediction: Any = None
    web_search_options: Any = None

    @property
    def most_tokens(self) -> int | None:
        """The limit of an answer under either of its names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


NOT_SERVED_HERE = {
    **NOT_SERVED,
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
}


class ChatModel(msgspec.Struct, frozen=True):
    """A model that one can talk to: its template (None where it has none), and how it writes thoughts and calls."""

    served: ServedModel
    template: ChatTemplate | None
    format: AnswerFormat

    @classmethod
    def of(cls, served: ServedModel, options: ChatOptions) -> "ChatModel":
        """Finds the template in the options, or where the tokenizer has it. Raises CheckpointError for a wrong one."""
        tokenizer, most = served.tokenizer, TEMPLATE_ROOM * served.prompt_characters_max
        if options.chat_template is not None:
            template = ChatTemplate.from_file(options.chat_template, tokenizer, characters_max=most)
        elif "chat_template" in tokenizer.config:
            template = ChatTemplate.of(tokenizer, characters_max=most)
        else:
            template = None
        source = None if template is None else template.source
        return cls(served, template, AnswerFormat.of(source, options.reasoning_parser, options.tool_call_parser))


class ChatTurn(msgspec.Struct, frozen=True, kw_only=True):
    """The prompt of a conversation as text, and how the answer to it is read.

    `echo` goes before the content of an answer. `shows_reasoning` is False where the client does not want thoughts.
    """

    prompt: str
    format: AnswerFormat
    starts_in_thought: bool
    may_call: bool
    calls_max: float = math.inf
    shows_reasoning: bool = True
    echo: str = ""

    def parser(self) -> AnswerParser:
        """A reader of one answer."""
        return AnswerParser(self.format, starts_in_thought=self.starts_in_thought, has_tools=self.may_call)


def parse_chat_request(body: bytes) -> ChatRequest:
    """Reads a request's body and checks what can be checked without the model.

    Raises RequestError naming the field at fault, in a message of bounded length.
    """
    request = parse_body(ChatRequest, body)
    check_chat_request(request)
    return request


def check_chat_request(request: ChatRequest) -> None:
    """Checks what can be checked without the model. Raises RequestError naming the field at fault."""
    refuse_not_served(request, NOT_SERVED_HERE)
    refuse_contradictions(request)
    if request.max_tokens == 0:
        raise RequestError("max_tokens must be at least 1.", "max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs is only allowed with logprobs.", "top_logprobs")
    if request.prompt_logprobs is not None and request.stream:
        raise RequestError("prompt_logprobs is not allowed with stream: use no stream.", "prompt_logprobs")


def render_prompt(request: PromptFields, model: ChatModel) -> str:
    """The text of a conversation's prompt, by the model's template or the request's own.

    Raises RequestError where the model has no template, or the template does not take the conversation.
    """
    template = model.template
    if request.chat_template is not None:
        template = (template or ChatTemplate("", model.served.tokenizer.special_tokens)).replaced(request.chat_template)
    if template is None:
        raise RequestError(
            "The model has no chat template: give one as chat_template, or start the server with --chat-template.",
            "messages",
        )
    continues = request.continue_final_message or False
    if continues and request.add_generation_prompt:
        raise RequestError(
            "add_generation_prompt and continue_final_message contradict each other: leave one of them out.",
            "continue_final_message",
        )
    return template.render(
        request.messages,
        tools=_offered_tools(request),
        add_generation_prompt=not continues and request.add_generation_prompt is not False,
        continue_final_message=continues,
        template_kwargs=_template_kwargs(request),
    )


def chat_turn(request: ChatRequest, model: ChatModel) -> ChatTurn:
    """Renders the prompt of a request, and finds how the answer to it is read. Raises like `render_prompt`."""
    prompt = render_prompt(request, model)
    in_thought = ends_in_thought(prompt)
    if in_thought and request.reasoning_effort == NO_THOUGHT:
        prompt, in_thought = f"{prompt.rstrip()}\n{END_THINK}\n\n", False
    return ChatTurn(
        prompt=prompt,
        format=model.format,
        starts_in_thought=in_thought,
        may_call=bool(_offered_tools(request)),
        calls_max=1 if request.parallel_tool_calls is False else math.inf,
        shows_reasoning=request.include_reasoning is not False,
        echo=request.messages[-1]["content"] if request.echo and request.continue_final_message else "",
    )


def _offered_tools(request: PromptFields) -> list[dict[str, Any]] | None:
    # A model that reads of tools calls them, whatever the request says of that.
    return None if request.calls.mode == "none" else [tool.for_template() for tool in request.tools]


def _template_kwargs(request: PromptFields) -> dict[str, Any]:
    """What the template gets beside the conversation, under the names that templates of reasoning models read."""
    kwargs: dict[str, Any] = {}
    if request.reasoning_effort is not None:
        thinks = request.reasoning_effort != NO_THOUGHT
        kwargs = {"thinking": thinks, "enable_thinking": thinks, "reasoning_effort": request.reasoning_effort}
    if request.documents is not None:
        kwargs["documents"] = request.documents
    return {**kwargs, **(request.chat_template_kwargs or {})}


def chat_generation(
    request: ChatRequest,
    turn: ChatTurn,
    model: ServedModel,
    check: Check = go_on,
    check_size: CheckSize = lambda _, __: None,
) -> GenerationRequest:
    """Makes what is generated for a conversation. May run on a thread; see `completion_generation` about the checks.

    Raises RequestError where a field does not fit the model.
    """
    default = model.generation.max_new_tokens or model.max_model_len
    max_tokens = request.most_tokens
    reader = PromptReader(
        request,
        model,
        completion_tokens=min(default, model.max_model_len - 1) if max_tokens is None else max_tokens,
        # The template writes them.
        adds_special_tokens=request.add_special_tokens or False,
        param="messages",
        check=check,
    )
    prompt = reader.read(turn.prompt)
    check_size(request.choice_count, len(prompt.tokens) * request.choice_count)
    details = DetailOptions(
        form="chat",
        logprobs=logprob_count(request.top_logprobs or 0, "top_logprobs", model) if request.logprobs else None,
        prompt_logprobs=logprob_count(request.prompt_logprobs, "prompt_logprobs", model),
        token_ids=request.return_token_ids or False,
        as_token_ids=request.return_tokens_as_token_ids or False,
    )
    may_open = turn.format.reasoning == "deepseek_r1" and not turn.prompt.rstrip().endswith(END_THINK)
    generation = generation_request(
        request, [prompt], details, model, max_tokens=max_tokens, default_max_tokens=default, check=check
    )
    thought = msgspec.structs.replace(generation.thought, is_open=turn.starts_in_thought, may_open=may_open)
    if may_open and request.reasoning_effort == NO_THOUGHT and has_thoughts(model.tokenizer):
        # A thought of no tokens is not begun.
        thought = msgspec.structs.replace(thought, may_open=False, budget=0)
    sampling = generation.sampling
    if (grammar := _call_grammar(request, turn.format, model)) is not None:
        sampling = msgspec.structs.replace(sampling, grammar=grammar)
    return msgspec.structs.replace(generation, thought=thought, sampling=sampling)


def _call_grammar(request: ChatRequest, form: AnswerFormat, model: ServedModel) -> Grammar | None:
    """The grammar of an answer that has to call functions, or may call strict ones; None where it is free.

    Functions that are not strict are held to their schemas where these can be served. Raises RequestError where that
    of a strict one cannot.
    """
    calls = request.calls
    is_asked = calls.mode == "required" or (calls.mode == "auto" and not has_form(request))
    if model.grammars is None or request.ignore_eos or form.tools == "none" or not is_asked:
        if calls.mode == "required" and form.tools == "none":
            raise RequestError(
                "tool_choice asks for a call, and the server does not know how the model writes calls: start it with "
                "--tool-call-parser.",
                "tool_choice",
            )
        return None
    functions = [
        Function(name=tool.function.name, parameters=tool.function.parameters, strict=tool.function.strict or False)
        for tool in request.tools
    ]
    named = next((function for function in functions if function.name == calls.name), None)
    choice: Choice = named or ("required" if calls.mode == "required" else "auto")
    style = DEEPSEEK_V31 if form.tools == "deepseek_v31" else DEEPSEEK_V3
    parallel = request.parallel_tool_calls is not False
    for only_strict in (False, True):
        grammar = tool_grammar(
            functions, choice, style, model.tokenizer.token_id, parallel=parallel, only_strict=only_strict
        )
        if grammar is None:
            return None
        try:
            model.grammars.check(grammar.source, "tools")
        except RequestError:
            if only_strict or all(function.strict for function in functions):
                raise
        else:
            return grammar
    return None


def has_form(request: ChatRequest) -> bool:
    """Whether a field says what the answer has to be where it calls no function."""
    fields = (request.response_format, request.structured_outputs, *request.guided.values())
    return any(field is not None and field != {"type": "text"} for field in fields)
