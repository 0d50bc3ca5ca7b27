"""The fields that requests of all routes share, with their types and ranges, and how a body is read."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from api.errors import RequestError

MESSAGE_CHARACTERS_MAX = 300
"""The most characters of a message that may repeat parts of a request."""

CHOICES_MAX = 256
STOPS_MAX = 64
BAD_WORDS_MAX = 4096
WORD_CHARACTERS_MAX = 1024
"""The longest stop string or bad word."""

SALT_CHARACTERS_MAX = 1024
"""The longest cache_salt."""

LOGIT_BIAS_MAX = 100.0
"""The largest bias: larger ones are cut to it, smaller ones to its negative, as in vLLM."""

_WORD_LENGTHS = f"each of 1 to {WORD_CHARACTERS_MAX} characters"
STOP_FORMS = f"a string or a list of up to {STOPS_MAX} strings, {_WORD_LENGTHS}"
TOKEN_IDS_FORM = "a list of token ids"  # noqa: S105  # no secret
WORDS_FORM = f"a list of up to {BAD_WORDS_MAX} strings, {_WORD_LENGTHS}"
BIASES_FORM = 'an object of numbers by token id, like {"42": -1.5}'

Fields = TypeVar("Fields", bound=pydantic.BaseModel)


def parse_body(kind: type[Fields], body: bytes) -> Fields:
    """Reads a JSON body. Validators of `kind` raise ValueError with what their field must be.

    Raises RequestError naming the field at fault.
    """
    try:
        # In one go, pydantic takes four times as long for a list of many ids, and no other thread runs meanwhile.
        fields = pydantic_core.from_json(body)
    except ValueError as error:
        raise RequestError(f"The body is not valid JSON: {error}."[:MESSAGE_CHARACTERS_MAX]) from None
    if not isinstance(fields, dict):
        raise RequestError("The body is not a request of this kind: send a JSON object.")
    return validated(kind, fields)


def validated(kind: type[Fields], fields: Mapping[str, object]) -> Fields:
    """Checks the fields of a request. Raises RequestError naming the field at fault."""
    try:
        return kind.model_validate(fields)
    except pydantic.ValidationError as error:
        raise _request_error(error) from None


def _request_error(error: pydantic.ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_input=False)[0]
    message = first["msg"]
    location = [str(part) for part in first["loc"]]
    if not location:
        return RequestError(f"The body is not a request of this kind: {message}."[:MESSAGE_CHARACTERS_MAX])
    param = location[0]
    if first["type"] == "value_error":
        # One of our own validators raised it.
        return RequestError(f"{param} must be {first['ctx']['error']}.", param)
    return RequestError(f"{param}: {message}."[:MESSAGE_CHARACTERS_MAX], param[:MESSAGE_CHARACTERS_MAX])


# The lists are not checked by pydantic, which would collect an error for every element of a long one.
def _stops(value: Any) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not _are_words(stops) or len(stops) > STOPS_MAX:
        raise ValueError(STOP_FORMS)
    return list(stops)


def _words(value: Any) -> list[str]:
    words = [] if value is None else value
    if not _are_words(words) or len(words) > BAD_WORDS_MAX:
        raise ValueError(WORDS_FORM)
    return list(words)


def _are_words(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(word, str) and 0 < len(word) <= WORD_CHARACTERS_MAX for word in value
    )


def token_ids(value: object) -> list[int] | None:
    """Checks a field that must be a list of ids or None. Raises ValueError with what it must be."""
    if value is None:
        return None
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise ValueError(TOKEN_IDS_FORM)
    return value


def _biases(value: Any) -> dict[int, float]:
    biases = {} if value is None else value
    if not isinstance(biases, dict) or not set(map(type, biases.values())) <= {int, float}:
        raise ValueError(BIASES_FORM)
    if not all(map(math.isfinite, filter(lambda bias: isinstance(bias, float), biases.values()))):
        raise ValueError(BIASES_FORM)
    try:
        return {int(token): float(_clipped(bias)) for token, bias in biases.items()}
    except ValueError:
        raise ValueError(BIASES_FORM) from None


def _clipped(bias: float) -> float:
    return min(max(bias, -LOGIT_BIAS_MAX), LOGIT_BIAS_MAX)


TokenIds = Annotated[list[int] | None, PlainValidator(token_ids, json_schema_input_type=list[int] | None)]

Words = Annotated[list[str], PlainValidator(_words, json_schema_input_type=list[str] | None)]

Stops = Annotated[list[str], PlainValidator(_stops, json_schema_input_type=str | list[str] | None)]

Penalty = Annotated[float, Field(ge=-2, le=2)]

LogprobCount = Annotated[int, Field(ge=-1)]


class StreamOptions(BaseModel):
    """Token counts in a stream: after the last chunk, or with every chunk."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationFields(BaseModel):
    """The fields of OpenAI and vLLM that all routes share. None is as good as absent; docs/api.md has their meaning."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES_MAX)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    request_id: str | None = None

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    logit_bias: Annotated[
        dict[int, float], PlainValidator(_biases, json_schema_input_type=dict[str, float] | None)
    ] = {}
    allowed_token_ids: TokenIds = None
    bad_words: Words = []

    stop: Stops = []
    stop_token_ids: TokenIds = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None

    prompt_logprobs: LogprobCount | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None

    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    thinking_token_budget: Annotated[int, Field(ge=-1)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=SALT_CHARACTERS_MAX)] | None = None

    use_beam_search: Any = None
    priority: Any = None
    logprob_token_ids: Any = None
    repetition_detection: Any = None
    watermarking: Any = None

    @property
    def choice_count(self) -> int:
        """The number of answers to each prompt."""
        return self.n or 1

    @property
    def guided(self) -> dict[str, Any]:
        """The older fields that say what the answer has to be, by name."""
        return {
            "guided_json": self.guided_json,
            "guided_regex": self.guided_regex,
            "guided_choice": self.guided_choice,
            "guided_grammar": self.guided_grammar,
        }


NOT_SERVED: dict[str, tuple[object, ...]] = {
    "use_beam_search": (False,),
    "priority": (0,),
    "logprob_token_ids": (),
    "repetition_detection": (),
    "watermarking": (False,),
}
"""The fields that would change the answer but are not served, with the values that change nothing."""


def refuse_not_served(request: GenerationFields, not_served: Mapping[str, tuple[object, ...]] = NOT_SERVED) -> None:
    """Raises RequestError where a field asks for what is not served: `not_served` has the values that ask nothing."""
    for param, neutral in not_served.items():
        value = getattr(request, param)
        if value is not None and value not in neutral:
            raise RequestError(f"{param} is not served: leave it out.", param)


def refuse_contradictions(request: GenerationFields) -> None:
    """Raises RequestError where fields that all routes share contradict each other."""
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options is only allowed with stream.", "stream_options")
    if request.allowed_token_ids == []:
        raise RequestError(
            "allowed_token_ids is empty: allow at least one token, or leave it out.", "allowed_token_ids"
        )
