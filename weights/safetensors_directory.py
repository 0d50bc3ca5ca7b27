"""The safetensors files of a checkpoint directory: which file holds a tensor, opened when first asked for."""

import re
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from weights.errors import CheckpointError
from weights.tensor_shapes import Shape

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_PATTERN = re.compile(r"[^/\0]+\.safetensors")
INDEX_BYTES_MAX = 1 << 26
"""Seven times the size of DeepSeek-R1's index: 92 thousand names make about 9 MB."""


class _Index(msgspec.Struct, frozen=True):
    """What we read of model.safetensors.index.json: the file of each tensor."""

    weight_map: dict[str, str]


class SafetensorsDirectory:
    """Tensors stored in one model.safetensors, or in the shards that model.safetensors.index.json names.

    Files are memory-mapped: a tensor's bytes are read when they are used, and the system may drop them again.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError where the directory holds no readable model."""
        self._path = path
        self._open: dict[str, Any] = {}
        self._held: dict[str, set[str]] = {}
        self._listing = SINGLE_FILE if (path / SINGLE_FILE).is_file() else INDEX_FILE
        if self._listing == SINGLE_FILE:
            self._file(SINGLE_FILE)
            self._files = dict.fromkeys(self._held[SINGLE_FILE], SINGLE_FILE)
        else:
            self._files = _read_index(path)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def path_of(self, name: str) -> Path:
        """The file that holds the tensor, or, for one that is not stored, the file that should list it."""
        return self._path / self._files.get(name, self._listing)

    def header(self, name: str) -> tuple[str, Shape]:
        """The tensor's dtype, as safetensors spells it, and its shape. Raises CheckpointError as `tensor` does."""
        part = self._holder(name).get_slice(name)
        return part.get_dtype(), tuple(part.get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored, in mapped memory.

        Raises CheckpointError where it is not stored, or its file is absent, truncated or damaged.
        """
        tensor: torch.Tensor = self._holder(name).get_tensor(name)
        return tensor

    def _holder(self, name: str) -> Any:
        if name not in self._files:
            raise CheckpointError(f"{self.path_of(name)} lists no tensor {name!r}.")
        file = self._file(self._files[name])
        if name not in self._held[self._files[name]]:
            raise CheckpointError(f"{self.path_of(name)} does not hold {name!r}, though {INDEX_FILE} says so.")
        return file

    def _file(self, file: str) -> Any:
        """The library bounds a header to 100 MB and checks that it covers the file's bytes exactly."""
        if file not in self._open:
            path = self._path / file
            try:
                opened: Any = safe_open(path, framework="pt")
            except FileNotFoundError as error:
                raise CheckpointError(f"{path} does not exist, though {INDEX_FILE} names it.") from error
            except OSError as error:
                raise CheckpointError(f"Cannot read {path}: {error}.") from error
            except SafetensorError as error:
                raise CheckpointError(f"{path} is truncated or damaged: {error}.") from error
            self._held[file] = set(opened.keys())
            self._open[file] = opened
        return self._open[file]


def _read_index(path: Path) -> dict[str, str]:
    index = path / INDEX_FILE
    if not index.is_file():
        if next(path.glob("*.safetensors"), None) is None:
            raise CheckpointError(f"No .safetensors files found in the model directory. Checked: '{path}'.")
        raise CheckpointError(f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}.")
    try:
        if index.stat().st_size > INDEX_BYTES_MAX:
            raise CheckpointError(f"{index} is larger than {INDEX_BYTES_MAX} bytes: it is no index of shards.")
        files = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except OSError as error:
        raise CheckpointError(f"Cannot read {index}: {error.strerror}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of shards: {error}.") from error
    for file in set(files.values()):
        if not SHARD_PATTERN.fullmatch(file):
            raise CheckpointError(f"{index} names the shard {file!r}, which is no .safetensors file beside it.")
    return files
