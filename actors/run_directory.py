"""The private directory of one pipeline: its sockets, its Ray's files, and the processes that were started for it."""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from actors.errors import ClusterError

PREFIX = "galaxyline-"
LOCK = "lock"

MEMORY = Path("/dev/shm")  # noqa: S108 # nosec B108 # private directories in it
"""The file system in memory."""

UNIX_PATH_MAX = 107
"""Bytes of a unix socket's path (unix(7): 108 with the final zero)."""

RAY = "ray"
"""What Ray gets as its temporary directory: it lets everybody write there, so it has to lie in one that is private."""

LONGEST_SOCKET = f"{RAY}/session_2026-11-29_21-57-12_123456_4194304/sockets/plasma_store"
"""The longest path that Ray makes, with the largest process id of 64-bit Linux."""

RANDOM_CHARACTERS = 8
"""What `tempfile.mkdtemp` adds to a prefix."""

PARENT_PATH_MAX = UNIX_PATH_MAX - len(f"/{PREFIX}{RANDOM_CHARACTERS * 'x'}/{LONGEST_SOCKET}")

END_SECONDS = 5.0
END_POLL_SECONDS = 0.02


class RunDirectory:
    """A directory that only this user may enter, locked as long as it is in use; made by `create` or `enter`.

    Processes that hold a file in it open for writing belong to it: those of a Ray that was started there write their
    logs to it. The processes that hold its lock are not among them.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @property
    def ray(self) -> Path:
        """Where a Ray that is started for the pipeline has its files."""
        return self.path / RAY

    @classmethod
    def create(cls) -> "RunDirectory":
        """Makes a directory whose sockets have short enough paths.

        Raises ClusterError where no directory for temporary files can be written.
        """
        for parent in _parents():
            with contextlib.suppress(OSError):
                while True:
                    directory = cls.enter(Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent)))
                    if directory.exists():
                        return directory
                    directory.leave()
        raise ClusterError(
            f"No directory for sockets can be made in {', '.join(map(str, _parents()))}: set TMPDIR to a directory "
            f"that can be written, with a path of at most {PARENT_PATH_MAX} bytes."
        )

    @classmethod
    def enter(cls, path: Path) -> "RunDirectory":
        """Takes part in the use of a directory that another process has made. Raises OSError where it is gone."""
        lock = _open_lock(path)
        fcntl.flock(lock, fcntl.LOCK_SH)
        return cls(path, lock)

    @classmethod
    def join(cls, path: Path) -> "RunDirectory":
        """Takes part in the use of a directory, and makes it where it is not there.

        Raises OSError, also for one that is another user's or a link.
        """
        while True:
            path.mkdir(mode=0o700, exist_ok=True)
            status = path.lstat()
            if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
                raise PermissionError(errno.EPERM, "it is another user's", str(path))
            with contextlib.suppress(FileNotFoundError):
                joined = cls.enter(path)
                if joined.exists():
                    return joined
                joined.leave()

    def exists(self) -> bool:
        """Whether it is still there: before it was locked, others may have taken it for abandoned."""
        return (self.path / LOCK).exists()

    @property
    def memory(self) -> Path:
        """The path of the directory in this host's memory that belongs to it: that of the KV cache's copies."""
        return MEMORY / f"{self.path.name}.kv"

    def end_processes(self) -> None:
        """Kills what was started in the directory, and waits until it is gone, but no longer than END_SECONDS.

        This process is not among them.
        """
        deadline = time.monotonic() + END_SECONDS
        while (left := _writers(self.path)) and time.monotonic() < deadline:
            for pid in left:
                _kill(pid)
            time.sleep(END_POLL_SECONDS)

    def remove(self) -> None:
        """Ends what was started in the directory, and removes it. May be repeated."""
        self.end_processes()
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.rmtree(self.memory, ignore_errors=True)
        self.leave()

    def leave(self) -> None:
        """Gives the lock back, and leaves the directory to others that use it. May be repeated."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_abandoned(parents: Iterable[Path] | None = None) -> None:
    """Removes directories of this user that nobody uses, with the processes in them: their servers were killed.

    They lie in `parents`, by default wherever such directories may be made.
    """
    for parent in _parents() if parents is None else parents:
        with contextlib.suppress(OSError):
            for path in parent.glob(f"{PREFIX}*"):
                remove_if_abandoned(path)


def remove_if_abandoned(path: Path) -> None:
    """Removes a directory of this user that nobody uses."""
    try:
        # A link in a directory that others can write could lead anywhere.
        if path.is_symlink() or path.stat().st_uid != os.geteuid():
            return
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return
    directory = RunDirectory(path, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        directory.leave()
    else:
        directory.remove()


def _open_lock(path: Path) -> int:
    return os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _parents() -> list[Path]:
    """The directories for temporary files in which sockets may lie, the user's choice first."""
    usual = [tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp", "/var/tmp", "/dev/shm"]  # noqa: S108 # nosec B108 # private ones in them
    return [Path(parent) for parent in dict.fromkeys(usual) if parent and len(os.fsencode(parent)) <= PARENT_PATH_MAX]


def _writers(directory: Path) -> list[int]:
    """The other processes that have a file in the directory open for writing, but for its lock."""
    prefix, lock = f"{directory}/", str(directory / LOCK)
    # proc(5): a path that was removed has this behind it.
    locks = {lock, f"{lock} (deleted)"}
    return [pid for pid in _others() if any(path.startswith(prefix) and path not in locks for path in _written(pid))]


def _others() -> Iterable[int]:
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return (pid for pid in pids if pid != os.getpid())


def _written(pid: int) -> Iterator[str]:
    """The paths of what a process has open for writing; none where it is gone or another user's."""
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            path = str(descriptor.readlink())
            if path.startswith("/") and _is_writable(Path(f"/proc/{pid}/fdinfo/{descriptor.name}")):
                yield path


def _is_writable(info: Path) -> bool:
    """Whether a descriptor was opened for writing, by the octal `flags` of proc_pid_fdinfo(5)."""
    flags = next(line.split()[1] for line in info.read_text(encoding="ascii").splitlines() if line.startswith("flags"))
    return bool(int(flags, 8) & (os.O_WRONLY | os.O_RDWR))


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
