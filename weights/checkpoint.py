"""A Hugging Face checkpoint of a DeepSeek-V3 model, read tensor by tensor."""

import hashlib
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import msgspec
import numpy
import torch

from weights.errors import CheckpointError
from weights.model_config import FP8_BLOCK, UNCHANGED, ConfigChanges, ModelConfig
from weights.safetensors_directory import SafetensorsDirectory
from weights.sizes import ceil_div
from weights.source import EMBEDDING, HEAD, Shape, WeightSource

SCALE_SUFFIX = "_scale_inv"

"""The end of the name of a weight's scales; despite the name they are multiplied by."""


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the scales of a matrix of `shape`: blocks at the bottom and right edges may be smaller."""
    return tuple(ceil_div(size, FP8_BLOCK) for size in shape)


def dequantise(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns a float32 matrix: each value of `weight` [rows, columns] times the scale of its block.

    `scales` is float32 of `scale_shape(weight.shape)`. Every product is rounded once, to float32. Takes no more memory
    than the result and one row of blocks.
    """
    rows, columns = weight.shape
    values = torch.empty(rows, columns, dtype=torch.float32)
    for block, scale_row in enumerate(scales):
        span = slice(block * FP8_BLOCK, (block + 1) * FP8_BLOCK)
        values[span] = weight[span]
        values[span] *= scale_row.repeat_interleave(FP8_BLOCK)[:columns]
    return values


FP8 = "F8_E4M3"

FLOATS = ("F32", "BF16", "F16")

SCALES = ("F32", "F8_E8M0")

"""Dtypes of the scales of FP8: DeepSeek-V3.1 has powers of two, of which E8M0 keeps the exponent alone."""

SETTLED_S = 2.0

"""Clocks of file systems are coarse: two changes within this time may have the same time stamp."""

HASH_THREADS_MAX = 8

"""One core hashes about 1 GB a second, slower than a disk reads; this many threads are faster than any disk."""


class Checkpoint(WeightSource):
    """The weights of a checkpoint directory, memory-mapped; FP8 matrices become float32 when they are asked for.

    Only the shards of tensors that are asked for are opened.
    """

    def __init__(self, path: Path, config: ModelConfig, files: SafetensorsDirectory) -> None:
        super().__init__(config, str(path))
        self._files = files

    @classmethod
    def open(cls, path: Path, changes: ConfigChanges = UNCHANGED) -> "Checkpoint":
        """Reads config.json and the list of tensors; only the layers that `changes` leave are the model.

        Raises CheckpointError where `path` is not the directory of a DeepSeek-V3 checkpoint.
        """
        config = read_config(path).changed(changes)
        return cls(path, config, SafetensorsDirectory(path))

    def __contains__(self, name: object) -> bool:
        """Whether `name` is a tensor of the model and listed by the checkpoint."""
        return name in self._shapes and self._stored_name(str(name)) in self._files

    def tensor(self, name: str) -> torch.Tensor:
        """Returns the tensor in mapped memory and its stored dtype, or, from FP8, a new one in float32.

        Raises CheckpointError, naming file and tensor, where it is missing or not as the model needs it.
        """
        stored_name = self._stored_name(name)
        dtype = self._check(name)
        stored = self._files.tensor(stored_name)
        if dtype != FP8:
            return stored
        scales = self._files.tensor(stored_name + SCALE_SUFFIX).to(torch.float32)
        if not torch.isfinite(scales).all():
            raise self._error(stored_name + SCALE_SUFFIX, "holds scales that are not finite")
        return dequantise(stored, scales)

    def validate(self, *prefixes: str) -> None:
        """Checks presence, dtype, shape and scales of the tensors under `prefixes` by their files' headers.

        Raises CheckpointError, naming file and tensor, for the first that cannot be used.
        """
        for name in self._required(prefixes):
            self._check(name)

    def fingerprint(self, *prefixes: str) -> str:
        """Returns a hexadecimal BLAKE2b hash of the config and of names, dtypes, shapes and bytes under `prefixes`.

        It is the same whether or not the config counts multi-token-prediction layers. Reads all those bytes once,
        without keeping them. Raises CheckpointError as `validate` does.
        """
        parts: list[str] = []
        for name in self._required(prefixes):
            parts.append(name)
            if self._check(name) == FP8:
                parts.append(name + SCALE_SUFFIX)
        headers = [(name, *self._files.header(self._stored_name(name))) for name in parts]
        facts = ("checkpoint", self.config.without_drafts, headers)
        digest = hashlib.blake2b(msgspec.json.encode(facts), digest_size=32)
        with ThreadPoolExecutor(min(HASH_THREADS_MAX, os.cpu_count() or 1)) as threads:
            tensors = (self._files.tensor(self._stored_name(name)) for name in parts)
            for part in threads.map(_bytes_digest, tensors):
                digest.update(part)
        return digest.hexdigest()

    def identity(self, *prefixes: str) -> str | None:
        """Returns a hash of config and names, and of path, inode, length and times of each file that holds one of them.

        None within SETTLED_S of a file's last change, and where one changed since it was opened. Raises
        CheckpointError.
        """
        names = self._required(prefixes)
        stored = [self._stored_name(name) for name in names]
        scales = [name + SCALE_SUFFIX for name in stored if name + SCALE_SUFFIX in self._files]
        facts = self._files.facts([*stored, *scales])
        if facts is None:
            return None
        newest_ns = max(max(file.modified_ns, file.changed_ns) for file in facts)
        if newest_ns > time.time_ns() - SETTLED_S * 1e9:
            return None
        every = (self.config.without_drafts, names, facts)
        return hashlib.blake2b(msgspec.json.encode(every), digest_size=32).hexdigest()

    def _stored_name(self, name: str) -> str:
        """The head of a model with tied embeddings is the embedding, unless it is stored on its own."""
        if name == HEAD and self.config.tie_word_embeddings and HEAD not in self._files:
            return EMBEDDING
        return name

    def _check(self, name: str) -> str:
        """Checks header and scales of a tensor of the model and returns its stored dtype."""
        shape = self._shape(name)
        stored_name = self._stored_name(name)
        dtype, stored_shape = self._files.header(stored_name)
        self._check_shape(stored_name, stored_shape, shape)
        if dtype == FP8 and len(shape) == 2:
            self._check_scales(stored_name + SCALE_SUFFIX, scale_shape(shape))
        elif dtype not in FLOATS:
            raise self._error(
                stored_name, f"has dtype {dtype}; float32, bfloat16, float16 and, for matrices, block FP8 can be read"
            )
        return dtype

    def _check_scales(self, name: str, shape: Shape) -> None:
        dtype, stored_shape = self._files.header(name)
        if dtype not in SCALES:
            raise self._error(name, f"has dtype {dtype}; scales must be float32 (F32) or powers of two (F8_E8M0)")
        self._check_shape(name, stored_shape, shape)

    def _check_shape(self, name: str, stored: Shape, shape: Shape) -> None:
        if stored != shape:
            raise self._error(name, f"has shape {list(stored)}; config.json asks for {list(shape)}")

    def _error(self, name: str, fault: str) -> CheckpointError:
        return CheckpointError(f"{self._files.path_of(name)}: {name!r} {fault}.")


