"""What is in a weight cache, and how to be rid of it."""

from contextlib import suppress
from pathlib import Path

import msgspec

from weights.cache.cache import remove_abandoned, workspace
from weights.cache.cache_key import EntryName
from weights.cache.manifest import MANIFEST_FILE, damaged_files, is_complete
from weights.errors import CacheError


class CacheEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One entry: `bytes` on disk, last used at `used` (seconds since 1970), complete by its files' lengths or not.

    `name` is None for a directory that this version did not make.
    """

    path: Path
    name: EntryName | None
    bytes: int
    used: float
    is_complete: bool


def cache_entries(directory: Path) -> list[CacheEntry]:
    """All entries of a weight cache, by name; none where there is no such directory. Raises CacheError.

    What another process removes or replaces meanwhile may be left out.
    """
    try:
        paths = sorted(path for path in _within(directory) if path.is_dir() and not path.name.startswith("."))
        return [entry for path in paths if (entry := _entry(path)) is not None]
    except OSError as error:
        raise CacheError(f"Cannot read the weight cache at {directory}: {error.strerror or error}.") from error


def damage_of(entry: CacheEntry) -> list[str]:
    """The entry's files that are missing or changed; reads every byte. Raises CacheError."""
    try:
        return damaged_files(entry.path)
    except OSError as error:
        raise CacheError(f"Cannot read {entry.path}: {error.strerror or error}.") from error


def remove_entries(directory: Path, entries: list[CacheEntry]) -> None:
    """Removes entries, each at once by a rename, and what dead builders left. Raises CacheError.

    A stage that has loaded an entry keeps its files until it ends. Entries that are gone already are no error.
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
    """None where it is removed while it is looked at."""
    manifest = path / MANIFEST_FILE
    try:
        return CacheEntry(
            path=path,
            name=EntryName.parse(path.name),
            bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
            used=(manifest if manifest.exists() else path).stat().st_mtime,
            is_complete=is_complete(path),
        )
    except FileNotFoundError:
        return None
