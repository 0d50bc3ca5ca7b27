"""From logits to tokens: a function of one request's logits, parameters and position, whatever else is in the batch."""

from collections.abc import Sequence

import numpy as np
import torch

from stages.step import GREEDY_BELOW, SamplingParams

WORD = (1 << 64) - 1


def sample_tokens(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """One token for each row of `logits` [rows, vocabulary], float32.

    `positions[i]` is the position that the new token of row i will have: with the request's seed and choice it keys
    the random number, so that a request draws the same tokens alone, in any batch and after a replay.
    """
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    for row, (param, position) in enumerate(zip(params, positions, strict=True)):
        if param.temperature >= GREEDY_BELOW:
            tokens[row] = sample_token(logits[row], param, position)
    return tokens


def sample_token(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
    """Draws from softmax(logits / temperature) cut to `top_k`, then to the nucleus `top_p`, by inverse transform.

    `logits` [vocabulary]. The nucleus is the smallest set of best tokens whose probability reaches `top_p` (Holtzman
    et al., arXiv:1904.09751). Equal logits rank by token id.
    """
    ranked, order = logits.double().sort(descending=True, stable=True)
    if params.top_k:
        ranked = ranked[: params.top_k]
    cumulative = (ranked / params.temperature).softmax(dim=-1).cumsum(dim=-1)
    kept = int(torch.searchsorted(cumulative, params.top_p)) + 1 if params.top_p < 1 else len(cumulative)
    cumulative = cumulative[:kept]
    drawn = uniform(params.seed, params.choice, position) * float(cumulative[-1])
    rank = int(torch.searchsorted(cumulative, drawn, right=True))
    return int(order[min(rank, len(cumulative) - 1)])


def uniform(seed: int, choice: int, position: int) -> float:
    """The random number in [0, 1) of this seed, choice and position: Philox, a counter-based generator.

    Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011). Any integer may be a seed.
    """
    philox = np.random.Philox(key=np.array([seed & WORD, choice], dtype=np.uint64), counter=[0, 0, 0, position])
    return float(np.random.Generator(philox).random())
