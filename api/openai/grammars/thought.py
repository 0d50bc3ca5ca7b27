"""The thought before an answer, as the sampler is told of it."""

from collections.abc import Sequence

import msgspec

from api.errors import RequestError
from api.text.tokenizer import TextTokenizer
from stages.step import Thought

OPENING, CLOSING = "<think>", "</think>"

NO_BUDGET = -1
"""A request's thinking_token_budget that sets none, as in vLLM."""


class ThoughtOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a request says of the thoughts of its answers.

    `is_open` says whether the prompt has opened one, None that its tokens tell. With `may_open` the answer may open one
    itself. After `budget` tokens of it, it is closed.
    """

    is_open: bool | None = None
    may_open: bool = False
    budget: int | None = None


def has_thoughts(tokenizer: TextTokenizer) -> bool:
    """Whether a tokenizer has the tags of thoughts."""
    return tokenizer.token_id(OPENING) is not None and tokenizer.token_id(CLOSING) is not None


def thought_of(
    tokenizer: TextTokenizer, prompt: Sequence[int], options: ThoughtOptions, *, has_grammar: bool
) -> Thought | None:
    """The thought of an answer to `prompt`; None where there is none, or nothing depends on it.

    Raises RequestError where it has a budget, and the model has no tags for thoughts.
    """
    opening, closing = tokenizer.token_id(OPENING), tokenizer.token_id(CLOSING)
    budget = None if options.budget == NO_BUDGET else options.budget
    if opening is None or closing is None:
        if budget is None:
            return None
        raise RequestError(
            f"thinking_token_budget is not served with this model, as its tokenizer has no {OPENING}: leave it out.",
            "thinking_token_budget",
        )
    is_open = options.is_open
    if is_open is None:
        is_open = next((token for token in reversed(prompt) if token in {opening, closing}), None) == opening
    if not (is_open or options.may_open if has_grammar else budget is not None):
        return None
    return Thought(opening=[opening], closing=[closing], is_open=is_open, budget=budget)
