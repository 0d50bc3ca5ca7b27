"""The safetensors files of a checkpoint directory: which file holds a tensor, opened when first asked for."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from weights.errors import CheckpointError
from weights.source import Shape

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_PATTERN = re.compile(r"[^/\0]+\.safetensors")
INDEX_BYTES_MAX = 1 << 26
"""Seven times the size of DeepSeek-R1's index: 92 thousand names make about 9 MB."""


class _Index(msgspec.Struct, frozen=True):
    """The part of model.safetensors.index.json that we read: the file of each tensor."""

    weight_map: dict[str, str]


class FileFacts(NamedTuple):
    """The state of a file in the file system: its place, length in bytes, and when bytes or inode last changed."""

    path: str
    device: int
    inode: int
    bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileFacts":
        """Reads the present facts of the file that `path` leads to. Raises OSError."""
        status = path.stat()
        place = (str(path.resolve()), status.st_dev, status.st_ino)
        return cls(*place, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class SafetensorsDirectory:
    """Tensors stored in one model.safetensors, or in the shards that model.safetensors.index.json names.

    Files are memory-mapped: a tensor's bytes are read when they are used, and the system may drop them again.
    """

    def __init__(self, path: Path) -> None:
        """Opens the list of tensors. Raises CheckpointError where the directory has no readable model."""
        self._path = path
        self._open: dict[str, Any] = {}
        self._held: dict[str, set[str]] = {}
        self._opened_as: dict[str, FileFacts] = {}
        self._listing = SINGLE_FILE if (path / SINGLE_FILE).is_file() else INDEX_FILE
        if self._listing == SINGLE_FILE:
            self._file(SINGLE_FILE)
            self._files = dict.fromkeys(self._held[SINGLE_FILE], SINGLE_FILE)
        else:
            self._files = _read_index(path)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def path_of(self, name: str) -> Path:
        """Returns the file that holds the tensor, or, for one that is not stored, the file that should list it."""
        return self._path / self._files.get(name, self._listing)

    def facts(self, names: Iterable[str]) -> list[FileFacts] | None:
        """Returns facts of the files that hold the tensors, by path. Raises CheckpointError where one cannot be read.

        None where one has changed since it was opened: tensors may then belong to another file.
        """
        paths = sorted({self.path_of(name) for name in names})
        try:
            now = {path.name: FileFacts.of(path) for path in paths}
        except OSError as error:
            raise CheckpointError(f"Cannot read {error.filename}: {error.strerror}.") from error
        if any(self._opened_as.get(file, facts) != facts for file, facts in now.items()):
            return None
        return list(now.values())

    def header(self, name: str) -> tuple[str, Shape]:
        """Returns the tensor's dtype, by safetensors' name, and its shape. Raises CheckpointError as `tensor` does."""
        part = self._holder(name).get_slice(name)
        return part.get_dtype(), tuple(part.get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """Returns the tensor as stored, in mapped memory.

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
        """Opens a file; the library bounds a header to 100 MB and checks that it covers the file's bytes exactly."""
        if file not in self._open:
            path = self._path / file
            try:
                # Before it is opened: if the file is replaced in between, these facts differ from all later ones.
                self._opened_as[file] = FileFacts.of(path)
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
            raise CheckpointError(f"{index} is larger than {INDEX_BYTES_MAX} bytes: it is not an index of shards.")
        files = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except OSError as error:
        raise CheckpointError(f"Cannot read {index}: {error.strerror}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {error}.") from error
    for file in set(files.values()):
        if not SHARD_PATTERN.fullmatch(file):
            raise CheckpointError(f"{index} names the shard {file!r}, which is not a .safetensors file beside it.")
    return files
