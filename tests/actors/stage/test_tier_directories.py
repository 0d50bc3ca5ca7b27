"""The directories of a stage's tiers: who has them, how much they may hold, and when they go."""

import os
from collections import namedtuple
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from actors.run_directory import LOCK, RunDirectory
from actors.stage import tier_directories
from actors.stage.setup import StageIdentity, StageSetup
from actors.stage.tier_directories import FREE_SHARE, HOST_SHARE, SIZE, TierDirectories, default_host_bytes
from stages.options import CacheOptions, StageOptions, TierOptions
from stages.plan import StageSpec

MEBI = 1 << 20
FileSystem = namedtuple("FileSystem", ["f_bavail", "f_frsize"])


def setup(tiers: TierOptions, layers: int = 2, layers_on_host: int = 2) -> StageSetup:
    cache = CacheOptions(slots=1, pools=1, blocks=2, block_size=32, max_model_len=64)
    return StageSetup(
        identity=StageIdentity(
            index=0, stages=1, host="host-1", epoch=1, secret=b"", dtype="float32", bytes_per_token=4
        ),
        spec=StageSpec(index=0, stages=1, first_layer=0, end_layer=layers),
        options=StageOptions(model_path="", cache_dir="", dtype="float32", seed=0, cache=cache, tiers=tiers),
        device="embedded",
        runner="",
        rows=[0],
        neighbour=0,
        neighbours=1,
        layers_on_host=layers_on_host,
    )


def in_memory(path: Path, size: int | None = MEBI) -> TierOptions:
    return TierOptions(host_directory=str(path), host_bytes=size)


def test_whoever_leaves_last_removes_the_directory(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    first, second = (TierDirectories(setup(in_memory(path))) for _ in range(2))
    for each in (first, second):
        assert each.enter() == in_memory(path)
    assert path.stat().st_mode & 0o777 == 0o700
    (path / "layers.0").write_bytes(b"blocks")
    first.leave()
    first.leave()
    assert (path / "layers.0").exists()
    second.leave()
    assert not path.exists()


def test_a_directory_that_the_pipeline_holds_stays_for_the_stage_that_comes_next(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    pipeline = RunDirectory.join(path)
    stage = TierDirectories(setup(in_memory(path)))
    stage.enter()
    stage.leave()
    assert path.exists()
    pipeline.leave()
    again = TierDirectories(setup(in_memory(path)))
    again.enter()
    again.leave()
    assert not path.exists()


def test_what_killed_servers_left_beside_it_goes_and_what_others_use_stays(tmp_path: Path) -> None:
    used, left = (RunDirectory.join(tmp_path / f"galaxyline-{name}.kv") for name in ("used", "left"))
    left.leave()
    stage = TierDirectories(setup(in_memory(tmp_path / "galaxyline-own.kv")))
    stage.enter()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["galaxyline-own.kv", "galaxyline-used.kv"]
    stage.leave()
    used.leave()


def test_a_directory_of_another_user_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "memory"
    path.mkdir()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    stage = TierDirectories(setup(in_memory(path)))
    with capture_logs() as logs:
        assert stage.enter() == in_memory(path, 0)
    assert [(entry["directory"], entry["cause"]) for entry in logs] == [(str(path), "it is another user's")]
    stage.leave()
    assert list(path.iterdir()) == []


@pytest.mark.parametrize("target", ["precious", "missing"])
def test_a_link_is_not_followed(tmp_path: Path, target: str) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    path = tmp_path / "memory"
    path.symlink_to(tmp_path / target)
    stage = TierDirectories(setup(in_memory(path)))
    assert stage.enter() == in_memory(path, 0)
    stage.leave()
    assert [file.name for file in (tmp_path / "precious").iterdir()] == ["file"]
    assert not (tmp_path / "missing").exists()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.mkdir()
    (path / LOCK).symlink_to(tmp_path / "other")
    assert TierDirectories(setup(in_memory(path))).enter() == in_memory(path, 0)
    assert not (tmp_path / "other").exists()


def test_without_memory_no_directory_is_made(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    stage = TierDirectories(setup(in_memory(path, 0)))
    assert stage.enter().are_any is False
    stage.leave()
    assert not path.exists()


def test_stages_of_a_host_share_what_it_gives_by_their_layers(tmp_path: Path) -> None:
    disk = tmp_path / "disk" / "deep"
    tiers = msgspec.structs.replace(
        in_memory(tmp_path / "memory", 8 * MEBI), disk_directory=str(disk), disk_bytes=80 * MEBI
    )
    stage = TierDirectories(setup(tiers, layers=3, layers_on_host=8))
    own = stage.enter()
    assert (own.host_bytes, own.disk_bytes) == (3 * MEBI, 30 * MEBI)
    assert disk.stat().st_mode & 0o777 == 0o700
    stage.leave()
    assert disk.exists()


def test_a_disk_that_cannot_be_used_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tiers = TierOptions(host_bytes=0, disk_directory=str(tmp_path / "file" / "disk"), disk_bytes=MEBI)
    with capture_logs() as logs:
        assert TierDirectories(setup(tiers)).enter().disk_bytes == 0
    assert [entry["event"] for entry in logs] == ["blocks are not kept on disk"]


@pytest.fixture
def memory_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "pytest.MonkeyPatch":
    """Lets the machine have 1000 MiB, of which a control group may limit what processes use."""
    monkeypatch.setattr(tier_directories, "CGROUP_LIMIT", tmp_path / "memory.max")
    names = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000 * MEBI // 4096}
    monkeypatch.setattr(os, "sysconf", names.__getitem__)
    return monkeypatch


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Lets the file system in memory have so many bytes free."""
    monkeypatch.setattr(os, "statvfs", lambda _: FileSystem(size // 4096, 4096))


@pytest.mark.parametrize(
    ("limit", "in_file_system", "expected"),
    [
        (None, 1000 * MEBI, HOST_SHARE * 1000 * MEBI),
        ("max\n", 1000 * MEBI, HOST_SHARE * 1000 * MEBI),
        (f"{400 * MEBI}\n", 1000 * MEBI, HOST_SHARE * 400 * MEBI),
        (f"{4000 * MEBI}\n", 1000 * MEBI, HOST_SHARE * 1000 * MEBI),
        ("max\n", 64 * MEBI, FREE_SHARE * 64 * MEBI),
        ("max\n", 0, 0),
    ],
)
def test_the_default_is_a_share_of_memory_and_at_most_half_of_what_is_free(
    limit: str | None, in_file_system: int, expected: float, tmp_path: Path, memory_of: pytest.MonkeyPatch
) -> None:
    free(memory_of, in_file_system)
    if limit is not None:
        tier_directories.CGROUP_LIMIT.write_text(limit)
    assert default_host_bytes(tmp_path) == int(expected)


def test_the_default_stays_while_the_directory_fills(tmp_path: Path, memory_of: pytest.MonkeyPatch) -> None:
    """A stage that replaces another would begin its file anew if it were of another size."""
    path = tmp_path / "memory"
    free(memory_of, 64 * MEBI)
    first = TierDirectories(setup(in_memory(path, None)))
    assert first.enter().host_bytes == 32 * MEBI
    free(memory_of, 40 * MEBI)
    second = TierDirectories(setup(in_memory(path, None)))
    assert second.enter().host_bytes == 32 * MEBI
    assert sorted(file.name for file in path.iterdir()) == sorted([LOCK, SIZE])
    for each in (first, second):
        each.leave()
    third = TierDirectories(setup(in_memory(path, None)))
    assert third.enter().host_bytes == 20 * MEBI
    third.leave()
