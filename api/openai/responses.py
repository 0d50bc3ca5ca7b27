"""What clients get: OpenAI's objects, encoded by msgspec, which costs a microsecond where a dict costs ten."""

from typing import Literal

import msgspec

CompletionFinish = Literal["stop", "length"]

DONE_EVENT = b"data: [DONE]\n\n"

_ENCODER = msgspec.json.Encoder()


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts. Completion tokens are all that were sampled, with the one that a completion stopped at (EOS)."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int) -> "Usage":
        """The counts with their sum."""
        return cls(
            prompt_tokens=prompt_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            completion_tokens=completion_tokens,
        )


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probabilities in the form of OpenAI's completions: four lists with an entry for each token.

    `text_offset` counts characters of the answer's text before the token. `top_logprobs` are by text, the token's own
    among them; of tokens with the same text the best is given. The prompt's first token has no log-probabilities.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's entry for one token at one position of a prompt; `rank` 1 is the most probable."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""For each token of a prompt the entries by token id, its own first; None for the first token."""


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One completion, or in a stream its next piece; only the last piece has a `finish_reason`.

    `stop_reason` is the stop string or the id of the stop token that ended it, None for EOS. `token_ids` are those of
    the completion alone; `prompt_token_ids` are in a choice's first piece.
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: CompletionFinish | None = None
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


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "galaxyline"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /tokenize; `token_strs` spells them as the vocabulary does."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizedText(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /detokenize."""

    prompt: str


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /health, /ready and /live where it is yes."""

    status: str


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /version."""

    version: str


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """`type` follows from the HTTP status `code`; `param` is the request's field at fault."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer that is not 2xx, and of an error within a stream."""

    error: ErrorDetail


def encode(message: msgspec.Struct) -> bytes:
    """JSON of one of the structs above."""
    return _ENCODER.encode(message)


def event(message: msgspec.Struct) -> bytes:
    """One server-sent event; the blank line after it is what clients split the stream at."""
    return b"data: " + _ENCODER.encode(message) + b"\n\n"
