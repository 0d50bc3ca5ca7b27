"""The weight cache: entries of converted weights on disk, under keys from which their contents follow."""

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from weights.cache.cache_key import FINGERPRINT
from weights.cache.manifest import MANIFEST_FILE, damaged_files, is_complete, note_damage, sync, write_manifest
from weights.errors import CacheError
from weights.sizes import in_words

if TYPE_CHECKING:
    # It imports torch, which `galaxyline cache` does without.
    from weights.source import WeightSource

KEY_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
PUBLISH_ATTEMPTS = 3

WORKSPACE_PREFIX = ".building-"
LOCK_FILE = "lock"


class WeightCache:
    """A directory of entries that are either complete or absent, shared by any number of processes.

    An entry is built in a workspace in the same directory and published by one rename. If two processes build the same
    entry at once, both use the one that was published first.
    """

    def __init__(self, directory: Path) -> None:
        """The directory is created when the first entry is built."""
        self.directory = directory

    def entry(self, key: str, build: Callable[[Path], None], expected_bytes: int = 0, model: str = "") -> Path:
        """Returns the directory of the entry `key`, built by `build` if it is missing or damaged.

        Every byte of an existing entry is checked. `build` fills the empty directory that it is given, with about
        `expected_bytes`; the names manifest.json and damaged.json are reserved, and the former has `model`. Equal keys
        must mean equal contents. The project's own errors that `build` raises pass through; raises CacheError if files
        cannot be written or read, and before anything is built if the disk has no room for `expected_bytes`.
        """
        entry = self._path(key)
        try:
            if damaged_files(entry):
                self._build(entry, build, expected_bytes, model)
            else:
                note_damage(entry, [])
                _note_use(entry)
        except OSError as error:
            raise CacheError(f"{_failure(entry)}: {error.strerror or error}.") from error
        except SafetensorError as error:
            raise CacheError(f"{_failure(entry)}: {error}.") from error
        return entry

    def holds(self, key: str) -> bool:
        """Whether there is an entry `key` whose files have the right lengths and no known damage. Raises CacheError."""
        entry = self._path(key)
        try:
            return is_complete(entry)
        except OSError as error:
            raise CacheError(f"Cannot read the weight cache at {entry}: {error.strerror or error}.") from error

    def free_bytes(self) -> int:
        """The free bytes of the disk that the cache is, or will be, on. Raises CacheError."""
        existing = self.directory
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        try:
            return shutil.disk_usage(existing).free
        except OSError as error:
            raise CacheError(f"Cannot read the disk of the weight cache at {existing}: {error.strerror}.") from error

    def _path(self, key: str) -> Path:
        if not KEY_PATTERN.fullmatch(key):
            raise CacheError(f"{key!r} is not a valid key of the weight cache at {self.directory}.")
        return self.directory / key

    def _build(self, entry: Path, build: Callable[[Path], None], expected_bytes: int, model: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.directory)
        free = self.free_bytes()
        if free < expected_bytes:
            raise CacheError(
                f"{_failure(entry)}: it takes about {in_words(expected_bytes)}, and {in_words(free)} are left."
            )
        with workspace(self.directory) as space:
            draft = space / "entry"
            draft.mkdir()
            build(draft)
            write_manifest(draft, model)
            _publish(draft, entry)
        sync(self.directory)


def _failure(entry: Path) -> str:
    return f"Cannot fill the weight cache at {entry}; free space there, or choose another cache directory"


def _note_use(entry: Path) -> None:
    """Sets the manifest's time of change, which is the time of the last use; a read-only cache keeps no such record."""
    with suppress(OSError):
        os.utime(entry / MANIFEST_FILE)


def _publish(draft: Path, entry: Path) -> None:
    """Moves the draft to its entry, unless a sound entry is there already; a damaged one is moved away."""
    for attempt in range(PUBLISH_ATTEMPTS):
        try:
            draft.rename(entry)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        with suppress(FileNotFoundError):
            found = entry.stat().st_ino
            if not damaged_files(entry):
                return
            # Meanwhile another builder may have replaced the entry with a sound one.
            if entry.stat().st_ino == found:
                entry.rename(draft.with_name(f"damaged-{attempt}"))
    raise CacheError(f"{entry} was damaged {PUBLISH_ATTEMPTS} times over while it was replaced; is the disk failing?")


@contextmanager
def workspace(parent: Path) -> Iterator[Path]:
    """Creates a directory in `parent` that no other process touches, and removes it with all its contents at the end.

    Raises OSError if it cannot be created or locked.
    """
    path, lock = _locked_directory(parent)
    try:
        yield path
    finally:
        # The next builder removes what cannot be removed now: an error here would hide an earlier one.
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def remove_abandoned(parent: Path) -> None:
    """Removes the workspaces in `parent` whose builders are dead.

    Skips workspaces of other users, and those that another process is removing.
    """
    for path in parent.glob(WORKSPACE_PREFIX + "*"):
        with suppress(FileNotFoundError, PermissionError, BlockingIOError):
            lock = _locked(path)
            try:
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _locked_directory(parent: Path) -> tuple[Path, int]:
    """Creates a directory; returns it with the descriptor that holds its lock.

    Until the lock is held, another process may consider the directory abandoned and remove it; then another is created.
    """
    while True:
        path = parent / (WORKSPACE_PREFIX + secrets.token_hex(8))
        path.mkdir()
        with suppress(FileNotFoundError, BlockingIOError):
            lock = _locked(path)
            if os.fstat(lock).st_nlink:
                return path, lock
            os.close(lock)


def _locked(path: Path) -> int:
    """Locks the directory's lock file; returns its descriptor. Raises BlockingIOError if another process holds it."""
    lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


FINGERPRINTS_DIRECTORY = ".fingerprints"


class Fingerprints:
    """Fingerprints by the inodes and times of a checkpoint's files, stored in a directory of the weight cache.

    A fingerprint is valid as long as no file is replaced or written to, which changes its inode or its times.
    """

    def __init__(self, cache_directory: Path) -> None:
        self._directory = cache_directory / FINGERPRINTS_DIRECTORY

    def of(self, source: "WeightSource", *prefixes: str) -> str:
        """Returns `source.fingerprint(*prefixes)`, from the cache if possible. Raises CheckpointError as that does."""
        identity = source.identity(*prefixes)
        if identity is None:
            return source.fingerprint(*prefixes)
        remembered = self._directory / identity
        with suppress(OSError, UnicodeDecodeError):
            fingerprint = remembered.read_text(encoding="ascii")
            if re.fullmatch(FINGERPRINT, fingerprint):
                return fingerprint
        fingerprint = source.fingerprint(*prefixes)
        # A fingerprint is not remembered if a file was written to while it was read.
        if source.identity(*prefixes) == identity:
            self._remember(remembered, fingerprint)
        return fingerprint

    def _remember(self, path: Path, fingerprint: str) -> None:
        # If this fails, as on a full disk or in a read-only cache, the bytes are read again next time, and also if a
        # kill leaves half a fingerprint, which does not match the pattern.
        with suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            path.write_text(fingerprint, encoding="ascii")
