"""What every route's request becomes: prompts as tokens, how answers are drawn, and where they end.

Nothing behind this knows which route a request came by.
"""

from collections.abc import Callable
from typing import Literal, TypeVar

import msgspec

from api.errors import RequestError
from api.messages.engine import AddRequest
from api.openai.grammars.structured_output import served_grammar
from api.openai.grammars.thought import ThoughtOptions, thought_of
from api.openai.prompts import Check, Prompt, go_on, refuse_outside_vocabulary, refuse_unknown_text
from api.openai.protocol import GenerationFields, StreamOptions
from api.text.served_model import WHOLE_VOCABULARY, ServedModel
from stages.step import GREEDY_BELOW, VOCABULARY, SamplingParams

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


class DetailOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a client gets of tokens beside their text, in the `form` of OpenAI's completions or of its chat.

    `logprobs` best tokens go into each entry of the answer, `prompt_logprobs` into each of the prompt (VOCABULARY for
    all, None for no entries). `echoes` gives the entries of the prompt before those of the answer. Tokens are named by
    id with `as_token_ids`.
    """

    form: Literal["completion", "chat"]
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    token_ids: bool = False
    as_token_ids: bool = False
    echoes: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether the client gets text alone."""
        return self.logprobs is None and self.prompt_logprobs is None and not self.token_ids


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that fits the model, whichever route it came by.

    Each of `prompts` gets `choice_count` answers of up to `max_tokens` tokens (None: as many as `default_max_tokens`
    and the model's length allow). `sampling` is that of all answers, without seed and choice; without a `seed`, each
    prompt gets one. Answers end at one of `stops`, at a token of `stop_token_ids` or at EOS. `request_id` is the one in
    the request's body. What is cached of the prompts is shared with requests of the same `cache_salt` only.
    """

    prompts: list[Prompt]
    choice_count: int
    max_tokens: int | None
    default_max_tokens: int
    min_tokens: int
    sampling: SamplingParams
    seed: int | None
    stops: list[str]
    includes_stop: bool
    stop_token_ids: list[int]
    ignores_eos: bool
    skips_special_tokens: bool
    details: DetailOptions
    streams: bool
    stream_options: StreamOptions
    request_id: str | None
    cache_salt: str = ""
    thought: ThoughtOptions = ThoughtOptions()

    @property
    def is_echo(self) -> bool:
        """Whether the client wants its prompts alone."""
        return self.max_tokens == 0


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The answer with this `index` among a request's.

    With `is_echo` the client wants the prompt alone. Then `request` is None unless log-probabilities of the prompt are
    wanted, which the engine gives without generating anything.
    """

    index: int
    prompt: Prompt
    request: AddRequest | None
    is_echo: bool


def generation_request(
    fields: GenerationFields,
    prompts: list[Prompt],
    details: DetailOptions,
    model: ServedModel,
    *,
    max_tokens: int | None,
    default_max_tokens: int,
    check: Check = go_on,
) -> GenerationRequest:
    """Makes the request of all routes from the fields that these share. May run on a thread.

    Raises RequestError where a field does not fit the model.
    """
    sampling = sampling_params(fields, len(prompts), details, model, check)
    grammar = served_grammar(fields, model)
    return GenerationRequest(
        prompts=prompts,
        choice_count=fields.choice_count,
        max_tokens=max_tokens,
        default_max_tokens=default_max_tokens,
        min_tokens=fields.min_tokens or 0,
        sampling=msgspec.structs.replace(sampling, grammar=grammar),
        seed=None if fields.seed == RANDOM_SEED else fields.seed,
        stops=fields.stop,
        includes_stop=fields.include_stop_str_in_output or False,
        stop_token_ids=fields.stop_token_ids or [],
        ignores_eos=fields.ignore_eos or False,
        skips_special_tokens=fields.skip_special_tokens is not False,
        details=details,
        streams=fields.stream or False,
        stream_options=fields.stream_options or StreamOptions(),
        request_id=fields.request_id,
        cache_salt=fields.cache_salt or "",
        thought=ThoughtOptions(budget=fields.thinking_token_budget),
    )


def sampling_params(
    fields: GenerationFields, prompts: int, details: DetailOptions, model: ServedModel, check: Check = go_on
) -> SamplingParams:
    """The sampling parameters that all answers to so many prompts share; `seed` and `choice` are 0.

    Raises RequestError where a field does not fit the model.
    """
    advice = model.generation
    params = SamplingParams(
        temperature=min(_first(fields.temperature, advice.temperature, DEFAULT_TEMPERATURE), TEMPERATURE_MAX),
        top_p=_first(fields.top_p, advice.top_p, DEFAULT_TOP_P),
        top_k=min(max(_first(fields.top_k, advice.top_k, NO_TOP_K), 0), model.vocab_size),
        seed=0,
        choice=0,
        min_p=_first(fields.min_p, advice.min_p, NO_MIN_P),
        repetition_penalty=_first(fields.repetition_penalty, advice.repetition_penalty, DEFAULT_REPETITION_PENALTY),
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        logit_bias=fields.logit_bias,
        allowed_token_ids=sorted({*(fields.allowed_token_ids or [])}),
        bad_words=_bad_words(fields.bad_words, model, check),
        min_tokens=fields.min_tokens or 0,
        stop_token_ids=sorted({*model.eos_token_ids, *(fields.stop_token_ids or [])}) if fields.min_tokens else [],
        logprobs=details.logprobs,
        prompt_logprobs=_prompt_logprobs(details),
    )
    _refuse_misfits(fields, params, prompts, model)
    return params


def _refuse_misfits(fields: GenerationFields, params: SamplingParams, prompts: int, model: ServedModel) -> None:
    refuse_outside_vocabulary(list(params.logit_bias), "logit_bias", model)
    refuse_outside_vocabulary(params.allowed_token_ids, "allowed_token_ids", model)
    refuse_outside_vocabulary(fields.stop_token_ids or [], "stop_token_ids", model)
    if params.temperature < GREEDY_BELOW and fields.choice_count > 1:
        raise RequestError("n must be 1 with temperature 0: greedy completions are all the same.", "n")
    lists = {
        "logit_bias": len(params.logit_bias),
        "allowed_token_ids": len(params.allowed_token_ids),
        "bad_words": sum(map(len, params.bad_words)),
        "stop_token_ids": len(fields.stop_token_ids or []),
    }
    answers = prompts * fields.choice_count
    if sum(lists.values()) * answers > TOKEN_IDS_MAX:
        longest = max(lists, key=lists.__getitem__)
        raise RequestError(
            f"{longest} has {lists[longest]} token ids, too many for {answers} completions at once: "
            "send several requests.",
            longest,
        )


def _bad_words(words: list[str], model: ServedModel, check: Check) -> list[list[int]]:
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


def _prompt_logprobs(details: DetailOptions) -> int | None:
    """The larger number of `prompt_logprobs` and, for an echo, `logprobs`; None where neither is given."""
    asked = (details.prompt_logprobs, details.logprobs if details.echoes else None)
    counts = [count for count in asked if count is not None]
    return VOCABULARY if VOCABULARY in counts else max(counts, default=None)


def logprob_count(asked: int | None, param: str, model: ServedModel) -> int | None:
    """The number of best tokens in an entry, VOCABULARY for all. Raises RequestError where it is more than allowed."""
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
    request: GenerationRequest,
    model: ServedModel,
    next_request_id: Callable[[], int],
    draw_seed: Callable[[], int],
) -> list[Choice]:
    """Builds the choices of a request in the order of their index: those of the first prompt, then the second's.

    Without a seed each prompt gets one from `draw_seed`. Raises RequestError where prompt and answer do not fit the
    model.
    """
    eos_token_ids = [] if request.ignores_eos else model.eos_token_ids
    stop_token_ids = list(dict.fromkeys([*eos_token_ids, *request.stop_token_ids]))
    is_generated = not request.is_echo or request.sampling.prompt_logprobs is not None
    choices: list[Choice] = []
    for prompt in request.prompts:
        max_tokens = _max_tokens(request, len(prompt.tokens), model)
        has_grammar = request.sampling.grammar is not None
        thought = thought_of(model.tokenizer, prompt.tokens, request.thought, has_grammar=has_grammar)
        seed = draw_seed() if request.seed is None else request.seed
        for choice in range(request.choice_count):
            added = AddRequest(
                request_id=next_request_id(),
                tokens=prompt.tokens,
                max_tokens=max_tokens,
                stop_token_ids=stop_token_ids,
                sampling=msgspec.structs.replace(request.sampling, seed=seed, choice=choice, thought=thought),
                cache_salt=request.cache_salt,
            )
            choices.append(
                Choice(
                    index=len(choices),
                    prompt=prompt,
                    request=added if is_generated else None,
                    is_echo=request.is_echo,
                )
            )
    return choices


def _max_tokens(request: GenerationRequest, prompt_tokens: int, model: ServedModel) -> int:
    room = model.max_model_len - prompt_tokens
    least = 1 if request.max_tokens is None else request.max_tokens
    if room < least:
        raise RequestError(
            f"This model's maximum context length is {model.max_model_len} tokens, but the prompt has {prompt_tokens} "
            f"and {'at least 1' if request.max_tokens is None else least} more are to be generated: shorten one of "
            "them.",
            "prompt" if room < min(least, 1) else "max_tokens",
        )
    most = min(request.default_max_tokens, room) if request.max_tokens is None else request.max_tokens
    if request.min_tokens > most:
        raise RequestError(f"min_tokens is {request.min_tokens}, more than the {most} of max_tokens.", "min_tokens")
    return most
