"""The choices of a completion request: the sequences that the engine completes, and how their tokens are drawn."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec

from api.errors import RequestError, UnknownModelError
from api.messages.engine import AddRequest
from api.openai.protocol import CompletionRequest
from api.text.served_model import WHOLE_VOCABULARY, ServedModel
from stages.step import GREEDY_BELOW, VOCABULARY, SamplingParams

DEFAULT_MAX_TOKENS = 16

ALL_THAT_FITS = -1

"""The truncate_prompt_tokens that keeps as many tokens as leave room for the completion."""


def _go_on() -> None:
    """The check of work that nobody ends."""


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt of a request, and the text that goes before its completions when the client asked for an echo."""

    tokens: list[int]
    echo: str


def refuse_other_model(name: str | None, model: ServedModel) -> None:
    """Raises UnknownModelError if a request's model has none of the names of `model`. It may have none at all."""
    if name is not None and name not in model.names:
        names = "', '".join(model.names)
        raise UnknownModelError(f"This server has no model of that name: it serves '{names}'.", "model")


def refuse_outside_vocabulary(tokens: list[int], param: str, model: ServedModel) -> None:
    """Raises RequestError if one of the ids in a request's field is not a token of the model."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < model.vocab_size:
        raise RequestError(f"{param} has a token id outside the vocabulary, 0 to {model.vocab_size - 1}.", param)


def refuse_unknown_text(tokens: list[int], param: str, model: ServedModel) -> None:
    """Raises RequestError if the tokens of a text have one that the model does not have, as of a larger tokenizer."""
    if tokens and max(tokens) >= model.vocab_size:
        raise RequestError(
            f"{param} has a text that the tokenizer makes token {max(tokens)} of, and the model's vocabulary is 0 to "
            f"{model.vocab_size - 1}: leave it out.",
            param,
        )


def default_max_tokens(model: ServedModel) -> int:
    """The tokens of a completion whose request gives no number, where they fit."""
    return model.generation.max_new_tokens or DEFAULT_MAX_TOKENS


def read_prompts(
    request: CompletionRequest,
    model: ServedModel,
    check: Callable[[], None] = _go_on,
    check_size: Callable[[int, int], None] = lambda _, __: None,
) -> list[Prompt]:
    """Tokenises the prompts, which takes long for long ones. May run on a thread.

    `check` is called again and again and may raise to end the work, and `check_size` with the completions and prompt
    tokens so far. Raises RequestError for a text or tokens that cannot be a prompt of the model.
    """
    length = _length_kept(request, model)
    prompts: list[Prompt] = []
    tokens = 0
    for prompt in request.prompts():
        check()
        prompts.append(_read(prompt, length, request, model, check))
        tokens += len(prompts[-1].tokens)
        check_size(len(prompts) * request.choice_count, tokens * request.choice_count)
    return prompts


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


def _read(
    prompt: str | list[int],
    length: int | None,
    request: CompletionRequest,
    model: ServedModel,
    check: Callable[[], None],
) -> Prompt:
    if isinstance(prompt, str):
        tokens = _tokens_of_text(prompt, length, request, model, check)
        refuse_unknown_text(tokens, "prompt", model)
    else:
        tokens = prompt
        refuse_outside_vocabulary(tokens, "prompt", model)
    if length is not None and len(tokens) > length:
        tokens = tokens[:length] if request.truncation_side == "right" else tokens[len(tokens) - length :]
    if not tokens:
        raise RequestError("A prompt has no tokens: give at least one.", "prompt")
    if not request.echo:
        return Prompt(tokens=tokens, echo="")
    is_whole_text = isinstance(prompt, str) and length is None
    return Prompt(tokens=tokens, echo=str(prompt) if is_whole_text else model.tokenizer.decode(tokens))


def _tokens_of_text(
    text: str, length: int | None, request: CompletionRequest, model: ServedModel, check: Callable[[], None]
) -> list[int]:
    add_special_tokens = request.add_special_tokens is not False
    if length is not None:
        side = request.truncation_side or "left"
        return model.tokenizer.encode_part(text, length, side, add_special_tokens, check=check)
    if len(text) > model.prompt_characters_max:
        raise RequestError(
            f"The prompt's {len(text)} characters cannot fit the model's {model.max_model_len} tokens.", "prompt"
        )
    tokens = model.tokenizer.encode(text, add_special_tokens, most=model.max_model_len, check=check)
    if len(tokens) > model.max_model_len:
        raise RequestError(
            f"This model's maximum context length is {model.max_model_len} tokens, but the prompt has at least "
            f"{len(tokens)}: shorten it.",
            "prompt",
        )
    return tokens


DEFAULT_TEMPERATURE = 1.0

DEFAULT_TOP_P = 1.0

DEFAULT_REPETITION_PENALTY = 1.0

NO_TOP_K = 0

NO_MIN_P = 0.0

RANDOM_SEED = -1

"""A request's seed that means none, as in vLLM."""

