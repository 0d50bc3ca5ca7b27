"""Converted weights on disk, found again by a key that says what they were made from."""

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from weights.cache.manifest import MANIFEST_FILE, damaged_files, is_complete, seal, sync
from weights.errors import CacheError
from weights.sizes import in_words

PREFIX = ".building-"

LOCK_FILE = "lock"


@contextmanager
def workspace(parent: Path) -> Iterator[Path]:
    """Makes a directory in `parent` that no other process touches, and removes it with all that is left in it.

    Raises OSError where it cannot be made or locked.
    """
    path, lock = _locked_directory(parent)
    try:
        yield path
    finally:
        # What cannot be removed now is removed by the next builder: an error here would hide the one before it.
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def remove_abandoned(parent: Path) -> None:
    """Removes the workspaces in `parent` whose builders are dead.

    Leaves alone what belongs to another user, and what another process is removing as well.
    """
    for path in parent.glob(PREFIX + "*"):
        with suppress(FileNotFoundError, PermissionError, BlockingIOError):
            lock = _locked(path)
            try:
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _locked_directory(parent: Path) -> tuple[Path, int]:
    """A new directory and the descriptor that holds its lock.

    Until the lock is held, another process may take the directory for abandoned and remove it: then try the next.
    """
    while True:
        path = parent / (PREFIX + secrets.token_hex(8))
        path.mkdir()
        with suppress(FileNotFoundError, BlockingIOError):
            lock = _locked(path)
            if os.fstat(lock).st_nlink:
                return path, lock
            os.close(lock)


def _locked(path: Path) -> int:
    """Locks the directory's lock file. Raises BlockingIOError where another process holds it."""
    lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


KEY_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")

PUBLISH_ATTEMPTS = 3


class WeightCache:
    """A directory of entries that are either complete or absent, shared by any number of processes.

    An entry is built in a directory beside its place and moved there by one rename. Of two processes that build the
    same entry at once, both then use the one that was moved first.
    """

    def __init__(self, directory: Path) -> None:
        """The directory is made when the first entry is built."""
        self.directory = directory

    def entry(self, key: str, build: Callable[[Path], None], expected_bytes: int = 0) -> Path:
        """The directory of the entry `key`, made by `build` where it is not there yet or is damaged.

        Every byte of an entry that is there is checked. `build` fills the empty directory it is given, with about
        `expected_bytes`; the name manifest.json is taken. Equal keys must stand for equal contents. Errors of the
        project's own that `build` raises pass through; raises CacheError where files cannot be written or read, and
        before anything is built where there is no room for `expected_bytes`.
        """
        entry = self._place(key)
        try:
            if damaged_files(entry):
                self._build(entry, build, expected_bytes)
            else:
                _note_use(entry)
        except OSError as error:
            raise CacheError(f"{_failure(entry)}: {error.strerror or error}.") from error
        except SafetensorError as error:
            raise CacheError(f"{_failure(entry)}: {error}.") from error
        return entry

    def holds(self, key: str) -> bool:
        """Whether there is an entry `key`, as far as its files' lengths tell. Raises CacheError."""
        entry = self._place(key)
        try:
            return is_complete(entry)
        except OSError as error:
            raise CacheError(f"Cannot read the weight cache at {entry}: {error.strerror or error}.") from error

    def free_bytes(self) -> int:
        """What can still be written on the disk that the cache is, or will be, on. Raises CacheError."""
        place = self.directory
        while not place.exists() and place != place.parent:
            place = place.parent
        try:
            return shutil.disk_usage(place).free
        except OSError as error:
            raise CacheError(f"Cannot read the disk of the weight cache at {place}: {error.strerror}.") from error

    def _place(self, key: str) -> Path:
        if not KEY_PATTERN.fullmatch(key):
            raise CacheError(f"{key!r} is no name for an entry of the weight cache at {self.directory}.")
        return self.directory / key

    def _build(self, entry: Path, build: Callable[[Path], None], expected_bytes: int) -> None:
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
            seal(draft)
            _publish(draft, entry)
        sync(self.directory)


def _failure(entry: Path) -> str:
    return f"Cannot fill the weight cache at {entry}; free space there, or choose another cache directory"


def _note_use(entry: Path) -> None:
    """The manifest's time of change is that of the last use; a cache that may only be read keeps no such record."""
    with suppress(OSError):
        os.utime(entry / MANIFEST_FILE)


def _publish(draft: Path, entry: Path) -> None:
    """Moves the draft to its place, unless a sound entry got there first; a damaged one is moved away."""
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
            # Reading it took time: another builder may have put a sound one in its place.
            if entry.stat().st_ino == found:
                entry.rename(draft.with_name(f"damaged-{attempt}"))
    raise CacheError(f"{entry} was damaged {PUBLISH_ATTEMPTS} times over while it was replaced; is the disk failing?")
