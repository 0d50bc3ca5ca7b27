"""The prompts of a request, as tokens."""

import msgspec

from api.errors import RequestError, UnknownModelError
from api.openai.protocol import CompletionRequest
from api.text.served_model import ServedModel

DEFAULT_MAX_TOKENS = 16
ALL_THAT_FITS = -1
"""The truncate_prompt_tokens that keeps as many tokens as leave room for the completion."""


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt of a request, and the text that goes before its completions when the client asked for an echo."""

    tokens: list[int]
    echo: str


def refuse_other_model(name: str | None, model: ServedModel) -> None:
    """Raises UnknownModelError if a request's model has another name than `model`. It may have none."""
    if name not in {None, model.name}:
        raise UnknownModelError(f"This server has no model of that name: it serves '{model.name}'.", "model")


def refuse_outside_vocabulary(tokens: list[int], param: str, model: ServedModel) -> None:
    """Raises RequestError if one of the ids in a request's field is not a token of the model."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < model.vocab_size:
        raise RequestError(f"{param} has a token id outside the vocabulary, 0 to {model.vocab_size - 1}.", param)


def default_max_tokens(model: ServedModel) -> int:
    """The tokens of a completion whose request gives no number, where they fit."""
    return model.generation.max_new_tokens or DEFAULT_MAX_TOKENS


def read_prompts(request: CompletionRequest, model: ServedModel) -> list[Prompt]:
    """Tokenises the prompts, which takes long for long ones. May run on a thread.

    Raises RequestError for one that cannot be a prompt of the model.
    """
    length = _length_kept(request, model)
    return [_read(prompt, length, request, model) for prompt in request.prompts()]


def _length_kept(request: CompletionRequest, model: ServedModel) -> int | None:
    asked = request.truncate_prompt_tokens
    completion = default_max_tokens(model) if request.max_tokens is None else request.max_tokens
    room = model.max_model_len - completion
    if asked == ALL_THAT_FITS:
        return max(room, 1)
    if asked is not None and asked > room:
        raise RequestError(
            f"truncate_prompt_tokens is more than the {max(room, 0)} tokens that the model's {model.max_model_len} "
            f"leave beside {completion} of the completion.",
            "truncate_prompt_tokens",
        )
    return asked


def _read(prompt: str | list[int], length: int | None, request: CompletionRequest, model: ServedModel) -> Prompt:
    tokens = _tokens_of_text(prompt, length, request, model) if isinstance(prompt, str) else prompt
    if not isinstance(prompt, str):
        refuse_outside_vocabulary(tokens, "prompt", model)
    if length is not None and len(tokens) > length:
        tokens = tokens[:length] if request.truncation_side == "right" else tokens[len(tokens) - length :]
    if not tokens:
        raise RequestError("A prompt has no tokens: give at least one.", "prompt")
    if not request.echo:
        return Prompt(tokens=tokens, echo="")
    is_whole_text = isinstance(prompt, str) and length is None
    return Prompt(tokens=tokens, echo=str(prompt) if is_whole_text else model.tokenizer.decode(tokens))


def _tokens_of_text(text: str, length: int | None, request: CompletionRequest, model: ServedModel) -> list[int]:
    add_special_tokens = request.add_special_tokens is not False
    if length is not None:
        return model.tokenizer.encode_part(text, length, request.truncation_side or "left", add_special_tokens)
    if len(text) > model.max_model_len * model.tokenizer.characters_per_token_max:
        raise RequestError(
            f"The prompt's {len(text)} characters cannot fit the model's {model.max_model_len} tokens.", "prompt"
        )
    return model.tokenizer.encode(text, add_special_tokens)
