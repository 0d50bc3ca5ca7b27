"""Entries of the weight cache are complete or absent, whatever process dies or comes first, and however disks fail."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.disks import files_of_at_most
from weights.cache import cache as cache_module
from weights.cache.cache import WeightCache
from weights.cache.manifest import damaged_files
from weights.errors import CacheError, CheckpointError

CONTENT = {"part.bin": b"weights", "layer/more.bin": b"", "layer/deep/last.bin": bytes(100_000)}


def build(directory: Path) -> None:
    for name, content in CONTENT.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


def must_not_build(directory: Path) -> None:
    raise AssertionError(f"built {directory} though it is in the cache")


def contents(entry: Path) -> dict[str, bytes]:
    """All files of an entry but the manifest."""
    files = (path for path in entry.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(entry)): path.read_bytes() for path in files}


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def test_an_entry_is_built_once_and_found_again(tmp_path: Path) -> None:
    directory = tmp_path / "not" / "there" / "yet"
    entry = WeightCache(directory).entry("key", build)
    assert entry == directory / "key"
    assert contents(entry) == CONTENT
    assert WeightCache(directory).entry("key", must_not_build) == entry
    assert names(directory) == ["key"]


def test_keys_have_entries_of_their_own(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)
    first = cache.entry("first", build)
    second = cache.entry("second", lambda directory: save_file({"a": torch.ones(3)}, directory / "a.safetensors"))
    assert contents(first) == CONTENT
    assert torch.equal(load_file(second / "a.safetensors")["a"], torch.ones(3))


@pytest.mark.parametrize("key", ["", ".", "..", ".hidden", "a/b", "../up", "a b", "n" * 201, "a\0"])
def test_a_key_that_is_no_file_name_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(CacheError, match="is not a valid key of the weight cache at"):
        WeightCache(tmp_path).entry(key, build)
    assert names(tmp_path) == []


def test_a_build_that_fails_leaves_nothing_and_passes_its_error_on(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        build(directory)
        raise CheckpointError("The checkpoint is bad.")

    with pytest.raises(CheckpointError, match="The checkpoint is bad"):
        WeightCache(tmp_path).entry("key", fail)
    assert names(tmp_path) == []


def damage_by_truncation(entry: Path) -> None:
    os.truncate(entry / "layer/deep/last.bin", 99_999)


def damage_by_removal(entry: Path) -> None:
    (entry / "part.bin").unlink()


def damage_of_one_bit(entry: Path) -> None:
    file = entry / "layer/deep/last.bin"
    file.write_bytes(bytes(50_000) + b"\x01" + bytes(49_999))


def damage_of_manifest(entry: Path) -> None:
    os.truncate(entry / "manifest.json", 20)


def manifest_of_another_version(entry: Path) -> None:
    manifest = entry / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version":2', '"version":1'))


def no_manifest(entry: Path) -> None:
    (entry / "manifest.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_by_truncation,
        damage_by_removal,
        damage_of_one_bit,
        damage_of_manifest,
        manifest_of_another_version,
        no_manifest,
    ],
)
def test_a_damaged_entry_is_built_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    cache = WeightCache(tmp_path)
    damage(cache.entry("key", build))
    with pytest.raises(AssertionError, match="built"):
        cache.entry("key", must_not_build)
    entry = cache.entry("key", build)
    assert contents(entry) == CONTENT
    assert names(tmp_path) == ["key"]
    cache.entry("key", must_not_build)


def test_a_use_is_noted(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)
    manifest = cache.entry("key", build) / "manifest.json"
    os.utime(manifest, (1e9, 1e9))
    assert cache.holds("key")
    assert manifest.stat().st_mtime == 1e9
    cache.entry("key", must_not_build)
    assert manifest.stat().st_mtime > 1e9


# Other processes

BUILDER = """
import sys
from pathlib import Path
from weights.cache.cache import WeightCache

def build(directory: Path) -> None:
    (directory / "half.bin").write_bytes(bytes(1000))
    print("building", flush=True)
    sys.stdin.readline()
    (directory / "part.bin").write_bytes(b"of the other process")

