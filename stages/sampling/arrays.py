"""The arrays that sampling works on."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
"""Logits or weights, [vocabulary] or [candidates]."""

Doubles = NDArray[np.float64]

TokenIds = NDArray[np.int64]

FLOAT_MAX = float(np.finfo(np.float32).max)


def to_floats(values: Doubles) -> Floats:
    """As float32; what is too large becomes the largest number, so that no option makes an infinite logit."""
    with np.errstate(over="ignore"):
        return np.minimum(values, FLOAT_MAX).astype(np.float32)


def token_ids(tokens: Iterable[int], vocabulary: int) -> TokenIds:
    """The ids that are tokens of the vocabulary, ascending, each once; no option has an effect on others."""
    return np.array(sorted({token for token in tokens if 0 <= token < vocabulary}), dtype=np.int64)
