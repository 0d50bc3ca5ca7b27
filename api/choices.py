"""From a completion request to its choices: the sequences that the engine shall complete."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec

from api.errors import RequestError, UnknownModelError
from api.messages import AddRequest
from api.protocol import CompletionRequest
from api.served_model import ServedModel
from stages.step import GREEDY_BELOW, SamplingParams

DEFAULT_MAX_TOKENS = 16
DEFAULT_TEMPERATURE = 1.0
DEFAULT_TOP_P = 1.0

Number = TypeVar("Number", int, float)


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt of a request, and the text that goes before its completions when the client asked for an echo."""

    tokens: list[int]
    echo: str


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The completion with this `index` in the answer. `request` is None where no token was asked for."""

    index: int
    prompt: Prompt
    request: AddRequest | None


def read_prompts(request: CompletionRequest, model: ServedModel) -> list[Prompt]:
    """Tokenises the prompts. Takes long for long ones, and may run on a thread.

    Raises UnknownModelError or RequestError where the model does not fit the request, or the prompts the model.
    """
    if request.model not in {None, model.name}:
        raise UnknownModelError(f"This server has no model of that name: it serves '{model.name}'.", "model")
    add_special_tokens = request.add_special_tokens is not False
    return [_read_prompt(prompt, request.echo or False, add_special_tokens, model) for prompt in request.prompts()]


def build_choices(
    request: CompletionRequest,
    prompts: Iterable[Prompt],
    model: ServedModel,
    next_request_id: Callable[[], int],
    draw_seed: Callable[[], int],
) -> list[Choice]:
    """The choices of a request in the order of their index: all of the first prompt, then the second's.

    What the request leaves open is taken from the model's generation config, then from vLLM's defaults; without a
    seed each prompt gets one from `draw_seed`. Raises RequestError where something does not fit the model.
    """
    temperature = _first(request.temperature, model.generation.temperature, DEFAULT_TEMPERATURE)
    if temperature < GREEDY_BELOW and request.choice_count > 1:
        raise RequestError("n must be 1 with temperature 0: greedy completions are all the same.", "n")
    top_p = _first(request.top_p, model.generation.top_p, DEFAULT_TOP_P)
    top_k = min(max(_first(request.top_k, model.generation.top_k, 0), 0), model.vocab_size)
    stop_token_ids = _stop_token_ids(request, model)
    choices: list[Choice] = []
    for prompt in prompts:
        max_tokens = _max_tokens(request, len(prompt.tokens), model)
        seed = draw_seed() if request.seed is None else request.seed
        for choice in range(request.choice_count):
            added = AddRequest(
                request_id=next_request_id(),
                tokens=prompt.tokens,
                max_tokens=max_tokens,
                stop_token_ids=stop_token_ids,
                sampling=SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, choice=choice),
            )
            choices.append(Choice(index=len(choices), prompt=prompt, request=added if max_tokens else None))
    return choices


def _read_prompt(prompt: str | list[int], echo: bool, add_special_tokens: bool, model: ServedModel) -> Prompt:
    if isinstance(prompt, str):
        if len(prompt) > model.max_model_len * model.tokenizer.characters_per_token_max:
            raise RequestError(
                f"The prompt's {len(prompt)} characters cannot fit the model's {model.max_model_len} tokens.", "prompt"
            )
        tokens = model.tokenizer.encode(prompt, add_special_tokens)
    else:
        tokens = prompt
        _refuse_outside_vocabulary(tokens, "prompt", model)
    if not tokens:
        raise RequestError("A prompt has no tokens: give at least one.", "prompt")
    text = "" if not echo else prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)
    return Prompt(tokens=tokens, echo=text)


def _max_tokens(request: CompletionRequest, prompt_tokens: int, model: ServedModel) -> int:
    room = model.max_model_len - prompt_tokens
    asked = request.max_tokens
    if room >= (1 if asked is None else asked):
        return min(_first(model.generation.max_new_tokens, DEFAULT_MAX_TOKENS), room) if asked is None else asked
    raise RequestError(
        f"This model's maximum context length is {model.max_model_len} tokens, but the prompt has {prompt_tokens} "
        f"and {'at least 1' if asked is None else asked} more shall be generated: shorten one of them.",
        "prompt" if room < 1 else "max_tokens",
    )


def _stop_token_ids(request: CompletionRequest, model: ServedModel) -> list[int]:
    asked = request.stop_token_ids or []
    _refuse_outside_vocabulary(asked, "stop_token_ids", model)
    return asked if request.ignore_eos else [*model.eos_token_ids, *asked]


def _refuse_outside_vocabulary(tokens: list[int], param: str, model: ServedModel) -> None:
    if tokens and not 0 <= min(tokens) <= max(tokens) < model.vocab_size:
        raise RequestError(f"{param} has a token id outside the vocabulary, 0 to {model.vocab_size - 1}.", param)


def _first(*values: Number | None) -> Number:
    return next(value for value in values if value is not None)