print(WeightCache(Path(sys.argv[1])).entry("key", build), flush=True)
"""


@contextmanager
def builder(cache: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of building the entry "key", which continues after a line on its stdin."""
    command = [sys.executable, "-c", BUILDER, str(cache)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "building\n"
            yield process
        finally:
            process.kill()


def test_a_builder_that_is_killed_leaves_no_entry_and_its_leftovers_go(tmp_path: Path) -> None:
    with builder(tmp_path) as process:
        process.kill()
        process.wait(timeout=60)
    [leftover] = names(tmp_path)
    assert leftover.startswith(".building-")
    assert [path.name for path in (tmp_path / leftover).rglob("half.bin")] == ["half.bin"]
    entry = WeightCache(tmp_path).entry("key", build)
    assert contents(entry) == CONTENT
    assert names(tmp_path) == ["key"]


def test_of_two_builders_at_once_both_use_the_first_ones_entry(tmp_path: Path) -> None:
    with builder(tmp_path) as process:
        entry = WeightCache(tmp_path).entry("key", build)
        assert len(names(tmp_path)) == 2, "the workspace of a living builder is left alone"
        output, _ = process.communicate("\n", timeout=60)
        assert process.returncode == 0
    assert output == f"{entry}\n"
    assert contents(entry) == CONTENT
    assert names(tmp_path) == ["key"]


def test_many_builders_that_end_at_the_same_moment_agree(tmp_path: Path) -> None:
    together = Barrier(4, timeout=60)

    def build_one(builder: int) -> Path:
        def build_own(directory: Path) -> None:
            (directory / "part.bin").write_text(str(builder))
            together.wait()

        return WeightCache(tmp_path).entry("key", build_own)

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(build_one, range(4))) == {tmp_path / "key"}
    assert contents(tmp_path / "key")["part.bin"] in {b"0", b"1", b"2", b"3"}
    assert names(tmp_path) == ["key"]


def test_a_sound_entry_that_came_while_a_damaged_one_was_read_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = WeightCache(tmp_path)
    entry = cache.entry("key", build)
    damage_of_one_bit(entry)
    inodes = []

    def building(directory: Path) -> None:
        build(directory)
        monkeypatch.setattr(cache_module, "damaged_files", read_slowly)

    def read_slowly(path: Path) -> list[str]:
        """Reads the entry, which another process replaces meanwhile."""
        found = damaged_files(path)
        monkeypatch.setattr(cache_module, "damaged_files", damaged_files)
        WeightCache(tmp_path).entry("key", build)
        inodes.append(entry.stat().st_ino)
        return found

    assert cache.entry("key", building) == entry
    assert inodes == [entry.stat().st_ino]
    assert contents(entry) == CONTENT
    assert names(tmp_path) == ["key"]


# Disks that fail


def sentence(directory: Path, reason: str) -> str:
    return (
        f"Cannot fill the weight cache at {directory / 'key'}; free space there, or choose another cache directory: "
        f"{reason}."
    )


def test_a_cache_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError) as refusal:
        WeightCache(tmp_path / "file").entry("key", build)
    assert str(refusal.value) == sentence(tmp_path / "file", "File exists")


def test_a_file_in_the_place_of_an_entry_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").touch()
    with pytest.raises(CacheError) as refusal:
        WeightCache(tmp_path).entry("key", build)
    assert str(refusal.value) == sentence(tmp_path, "Not a directory")
    assert names(tmp_path) == ["key"]


def test_a_file_system_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(CacheError, match=r"Cannot fill the weight cache at /proc/1/weights/key; free space there"):
        WeightCache(Path("/proc/1/weights")).entry("key", build)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    def fill(directory: Path) -> None:
        build(directory)
        Path("/dev/full").write_bytes(b"more")

    with pytest.raises(CacheError) as refusal:
        WeightCache(tmp_path).entry("key", fill)
    assert str(refusal.value) == sentence(tmp_path, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


def test_what_does_not_fit_the_disk_is_refused_before_it_is_built(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"it takes about 4096\.0 TiB, and .* are left\."):
        WeightCache(tmp_path).entry("key", must_not_build, expected_bytes=1 << 52)
    assert names(tmp_path) == []


def test_safetensors_failure_to_write_is_told_too(tmp_path: Path) -> None:
    with files_of_at_most(1000), pytest.raises(CacheError, match=r"Cannot fill .*File too large"):
        WeightCache(tmp_path).entry("key", lambda path: save_file({"a": torch.ones(999)}, path / "a.safetensors"))
    assert names(tmp_path) == []


def test_the_manifest_itself_can_fail(tmp_path: Path) -> None:
    with files_of_at_most(10), pytest.raises(CacheError) as refusal:
        WeightCache(tmp_path).entry("key", lambda path: (path / "a.bin").touch())
    assert str(refusal.value) == sentence(tmp_path, os.strerror(errno.EFBIG))
    assert names(tmp_path) == []
