"""How a request's tokens shall be chosen: by its own fields, then the model's advice, then vLLM's defaults."""

from typing import TypeVar

from api.errors import RequestError
from api.openai.prompts import refuse_outside_vocabulary
from api.openai.protocol import CompletionRequest
from api.text.served_model import WHOLE_VOCABULARY, ServedModel
from stages.step import GREEDY_BELOW, VOCABULARY, SamplingParams

DEFAULT_TEMPERATURE = 1.0
DEFAULT_TOP_P = 1.0
DEFAULT_REPETITION_PENALTY = 1.0
NO_TOP_K = 0
NO_MIN_P = 0.0

TOKEN_IDS_MAX = 1 << 20
"""Ids in the lists of all of a request's choices: each choice takes its own copy to every stage."""

Number = TypeVar("Number", int, float)


def sampling_params(request: CompletionRequest, model: ServedModel) -> SamplingParams:
    """What all choices of a request have in common; its `seed` and `choice` are 0. May run on a thread.

    Raises RequestError where a field does not fit the model.
    """
    advice = model.generation
    params = SamplingParams(
        temperature=_first(request.temperature, advice.temperature, DEFAULT_TEMPERATURE),
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
        bad_words=_bad_words(request.bad_words, model),
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


def _bad_words(words: list[str], model: ServedModel) -> list[list[int]]:
    """Token sequences of `words`, as vLLM forms them: alone, and after a space where that is one other token."""
    sequences: list[list[int]] = []
    for word in dict.fromkeys(words):
        text = word.lstrip()
        alone = model.tokenizer.encode(text, add_special_tokens=False)
        if not alone:
            raise RequestError("bad_words has a word without tokens: leave it out.", "bad_words")
        sequences.append(alone)
        spaced = model.tokenizer.encode(f" {text}", add_special_tokens=False)
        if len(spaced) == len(alone) and spaced[0] != alone[0]:
            sequences.append(spaced)
    return sequences


def _prompt_logprobs(request: CompletionRequest, model: ServedModel) -> int | None:
    """The larger of what `prompt_logprobs` asks for and what `logprobs` asks for of an echo."""
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
