"""Random numbers by key, with no state."""

import numpy as np

WORD = (1 << 64) - 1


def uniform(seed: int, choice: int, position: int) -> float:
    """The random number in [0, 1) of this seed, choice and position: Philox, a counter-based generator.

    Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011). Any integer may be a seed.
    """
    philox = np.random.Philox(key=np.array([seed & WORD, choice], dtype=np.uint64), counter=[0, 0, 0, position])
    return float(np.random.Generator(philox).random())