def read_config(path: Path) -> ModelConfig:
    """Reads the configuration of the model in the directory `path`.

    Raises CheckpointError where the directory or its config.json is missing, or the model cannot be served.
    """
    try:
        if not path.exists():
            raise CheckpointError(f"Model path does not exist: '{path}'.")
        if not path.is_dir():
            raise CheckpointError(f"Model path is not a directory: '{path}'.")
        if not (path / "config.json").is_file():
            raise CheckpointError(f"config.json not found in the model directory. Checked: '{path}'.")
    except OSError as error:
        raise CheckpointError(f"Cannot read the model path '{path}': {error.strerror}.") from error
    return ModelConfig.from_file(path / "config.json")


def _bytes_digest(tensor: torch.Tensor) -> bytes:
    return hashlib.blake2b(tensor.view(torch.uint8).numpy().data, digest_size=32).digest()


NORM_SPREAD = 0.1

BIAS_SPREAD = 0.05

"""Small beside the spread of sigmoid scores, about 0.2: biases influence the choice of experts without deciding it."""

UNIFORM_STD = math.sqrt((256**2 - 1) / 3)

"""Standard deviation of the odd integers from -255 to 255, all equally likely."""


class RandomCheckpoint(WeightSource):
    """Random weights that depend on a seed and each tensor's name alone, so that any split into stages has the same.

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
        """Returns the tensor: bfloat16, or float32 for a router's correction bias.

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
        """Returns a hexadecimal BLAKE2b hash of the config, the seed and the names under `prefixes`."""
        facts = ("random", self.config.without_drafts, self._seed, self._required(prefixes))
        return hashlib.blake2b(msgspec.json.encode(facts), digest_size=32).hexdigest()

    def identity(self, *prefixes: str) -> None:
        """Returns None: a fingerprint costs nothing."""

    def _uniform(self, name: str, shape: Shape, std: float, dtype: torch.dtype) -> torch.Tensor:
        """Makes odd integers, which bfloat16 holds exactly, scaled: 1 byte of random bits beside the result."""
        key = hashlib.blake2b(msgspec.json.encode((self._seed, name)), digest_size=32).digest()
        count = math.prod(shape)
        words = numpy.random.SFC64(int.from_bytes(key, "little")).random_raw(ceil_div(count, 8))
        bits = torch.from_numpy(words.astype("<u8", copy=False).view(numpy.int8))[:count]
        return bits.view(shape).to(dtype).mul_(2).add_(1).mul_(std / UNIFORM_STD)


def open_weights(
    path: Path, *, load_format: Literal["auto", "dummy"], seed: int, changes: ConfigChanges = UNCHANGED
) -> WeightSource:
    """Opens the checkpoint in the directory `path`, or makes random weights from `seed` for its config with "dummy".

    Only the layers that `changes` leave are there. Raises CheckpointError where the directory cannot be used
    as a model.
    """
    if load_format == "dummy":
        return RandomCheckpoint(read_config(path).changed(changes), seed)
    return Checkpoint.open(path, changes)
