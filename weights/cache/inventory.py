"""The inventory of a weight cache: listing, checking and removing its entries."""

from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from weights.cache.cache import remove_abandoned, workspace
from weights.cache.cache_key import CacheKey
from weights.cache.manifest import (
    MANIFEST_FILE,
    damaged_files,
    is_complete,
    known_damage,
    note_damage,
    read_manifest,
)
from weights.errors import CacheError


class CacheEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of a weight cache.

    It has `bytes` on disk, was last used at `used` (seconds since 1970), and is "complete" if its files have the right
    lengths, and "damaged" if the last check found that. `key` is None for a directory that this version did not create,
    `model` the name of the model that it was converted from, empty where that is not known.
    """

    path: Path
    key: CacheKey | None
    bytes: int
    used: float
    state: Literal["complete", "incomplete", "damaged"]
    model: str = ""


def cache_entries(directory: Path) -> list[CacheEntry]:
    """All entries of a weight cache by name; none if the directory does not exist. Raises CacheError.

    Entries that another process removes or replaces meanwhile may be left out.
    """
    try:
        paths = sorted(path for path in _within(directory) if path.is_dir() and not path.name.startswith("."))
        return [entry for path in paths if (entry := _entry(path)) is not None]
    except OSError as error:
        raise CacheError(f"Cannot read the weight cache at {directory}: {error.strerror or error}.") from error


def damage_of(entry: CacheEntry) -> list[str]:
    """The names of the entry's files that are missing or changed, which is kept for `CacheEntry.state`.

    Reads every byte. Raises CacheError.
    """
    try:
        files = damaged_files(entry.path)
    except OSError as error:
        raise CacheError(f"Cannot read {entry.path}: {error.strerror or error}.") from error
    note_damage(entry.path, files)
    return files


def remove_entries(directory: Path, entries: list[CacheEntry]) -> None:
    """Removes entries, each by one rename, and the workspaces of dead builders. Raises CacheError.

    A stage that has loaded an entry keeps its files until it ends. Entries that are gone already are ignored.
    """
    try:
        remove_abandoned(directory)
        with workspace(directory) as space:
            for number, entry in enumerate(entries):
                with suppress(FileNotFoundError):
                    entry.path.rename(space / str(number))
    except OSError as error:
        raise CacheError(f"Cannot prune the weight cache at {directory}: {error.strerror or error}.") from error


def _within(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


def _entry(path: Path) -> CacheEntry | None:
    """Reads an entry; returns None if it is removed meanwhile."""
    file = path / MANIFEST_FILE
    try:
        manifest = read_manifest(path)
        return CacheEntry(
            path=path,
            key=CacheKey.parse(path.name),
            bytes=sum(part.stat().st_size for part in path.rglob("*") if part.is_file()),
            used=(file if file.exists() else path).stat().st_mtime,
            state="complete" if is_complete(path) else "damaged" if known_damage(path) else "incomplete",
            model="" if manifest is None else manifest.model,
        )
    except FileNotFoundError:
        return None
