"""From a completion request to its choices: the sequences that the engine shall complete."""

from collections.abc import Callable, Iterable

import msgspec

from api.errors import RequestError
from api.messages.engine import AddRequest
from api.openai.prompts import Prompt, default_max_tokens
from api.openai.protocol import CompletionRequest
from api.text.served_model import ServedModel
from stages.step import SamplingParams

RANDOM_SEED = -1
"""As a request's seed: as good as none, as in vLLM."""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The completion with this `index` in the answer.

    `is_echo`: the client wants the prompt alone. Then `request` is None unless log-probabilities of the prompt are
    wanted, which the engine gives with a token; that token is no part of the answer.
    """

    index: int
    prompt: Prompt
    request: AddRequest | None
    is_echo: bool


def build_choices(
    request: CompletionRequest,
    prompts: Iterable[Prompt],
    sampling: SamplingParams,
    model: ServedModel,
    next_request_id: Callable[[], int],
    draw_seed: Callable[[], int],
) -> list[Choice]:
    """The choices of a request in the order of their index: all of the first prompt, then the second's.

    `sampling` is what they have in common; without a seed each prompt gets one from `draw_seed`. Raises RequestError
    where prompt and completion do not fit the model.
    """
    eos_token_ids = [] if request.ignore_eos else model.eos_token_ids
    stop_token_ids = list(dict.fromkeys([*eos_token_ids, *(request.stop_token_ids or [])]))
    is_echo = request.max_tokens == 0
    is_generated = not is_echo or sampling.prompt_logprobs is not None
    choices: list[Choice] = []
    for prompt in prompts:
        max_tokens = _max_tokens(request, len(prompt.tokens), model, least=1 if is_generated else 0)
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


def _max_tokens(request: CompletionRequest, prompt_tokens: int, model: ServedModel, least: int) -> int:
    room = model.max_model_len - prompt_tokens
    asked = None if request.max_tokens is None else max(request.max_tokens, least)
    if room < (least if asked is None else asked):
        raise RequestError(
            f"This model's maximum context length is {model.max_model_len} tokens, but the prompt has {prompt_tokens} "
            f"and {'at least 1' if asked is None else asked} more shall be generated: shorten one of them.",
            "prompt" if room < least else "max_tokens",
        )
    most = min(default_max_tokens(model), room) if asked is None else asked
    if (request.min_tokens or 0) > most:
        raise RequestError(f"min_tokens is {request.min_tokens}, more than the {most} of max_tokens.", "min_tokens")
    return most
