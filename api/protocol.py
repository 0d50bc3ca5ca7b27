"""What a client may send: the fields of a completion request, their types and ranges."""

from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StrictInt

from api.errors import RequestError

PROMPTS_MAX = 4096
CHOICES_MAX = 128
STOPS_MAX = 4
MESSAGE_CHARACTERS_MAX = 300
"""Bound of a validation message: it never echoes more of a request than this."""

PROMPT_FORMS = "a string, a list of strings, a list of token ids or a list of lists of token ids"
STOP_FORMS = f"a string or a list of up to {STOPS_MAX} strings, none of them empty"
Prompt = str | list[str] | list[int] | list[list[int]]
Seed = Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)]

NOT_SERVED: dict[str, tuple[object, ...]] = {
    "logprobs": (),
    "prompt_logprobs": (),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "min_p": (0.0,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
"""Fields that would change the answer and that this server does not follow, with the values that change nothing."""


def _is_prompt(value: object) -> bool:
    if isinstance(value, str):
        return True
    if not isinstance(value, list):
        return False
    kinds = set(map(type, value))
    if kinds == {list}:
        return all(set(map(type, tokens)) <= {int} for tokens in value)
    return kinds <= {str} or kinds == {int}


def _prompt(value: Any) -> Prompt:
    # Not left to pydantic: its union of lists would collect an error for every element of a long list.
    if not _is_prompt(value):
        raise ValueError(PROMPT_FORMS)
    prompt: Prompt = value
    return prompt


def _stops(value: Any) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > STOPS_MAX:
        raise ValueError(STOP_FORMS)
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError(STOP_FORMS)
    return stops


class StreamOptions(BaseModel):
    """Token counts in a stream: after the last chunk, or with every chunk."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CompletionRequest(BaseModel):
    """POST /v1/completions, OpenAI's fields and those of vLLM's that are followed. None is as good as absent."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = None
    prompt: Annotated[Prompt, PlainValidator(_prompt, json_schema_input_type=Prompt)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: Seed | None = None
    stop: Annotated[list[str], PlainValidator(_stops, json_schema_input_type=str | list[str] | None)] = []
    stop_token_ids: Annotated[list[StrictInt], Field(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES_MAX)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    add_special_tokens: bool | None = None
    skip_special_tokens: bool | None = None

    logprobs: Any = None
    prompt_logprobs: Any = None
    suffix: Any = None
    logit_bias: Any = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    use_beam_search: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    truncate_prompt_tokens: Any = None
    prompt_embeds: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None

    @property
    def choice_count(self) -> int:
        """Completions of each prompt."""
        return self.n or 1

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, whichever of the four forms they came in."""
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        prompts: list[str | list[int]] = [prompt] if is_one else prompt
        return prompts


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Reads a request's body and checks all that can be checked without knowing the model.

    Raises RequestError naming the field at fault, in a message of bounded length.
    """
    try:
        request = CompletionRequest.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise _request_error(error) from None
    _refuse_not_served(request)
    _refuse_contradictions(request)
    return request


def _request_error(error: pydantic.ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    location = [str(part) for part in first["loc"]]
    if not location:
        return RequestError(f"The body is no completion request: {first['msg']}."[:MESSAGE_CHARACTERS_MAX])
    param = location[0]
    forms = {"prompt": PROMPT_FORMS, "stop": STOP_FORMS}
    if param in forms:
        return RequestError(f"{param} must be {forms[param]}.", param)
    return RequestError(f"{param}: {first['msg']}."[:MESSAGE_CHARACTERS_MAX], param[:MESSAGE_CHARACTERS_MAX])


def _refuse_not_served(request: CompletionRequest) -> None:
    for param, neutral in NOT_SERVED.items():
        value = getattr(request, param)
        if value is not None and value not in neutral:
            raise RequestError(f"{param} is not served yet: leave it out.", param)
    if request.best_of is not None and request.best_of != request.choice_count:
        raise RequestError("best_of other than n is not served yet: leave it out.", "best_of")


def _refuse_contradictions(request: CompletionRequest) -> None:
    prompts = request.prompts()
    if not prompts:
        raise RequestError("prompt is empty: give at least one prompt.", "prompt")
    if len(prompts) * request.choice_count > PROMPTS_MAX:
        raise RequestError(
            f"{len(prompts)} prompts times n = {request.choice_count} are more than {PROMPTS_MAX} completions: "
            "send several requests.",
            "prompt",
        )
    if request.max_tokens == 0 and not request.echo:
        raise RequestError("max_tokens must be at least 1, except with echo.", "max_tokens")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options is only allowed with stream.", "stream_options")
