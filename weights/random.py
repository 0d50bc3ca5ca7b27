"""Random weights for runs without a checkpoint: sizes and speeds are real, the text is not."""

import hashlib
import math

import msgspec
import numpy
import torch

from weights.model_config import ModelConfig
from weights.source import WeightSource
from weights.tensor_shapes import EMBEDDING, Shape

NORM_SPREAD = 0.1
BIAS_SPREAD = 0.05
"""Small beside the spread of sigmoid scores, about 0.2: the bias shifts choices of experts but does not make them."""

UNIFORM_STD = math.sqrt((256**2 - 1) / 3)
"""Standard deviation of the odd integers from -255 to 255, all equally likely."""


class RandomCheckpoint(WeightSource):
    """Weights that follow from a seed and each tensor's name alone, so that any split into stages has the same.

    Values are uniform with 256 levels, made from a generator's raw bits without transcendental functions, whose last
    bit would differ between processors.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__(config, f"random weights of seed {seed}")
        self._seed = seed

    def __contains__(self, name: object) -> bool:
        """Whether `name` is a tensor of the model: all are present."""
        return name in self._shapes

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor: bfloat16, or float32 for a router's correction bias.

        Matrices have standard deviation fan_in^-0.5 (the embedding 1), norms are near 1. With tied embeddings the
        head is the embedding. Raises CheckpointError where the model has no such tensor.
        """
        shape = self._shape(name)
        if self.config.tie_word_embeddings and shape == self._shapes[EMBEDDING]:
            return self._uniform(EMBEDDING, shape, self.config.hidden_size**-0.5, torch.bfloat16)
        if name.endswith(".e_score_correction_bias"):
            return self._uniform(name, shape, BIAS_SPREAD, torch.float32)
        if name.endswith("norm.weight"):
            return self._uniform(name, shape, NORM_SPREAD, torch.bfloat16).add_(1)
        std = 1.0 if name == EMBEDDING else shape[-1] ** -0.5
        return self._uniform(name, shape, std, torch.bfloat16)

    def validate(self, *prefixes: str) -> None:
        """Raises CheckpointError where a prefix begins no tensor of the model."""
        self._required(prefixes)

    def fingerprint(self, *prefixes: str) -> str:
        """A hexadecimal BLAKE2b hash of the config, the seed and the names under `prefixes`."""
        facts = ("random", self.config, self._seed, self._required(prefixes))
        return hashlib.blake2b(msgspec.json.encode(facts), digest_size=32).hexdigest()

    def identity(self, *prefixes: str) -> None:
        """None: a fingerprint costs nothing."""

    def _uniform(self, name: str, shape: Shape, std: float, dtype: torch.dtype) -> torch.Tensor:
        """Odd integers, which bfloat16 holds exactly, scaled: 1 byte of random bits beside the result."""
        key = hashlib.blake2b(msgspec.json.encode((self._seed, name)), digest_size=32).digest()
        count = math.prod(shape)
        words = numpy.random.SFC64(int.from_bytes(key, "little")).random_raw(-(-count // 8))
        bits = torch.from_numpy(words.astype("<u8", copy=False).view(numpy.int8))[:count]
        return bits.view(shape).to(dtype).mul_(2).add_(1).mul_(std / UNIFORM_STD)
