"""Log-probabilities at one position."""

from stages.sampling.arrays import Floats
from stages.sampling.ranking import best_tokens, rank_of
from stages.sampling.softmax import log_normaliser
from stages.step import VOCABULARY, TokenLogprobs


def token_logprobs(logits: Floats, token: int, top: int) -> TokenLogprobs:
    """Those of `token` and of the `top` best, 0 or more or VOCABULARY, from the model's `logits` [vocabulary]."""
    normaliser = log_normaliser(logits)
    count = len(logits) if top == VOCABULARY else top
    best = best_tokens(logits, count).tolist() if count else []
    return TokenLogprobs(
        logprob=float(logits[token]) - normaliser,
        rank=rank_of(logits, token),
        top_tokens=best,
        top_logprobs=[logit - normaliser for logit in logits[best].tolist()],
    )
