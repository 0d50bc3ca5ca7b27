"""The manifest that makes an entry of the weight cache complete, and the check of its files against it."""

import mmap
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec
import xxhash

MANIFEST_FILE = "manifest.json"
DAMAGE_FILE = "damaged.json"
"""The names of an entry's files that a check found damaged, until it is converted again or found sound."""

MANIFEST_VERSION = 2
HASH_BYTES = 1 << 24
HASH_THREADS_MAX = 8


class FileRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file's length in bytes and the XXH3 128-bit hash of its bytes, which no failing disk will match by chance."""

    bytes: int
    xxh3: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The list of an entry's files by their paths in it; it is written last and makes the entry complete.

    `model` is the name of the model that it was converted from, for people: other models may have the same part.
    """

    version: int
    files: dict[str, FileRecord]
    model: str = ""


def write_manifest(entry: Path, model: str = "") -> None:
    """Syncs everything in the directory to the disk, then writes and syncs its manifest. Raises OSError."""
    paths = sorted(entry.rglob("*"))
    for path in paths:
        sync(path)
    files = [path for path in paths if path.is_file()]
    records = {str(path.relative_to(entry)): record for path, record in zip(files, _records(files), strict=True)}
    manifest = entry / MANIFEST_FILE
    manifest.write_bytes(msgspec.json.encode(Manifest(version=MANIFEST_VERSION, files=records, model=model)))
    sync(manifest)
    sync(entry)


def read_manifest(entry: Path) -> Manifest | None:
    """Reads the manifest of the directory; returns None if there is none of this version. Raises OSError."""
    try:
        manifest = msgspec.json.decode((entry / MANIFEST_FILE).read_bytes(), type=Manifest)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return manifest if manifest.version == MANIFEST_VERSION else None


def is_complete(entry: Path) -> bool:
    """Whether the directory has a manifest and every file in it, with the right length; no damage was found yet.

    Raises OSError.
    """
    manifest = read_manifest(entry)
    return (
        manifest is not None
        and all(_length(entry / name) == file.bytes for name, file in manifest.files.items())
        and not known_damage(entry)
    )


def known_damage(entry: Path) -> list[str]:
    """The files of the directory that the last check found damaged. Raises OSError."""
    try:
        return msgspec.json.decode((entry / DAMAGE_FILE).read_bytes(), type=list[str])
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (msgspec.DecodeError, UnicodeDecodeError):
        return [DAMAGE_FILE]


def note_damage(entry: Path, files: list[str]) -> None:
    """Keeps what a check found, for those who do not read every byte; a read-only cache keeps no such record."""
    with suppress(OSError):
        if files:
            (entry / DAMAGE_FILE).write_bytes(msgspec.json.encode(files))
        else:
            (entry / DAMAGE_FILE).unlink(missing_ok=True)


def damaged_files(entry: Path) -> list[str]:
    """The names of the files that are missing or differ from the manifest; the manifest's own name if there is none.

    Reads every byte once. Raises OSError.
    """
    manifest = read_manifest(entry)
    if manifest is None:
        return [MANIFEST_FILE]
    damaged = [name for name, file in manifest.files.items() if _length(entry / name) != file.bytes]
    if damaged:
        return damaged
    found = _records(entry / name for name in manifest.files)
    return [name for (name, file), now in zip(manifest.files.items(), found, strict=True) if now != file]


def sync(path: Path) -> None:
    """Waits until a file or directory is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _records(paths: Iterable[Path]) -> list[FileRecord]:
    with ThreadPoolExecutor(min(HASH_THREADS_MAX, os.cpu_count() or 1)) as threads:
        return list(threads.map(_record, paths))


def _record(path: Path) -> FileRecord:
    size = path.stat().st_size
    digest = xxhash.xxh3_128()
    # The file is mapped, so that its bytes are read into the pages that loading will map.
    if size:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            for begin in range(0, size, HASH_BYTES):
                digest.update(view[begin : begin + HASH_BYTES])
            view.release()
    return FileRecord(bytes=size, xxh3=digest.hexdigest())


def _length(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None