TOKEN_IDS_MAX = 1 << 20

"""The most ids in the lists of all of a request's choices, as each choice takes a copy of its own to every stage."""

TEMPERATURE_MAX = 1e30
"""Any higher temperature draws all tokens alike too, but would be infinite in float32."""

Number = TypeVar("Number", int, float)


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The completion with this `index` among a request's.

    With `is_echo` the client wants the prompt alone. Then `request` is None unless log-probabilities of the prompt are
    wanted, which the engine gives without generating anything.
    """

    index: int
    prompt: Prompt
    request: AddRequest | None
    is_echo: bool


def sampling_params(
    request: CompletionRequest, model: ServedModel, check: Callable[[], None] = _go_on
) -> SamplingParams:
    """The sampling parameters that all choices of a request share; `seed` and `choice` are 0. May run on a thread.

    `check` is as in `read_prompts`. Raises RequestError where a field does not fit the model.
    """
    advice = model.generation
    params = SamplingParams(
        temperature=min(_first(request.temperature, advice.temperature, DEFAULT_TEMPERATURE), TEMPERATURE_MAX),
        top_p=_first(request.top_p, advice.top_p, DEFAULT_TOP_P),
        top_k=min(max(_first(request.top_k, advice.top_k, NO_TOP_K), 0), model.vocab_size),
        seed=0,
        choice=0,
        min_p=_first(request.min_p, advice.min_p, NO_MIN_P),
        repetition_penalty=_first(request.repetition_penalty, advice.repetition_penalty, DEFAULT_REPETITION_PENALTY),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=request.logit_bias,
        allowed_token_ids=sorted({*(request.allowed_token_ids or [])}),
        bad_words=_bad_words(request.bad_words, model, check),
        min_tokens=request.min_tokens or 0,
        stop_token_ids=sorted({*model.eos_token_ids, *(request.stop_token_ids or [])}) if request.min_tokens else [],
        logprobs=_logprobs(request.logprobs, "logprobs", model),
        prompt_logprobs=_prompt_logprobs(request, model),
    )
    _refuse_misfits(request, params, model)
    return params


def _refuse_misfits(request: CompletionRequest, params: SamplingParams, model: ServedModel) -> None:
    refuse_outside_vocabulary(list(params.logit_bias), "logit_bias", model)
    refuse_outside_vocabulary(params.allowed_token_ids, "allowed_token_ids", model)
    refuse_outside_vocabulary(request.stop_token_ids or [], "stop_token_ids", model)
    if params.temperature < GREEDY_BELOW and request.choice_count > 1:
        raise RequestError("n must be 1 with temperature 0: greedy completions are all the same.", "n")
    lists = {
        "logit_bias": len(params.logit_bias),
        "allowed_token_ids": len(params.allowed_token_ids),
        "bad_words": sum(map(len, params.bad_words)),
        "stop_token_ids": len(request.stop_token_ids or []),
    }
    if sum(lists.values()) * request.completion_count > TOKEN_IDS_MAX:
        longest = max(lists, key=lists.__getitem__)
        raise RequestError(
            f"{longest} has {lists[longest]} token ids, too many for {request.completion_count} completions at once: "
            "send several requests.",
            longest,
        )


def _bad_words(words: list[str], model: ServedModel, check: Callable[[], None]) -> list[list[int]]:
    """The token sequences of `words`, like vLLM's: alone, and after a space where only the first token differs."""
    sequences: list[list[int]] = []
    for word in dict.fromkeys(words):
        check()
        text = word.lstrip()
        alone = model.tokenizer.encode(text, add_special_tokens=False)
        if not alone:
            raise RequestError("bad_words has a word without tokens: leave it out.", "bad_words")
        sequences.append(alone)
        spaced = model.tokenizer.encode(f" {text}", add_special_tokens=False)
        if len(spaced) == len(alone) and spaced[0] != alone[0]:
            sequences.append(spaced)
    for sequence in sequences:
        refuse_unknown_text(sequence, "bad_words", model)
    return sequences


