"""POST /v1/completions: its body, and its answers as OpenAI's clients know them."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field, PlainValidator

from api.errors import RequestError
from api.openai.answer_stream import AnswerWriter, Chunk
from api.openai.bodies import DONE_EVENT, ErrorBody, Usage, event
from api.openai.generation import DetailOptions, GenerationRequest, generation_request, logprob_count
from api.openai.logprobs import CompletionLogprobs, PromptLogprobs, joined_details
from api.openai.prompts import Check, CheckSize, Prompt, PromptReader, go_on
from api.openai.protocol import (
    NOT_SERVED,
    GenerationFields,
    LogprobCount,
    StreamOptions,
    parse_body,
    refuse_contradictions,
    refuse_not_served,
)
from api.text.served_model import ServedModel

PROMPTS_MAX = 4096
DEFAULT_MAX_TOKENS = 16
PROMPT_FORMS = "a string, a list of strings, a list of token ids or a list of lists of token ids"

PromptField = str | list[str] | list[int] | list[list[int]]


# The lists are not checked by pydantic, which would collect an error for every element of a long one.
def _is_prompt(value: object) -> bool:
    if isinstance(value, str):
        return True
    if not isinstance(value, list):
        return False
    kinds = set(map(type, value))
    if kinds == {list}:
        return all(set(map(type, tokens)) <= {int} for tokens in value)
    return kinds <= {str} or kinds == {int}


def _prompt(value: Any) -> PromptField:
    if not _is_prompt(value):
        raise ValueError(PROMPT_FORMS)
    prompt: PromptField = value
    return prompt


class CompletionRequest(GenerationFields):
    """The body of POST /v1/completions."""

    prompt: Annotated[PromptField, PlainValidator(_prompt, json_schema_input_type=PromptField)]
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    logprobs: LogprobCount | None = None

    suffix: Any = None
    prompt_embeds: Any = None

    @property
    def completion_count(self) -> int:
        """The number of completions of all prompts."""
        return len(self.prompts()) * self.choice_count

    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, whichever of the four forms they came in."""
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        prompts: list[str | list[int]] = [prompt] if is_one else prompt
        return prompts


NOT_SERVED_HERE = {**NOT_SERVED, "suffix": ("",), "prompt_embeds": ()}


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Reads a request's body and checks what can be checked without the model.

    Raises RequestError naming the field at fault, in a message of bounded length.
    """
    request = parse_body(CompletionRequest, body)
    refuse_not_served(request, NOT_SERVED_HERE)
    if request.best_of not in {None, request.choice_count}:
        raise RequestError("best_of other than n is not served: leave it out.", "best_of")
    prompts = request.prompts()
    if not prompts:
        raise RequestError("prompt is empty: give at least one prompt.", "prompt")
    if request.completion_count > PROMPTS_MAX:
        raise RequestError(
            f"{len(prompts)} prompts times n = {request.choice_count} are more than {PROMPTS_MAX} completions: "
            "send several requests.",
            "prompt",
        )
    if request.max_tokens == 0 and not request.echo:
        raise RequestError("max_tokens must be at least 1, except with echo.", "max_tokens")
    if request.prompt_logprobs is not None and request.stream:
        raise RequestError(
            "prompt_logprobs is not allowed with stream: use echo with logprobs, or no stream.", "prompt_logprobs"
        )
    refuse_contradictions(request)
    return request


def completion_generation(
    request: CompletionRequest, model: ServedModel, check: Check = go_on, check_size: CheckSize = lambda _, __: None
) -> GenerationRequest:
    """Reads the prompts of a request and makes what is generated for it. May run on a thread.

    `check` is called again and again and may raise to end the work, and `check_size` with the completions and prompt
    tokens so far. Raises RequestError where a field does not fit the model.
    """
    default = model.generation.max_new_tokens or DEFAULT_MAX_TOKENS
    reader = PromptReader(
        request,
        model,
        completion_tokens=default if request.max_tokens is None else request.max_tokens,
        adds_special_tokens=request.add_special_tokens is not False,
        echoes=request.echo or False,
        check=check,
    )
    prompts: list[Prompt] = []
    tokens = 0
    for prompt in request.prompts():
        prompts.append(reader.read(prompt))
        tokens += len(prompts[-1].tokens)
        check_size(len(prompts) * request.choice_count, tokens * request.choice_count)
    details = DetailOptions(
        form="completion",
        logprobs=logprob_count(request.logprobs, "logprobs", model),
        prompt_logprobs=logprob_count(request.prompt_logprobs, "prompt_logprobs", model),
        token_ids=request.return_token_ids or False,
        as_token_ids=request.return_tokens_as_token_ids or False,
        echoes=request.echo or False,
    )
    return generation_request(
        request,
        prompts,
        details,
        model,
        max_tokens=request.max_tokens,
        default_max_tokens=default,
        check=check,
    )


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One completion, or in a stream its next chunk; only the last chunk has a `finish_reason`.

    `stop_reason` is the stop string or the id of the stop token that ended it, None for EOS. `token_ids` are those of
    the completion alone; `prompt_token_ids` are in a choice's first chunk.
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /v1/completions, or one chunk of it; chunks have `usage` only where the client asked for it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class CompletionWriter(AnswerWriter):
    """Writes completions: one object, or a stream of objects with parts of it."""

    def __init__(self, request_id: str, model: str, created: int, options: StreamOptions) -> None:
        self.id = f"cmpl-{request_id}"
        self._model = model
        self._created = created
        self._options = options

    def whole(self, choices: list[list[Chunk]], usage: Usage) -> Completion:
        """The answer that consists of these chunks of each choice."""
        return self._completion([_joined(chunks) for chunks in choices], usage)

    def events(self, chunks: list[Chunk], usage: Usage) -> Iterator[bytes]:
        """The event of chunks that came together; `usage` is that of their choice so far."""
        given: Usage | msgspec.UnsetType | None = None if self._options.include_usage else msgspec.UNSET
        yield event(self._completion([_joined(chunks)], usage if self._options.continuous_usage_stats else given))

    def last_events(self, usage: Usage) -> Iterator[bytes]:
        """What comes after the last chunk."""
        if self._options.include_usage:
            yield event(self._completion([], usage))
        yield DONE_EVENT

    def failure(self, body: ErrorBody) -> bytes:
        """The last events of a stream that ends early."""
        return event(body) + DONE_EVENT

    def _completion(self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None) -> Completion:
        return Completion(id=self.id, created=self._created, model=self._model, choices=choices, usage=usage)


def _choice(chunk: Chunk) -> CompletionChoice:
    details = chunk.details
    if details is None:
        return CompletionChoice(
            index=chunk.index, text=chunk.text, finish_reason=chunk.finish_reason, stop_reason=chunk.stop_reason
        )
    return CompletionChoice(
        index=chunk.index,
        text=chunk.text,
        logprobs=details.completion_logprobs,
        finish_reason=chunk.finish_reason,
        stop_reason=chunk.stop_reason,
        token_ids=details.token_ids,
        prompt_token_ids=details.prompt_token_ids,
        prompt_logprobs=details.prompt_logprobs,
    )


def _joined(chunks: list[Chunk]) -> CompletionChoice:
    """The choice that consists of these chunks."""
    if len(chunks) == 1:
        return _choice(chunks[0])
    text = "".join(chunk.text for chunk in chunks)
    details = joined_details([chunk.details for chunk in chunks if chunk.details is not None])
    return _choice(msgspec.structs.replace(chunks[-1], text=text, details=details))
