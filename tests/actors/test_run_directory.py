"""The private directory of a pipeline: who may enter it, where it lies, and what ends with it."""

import fcntl
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.errors import ClusterError
from actors.run_directory import LOCK, LONGEST_SOCKET, UNIX_PATH_MAX, RunDirectory, remove_abandoned

SECONDS = 30


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only directory for temporary files that there is, with a short path."""
    made = Path(tempfile.mkdtemp(prefix="gl-", dir="/tmp"))
    monkeypatch.setattr("actors.run_directory._parents", lambda: [made])
    yield made
    shutil.rmtree(made, ignore_errors=True)


def writer(path: Path) -> "subprocess.Popen[bytes]":
    """A process that has a file open for writing."""
    with path.open("wb") as file:
        return subprocess.Popen(["sleep", "1000"], stdout=file, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_it_is_private_and_goes_with_all_that_writes_in_it(parent: Path) -> None:
    directory = RunDirectory.create()
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    directory.ray.mkdir()
    inside = writer(directory.ray / "log")
    outside = writer(parent / "log")
    reader = subprocess.Popen(["tail", "-f", str(directory.ray / "log")], stdout=subprocess.DEVNULL)
    try:
        directory.remove()
        assert inside.wait(SECONDS) < 0
        assert not directory.path.exists()
        assert (outside.poll(), reader.poll()) == (None, None)
    finally:
        for process in (inside, outside, reader):
            process.kill()
            process.wait(SECONDS)


def test_who_uses_it_lives_however_often_others_remove_it(parent: Path) -> None:
    directory = RunDirectory.create()
    user = writer(directory.path / LOCK)
    try:
        directory.remove()
        assert not directory.path.exists()
        directory.remove()
        assert user.poll() is None
    finally:
        user.kill()
        user.wait(SECONDS)


def test_sockets_have_room_however_long_the_users_own_directory_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    directory = RunDirectory.create()
    try:
        assert long not in directory.path.parents
        assert len(os.fsencode(directory.path / LONGEST_SOCKET)) <= UNIX_PATH_MAX
    finally:
        directory.remove()


def test_that_no_directory_can_be_written_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("actors.run_directory._parents", lambda: [tmp_path / "missing"])
    with pytest.raises(ClusterError, match=r"No directory for sockets can be made in .*missing: set TMPDIR to"):
        RunDirectory.create()


def test_directories_of_servers_that_were_killed_are_removed_and_no_others(parent: Path) -> None:
    used, shared, abandoned, foreign = (RunDirectory.create() for _ in range(4))
    also = RunDirectory.enter(shared.path)
    shared.leave()
    left = writer(abandoned.path / "log")
    abandoned.leave()
    foreign.leave()
    (foreign.path / LOCK).unlink()
    link = parent / "galaxyline-link"
    link.symlink_to(parent)
    try:
        remove_abandoned()
        assert left.wait(SECONDS) < 0
        assert [path for path in (used.path, shared.path, foreign.path, link) if path.exists()] == [
            used.path,
            shared.path,
            foreign.path,
            link,
        ]
        assert not abandoned.path.exists()
    finally:
        left.kill()
        used.remove()
        also.remove()


def test_one_that_is_taken_for_abandoned_before_it_is_locked_is_made_again(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks: list[int] = []

    def lock_late(descriptor: int, operation: int) -> None:
        if not locks:
            locks.append(descriptor)
            remove_abandoned()
        lock(descriptor, operation)

    lock = fcntl.flock
    monkeypatch.setattr("actors.run_directory.fcntl.flock", lock_late)
    directory = RunDirectory.create()
    assert locks
    assert directory.exists()
    assert list(parent.iterdir()) == [directory.path]
    directory.remove()


def test_its_directory_in_memory_goes_with_it(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = parent / "memory"
    memory.mkdir()
    monkeypatch.setattr("actors.run_directory.MEMORY", memory)
    first, second = RunDirectory.create(), RunDirectory.create()
    for directory in (first, second):
        joined = RunDirectory.join(directory.memory)
        assert stat.S_IMODE(directory.memory.stat().st_mode) == 0o700
        (directory.memory / "layers.0").touch()
        joined.leave()
    assert first.memory.parent == memory
    first.remove()
    first.remove()
    assert list(memory.iterdir()) == [second.memory]
    second.remove()
    assert list(memory.iterdir()) == []


def test_directories_in_memory_that_nobody_uses_are_removed(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.run_directory.MEMORY", parent)
    server, killed = RunDirectory.create(), RunDirectory.create()
    # On another host the directory in memory is all that there is of a pipeline.
    used, left = (RunDirectory.join(parent / f"galaxyline-{name}.kv") for name in ("used", "left"))
    RunDirectory.join(killed.memory).leave()
    killed.leave()
    left.leave()
    remove_abandoned()
    assert sorted(parent.iterdir()) == sorted([server.path, used.path])
    used.remove()
    server.remove()
