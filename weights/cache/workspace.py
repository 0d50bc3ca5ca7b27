"""Directories in which cache entries are built, each held by a lock that dies with its builder."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
