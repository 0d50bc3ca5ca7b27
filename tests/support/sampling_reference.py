"""Sampling by its definitions, in plain Python and double precision; it uses nothing of the code under test."""

import math
from collections.abc import Sequence

from stages.step import SamplingParams


def changed_logits(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]
) -> list[float]:
    """What is chosen from: allowed tokens, bans, bias and penalties, in this order."""
    allowed = {token for token in params.allowed_token_ids if 0 <= token < len(logits)} or set(range(len(logits)))
    banned = {token for token in allowed if _is_banned(token, params, list(answer))}
    changed = []
    for token, logit in enumerate(logits):
        if token not in allowed or (token in banned and banned != allowed):
            changed.append(-math.inf)
        else:
            changed.append(_penalised(logit + params.logit_bias.get(token, 0.0), token, params, prompt, answer))
    return changed


def _is_banned(token: int, params: SamplingParams, answer: list[int]) -> bool:
    if len(answer) < params.min_tokens and token in params.stop_token_ids:
        return True
    for word in params.bad_words:
        if word[-1] == token and (len(word) == 1 or answer[-(len(word) - 1) :] == word[:-1]):
            return True
    return False


def _penalised(logit: float, token: int, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]) -> float:
    count = list(answer).count(token)
    if count or token in prompt:
        logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
    logit -= params.frequency_penalty * count
    return logit - params.presence_penalty if count else logit


def ranked(logits: Sequence[float]) -> list[int]:
    """All tokens, the best first; equal logits rank by token id."""
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))


def distribution(logits: Sequence[float], params: SamplingParams, slack: float = 0.0) -> dict[int, float]:
    """The probability of each token that may be drawn.

    With `slack`, shares within it of `min_p` and `top_p` count as reached later (if positive) or earlier.
    """
    best = max(logits)
    weights = [math.exp((logit - best) / params.temperature) for logit in logits]
    kept = [token for token in ranked(logits) if weights[token] >= params.min_p - slack and weights[token] > 0]
    kept = kept[: params.top_k or None]
    whole = math.fsum(weights[token] for token in kept)
    nucleus: list[int] = []
    for token in kept:
        if nucleus and math.fsum(weights[other] for other in nucleus) / whole >= params.top_p + slack:
            break
        nucleus.append(token)
    total = math.fsum(weights[token] for token in nucleus)
    return {token: weights[token] / total for token in nucleus}


def log_softmax(logits: Sequence[float]) -> list[float]:
    """Natural log-probabilities."""
    best = max(logits)
    normaliser = best + math.log(math.fsum(math.exp(logit - best) for logit in logits))
    return [logit - normaliser for logit in logits]


def chi_squared_bound(degrees: int) -> float:
    """The 1 - 1e-6 quantile, by Wilson and Hilferty's approximation (4.75 standard deviations)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.75 * math.sqrt(2 / (9 * degrees))) ** 3
