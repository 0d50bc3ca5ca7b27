"""Converted weights on disk, found again by a key that says what they were made from."""

import errno
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
from safetensors import SafetensorError

from weights.cache_workspace import remove_abandoned, workspace
from weights.errors import CacheError

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
KEY_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
PUBLISH_ATTEMPTS = 3


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The last file of an entry to be written: sizes in bytes of all its others, by their names within it."""

    version: int
    files: dict[str, int]


class WeightCache:
    """A directory of entries that are either complete or absent, shared by any number of processes.

    An entry is built in a directory beside its place and moved there by one rename. Of two processes that build the
    same entry at once, both then use the one that was moved first.
    """

    def __init__(self, directory: Path) -> None:
        """The directory is made when the first entry is built."""
        self._directory = directory

    def entry(self, key: str, build: Callable[[Path], None]) -> Path:
        """The directory of the entry `key`, made by `build` where it is not there yet or is damaged.

        `build` fills the empty directory it is given; the name manifest.json is taken. Equal keys must stand for
        equal contents. Errors of the project's own that `build` raises pass through; raises CacheError where files
        cannot be written or read.
        """
        if not KEY_PATTERN.fullmatch(key):
            raise CacheError(f"{key!r} is no name for an entry of the weight cache at {self._directory}.")
        entry = self._directory / key
        try:
            if not is_complete(entry):
                self._build(entry, build)
        except OSError as error:
            raise CacheError(f"{_failure(entry)}: {error.strerror or error}.") from error
        except SafetensorError as error:
            raise CacheError(f"{_failure(entry)}: {error}.") from error
        return entry

    def _build(self, entry: Path, build: Callable[[Path], None]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self._directory)
        with workspace(self._directory) as space:
            draft = space / "entry"
            draft.mkdir()
            build(draft)
            _seal(draft)
            _publish(draft, entry)
        _sync(self._directory)


def is_complete(entry: Path) -> bool:
    """Whether the directory holds a manifest of this version and every file it lists, in its size."""
    try:
        manifest = msgspec.json.decode((entry / MANIFEST_FILE).read_bytes(), type=Manifest)
        return manifest.version == MANIFEST_VERSION and all(
            (entry / name).stat().st_size == size for name, size in manifest.files.items()
        )
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError, UnicodeDecodeError):
        return False


def _failure(entry: Path) -> str:
    return f"Cannot fill the weight cache at {entry}; free space there, or choose another cache directory"


def _seal(draft: Path) -> None:
    """Brings everything to the disk, and the manifest after everything else."""
    paths = sorted(draft.rglob("*"))
    for path in paths:
        _sync(path)
    files = {str(path.relative_to(draft)): path.stat().st_size for path in paths if path.is_file()}
    manifest = draft / MANIFEST_FILE
    manifest.write_bytes(msgspec.json.encode(Manifest(version=MANIFEST_VERSION, files=files)))
    _sync(manifest)
    _sync(draft)


def _publish(draft: Path, entry: Path) -> None:
    """Moves the draft to its place, unless a complete entry got there first; a damaged one is moved away."""
    for attempt in range(PUBLISH_ATTEMPTS):
        try:
            draft.rename(entry)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        if is_complete(entry):
            return
        with suppress(FileNotFoundError):
            entry.rename(draft.with_name(f"damaged-{attempt}"))
    raise CacheError(f"{entry} was damaged {PUBLISH_ATTEMPTS} times over while it was replaced; is the disk failing?")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