def _prompt_logprobs(request: CompletionRequest, model: ServedModel) -> int | None:
    """The larger number of `prompt_logprobs` and, for an echo, `logprobs`; None where neither is given."""
    asked = [_logprobs(request.prompt_logprobs, "prompt_logprobs", model)]
    if request.echo:
        asked.append(_logprobs(request.logprobs, "logprobs", model))
    counts = [count for count in asked if count is not None]
    return VOCABULARY if VOCABULARY in counts else max(counts, default=None)


def _logprobs(asked: int | None, param: str, model: ServedModel) -> int | None:
    if asked is None:
        return None
    most = model.vocab_size if model.max_logprobs == WHOLE_VOCABULARY else model.max_logprobs
    if (model.vocab_size if asked == WHOLE_VOCABULARY else asked) > most:
        wanted = "all" if asked == WHOLE_VOCABULARY else f"{asked}"
        raise RequestError(f"{param} asks for {wanted}, but this server gives at most {most}.", param)
    return VOCABULARY if asked == WHOLE_VOCABULARY else asked


def _first(*values: Number | None) -> Number:
    return next(value for value in values if value is not None)


def build_choices(
    request: CompletionRequest,
    prompts: Iterable[Prompt],
    sampling: SamplingParams,
    model: ServedModel,
    next_request_id: Callable[[], int],
    draw_seed: Callable[[], int],
) -> list[Choice]:
    """Builds the choices of a request in the order of their index: those of the first prompt, then the second's.

    They share `sampling`; without a seed each prompt gets one from `draw_seed`. Raises RequestError where prompt and
    completion do not fit the model.
    """
    eos_token_ids = [] if request.ignore_eos else model.eos_token_ids
    stop_token_ids = list(dict.fromkeys([*eos_token_ids, *(request.stop_token_ids or [])]))
    is_echo = request.max_tokens == 0
    is_generated = not is_echo or sampling.prompt_logprobs is not None
    choices: list[Choice] = []
    for prompt in prompts:
        max_tokens = _max_tokens(request, len(prompt.tokens), model)
        seed = draw_seed() if request.seed is None or request.seed == RANDOM_SEED else request.seed
        for choice in range(request.choice_count):
            added = AddRequest(
                request_id=next_request_id(),
                tokens=prompt.tokens,
                max_tokens=max_tokens,
                stop_token_ids=stop_token_ids,
                sampling=msgspec.structs.replace(sampling, seed=seed, choice=choice),
            )
            choices.append(
                Choice(index=len(choices), prompt=prompt, request=added if is_generated else None, is_echo=is_echo)
            )
    return choices


def _max_tokens(request: CompletionRequest, prompt_tokens: int, model: ServedModel) -> int:
    room = model.max_model_len - prompt_tokens
    least = 1 if request.max_tokens is None else request.max_tokens
    if room < least:
        raise RequestError(
            f"This model's maximum context length is {model.max_model_len} tokens, but the prompt has {prompt_tokens} "
            f"and {'at least 1' if request.max_tokens is None else least} more are to be generated: shorten one of "
            "them.",
            "prompt" if room < min(least, 1) else "max_tokens",
        )
    most = min(default_max_tokens(model), room) if request.max_tokens is None else request.max_tokens
    if (request.min_tokens or 0) > most:
        raise RequestError(f"min_tokens is {request.min_tokens}, more than the {most} of max_tokens.", "min_tokens")
    return most
