"""A file of records of one size, found by their keys, that outlives the process which writes it.

It begins with a header and a table, an entry for each record. An entry is cleared before its record is written, and
written after it, so a process that is killed in between leaves no entry of a record that is half there; all else that
can happen to a file shows in the checksum. Nothing is mapped into memory: a file that somebody else cuts short gives
short reads, and not the end of the process.
"""

import errno
import fcntl
import os
import re
import struct
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import TypeAlias

import structlog

KEY_BYTES = 16
"""Enough that no two blocks ever have the same key, as the scheduler's are digests that are collision-proof."""

NAME = re.compile(r"(?P<stage>layers-\d+-\d+-(?P<plan>[0-9a-z]+\.kv))\.(?P<number>\d+)")
"""The names of files that may be removed."""

SUFFIX = ".kv"
"""The end of a file's name but for its number."""

HEADER = struct.Struct("<8sQQ")
"""MAGIC, and the number and size of records."""

MAGIC = b"glkv\0\0\0\1"

ENTRY = struct.Struct(f"<{KEY_BYTES}sQII")
"""Key, stamp, checksum, and whether there is a record: entries with a greater stamp were used later."""

RECORDS_MAX = 1 << 20

STAMPS = 1 << 63
"""More than a file is used: an entry with such a stamp is damaged."""

log = structlog.get_logger()


Record: TypeAlias = bytes | memoryview


class RecordFile:
    """Keeps at most so many records; those that were used longest ago make room. One process at a time has it.

    No error of the file is raised once it is open: a record that cannot be read is not there, and one that cannot be
    written is not kept.
    """

    def __init__(self, path: Path, record_bytes: int, records: int) -> None:
        """Opens or makes the file; one with another header is emptied.

        Raises OSError, with EWOULDBLOCK where another process has it.
        """
        self._record_bytes = record_bytes
        self._records = records
        self._path = path
        self._places: OrderedDict[bytes, int] = OrderedDict()
        self._stamp = 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._is_full_disk_known = False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _check_place(self._file, path)
            self._free = self._read_table()
        except BaseException:
            os.close(self._file)
            raise

    def __contains__(self, key: bytes) -> bool:
        """Whether there is a record of the key; it may turn out to be damaged."""
        return key in self._places

    def __len__(self) -> int:
        """The number of records."""
        return len(self._places)

    @property
    def bytes_kept(self) -> int:
        """The bytes of all records."""
        return len(self._places) * self._record_bytes

    def keys(self) -> list[bytes]:
        """The keys of all records, those that were used longest ago first."""
        return list(self._places)

    def read(self, key: bytes) -> bytes | None:
        """Returns the record of a key; None where there is none, or none that is whole."""
        place = self._places.get(key)
        if place is None:
            return None
        try:
            entry = os.pread(self._file, ENTRY.size, self._entry_at(place))
            record = os.pread(self._file, self._record_bytes, self._record_at(place))
        except OSError:
            entry = record = b""
        if len(entry) < ENTRY.size or len(record) < self._record_bytes:
            self.forget(key)
            return None
        found, _, checksum, is_there = ENTRY.unpack(entry)
        if not is_there or found != key or checksum != _checksum(key, record):
            log.warning("a cached block is damaged, and will be computed again", file=str(self._path))
            self.forget(key)
            return None
        self._places.move_to_end(key)
        self._write_entry(place, key, checksum)
        return record

    def write(self, key: bytes, record: Record) -> bytes | None:
        """Keeps a record; returns the key of the one that made room for it, if any did."""
        evicted: bytes | None = None
        place = self._places.pop(key, None)
        is_empty = False
        if place is None:
            place = self._free.pop() if self._free else next(self._fresh, None)
            is_empty = place is not None
        if place is None and self._places:
            evicted, place = self._places.popitem(last=False)
        if place is None:
            return None
        try:
            if not is_empty:
                self._clear_entry(place)
            whole = os.pwrite(self._file, record, self._record_at(place)) == self._record_bytes
        except OSError as error:
            if error.errno == errno.ENOSPC and not self._is_full_disk_known:
                self._is_full_disk_known = True
                log.warning("no room is left for cached blocks", file=str(self._path), records=len(self._places))
            whole = False
        if whole and self._write_entry(place, key, _checksum(key, record)):
            self._places[key] = place
        # Else the place is left alone: it would only be tried again and again.
        return evicted

    def forget(self, key: bytes) -> None:
        """Drops the record of a key, if there is one."""
        place = self._places.pop(key, None)
        if place is not None:
            try:
                self._clear_entry(place)
            except OSError:
                return
            self._free.append(place)

    def close(self) -> None:
        """Gives the file to others."""
        os.close(self._file)

    def _read_table(self) -> list[int]:
        """Reads which records there are; returns the free places among them, to be taken from the end."""
        table_bytes = self._records * ENTRY.size
        header = HEADER.pack(MAGIC, self._records, self._record_bytes)
        if os.pread(self._file, HEADER.size, 0) != header:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, header, 0)
        table = os.pread(self._file, table_bytes, HEADER.size)
        used = len(table) // ENTRY.size
        # Places behind the end of the file were never written.
        self._fresh = iter(range(used, self._records))
        found = []
        free = []
        for place, (key, stamp, _, is_there) in enumerate(ENTRY.iter_unpack(table[: used * ENTRY.size])):
            if is_there and stamp < STAMPS:
                found.append((stamp, place, key))
            else:
                free.append(place)
        for stamp, place, key in sorted(found):
            self._places[key] = place
            self._stamp = stamp
        return free[::-1]

    def _write_entry(self, place: int, key: bytes, checksum: int) -> bool:
        self._stamp += 1
        entry = ENTRY.pack(key, self._stamp, checksum, 1)
        try:
            return os.pwrite(self._file, entry, self._entry_at(place)) == ENTRY.size
        except OSError:
            return False

    def _clear_entry(self, place: int) -> None:
        os.pwrite(self._file, bytes(ENTRY.size), self._entry_at(place))

    def _entry_at(self, place: int) -> int:
        return HEADER.size + place * ENTRY.size

    def _record_at(self, place: int) -> int:
        return HEADER.size + self._records * ENTRY.size + place * self._record_bytes


def _check_place(file: int, path: Path) -> None:
    """Raises BlockingIOError where another process has removed the file since it was opened."""
    if not path.exists() or path.stat().st_ino != os.fstat(file).st_ino:
        raise BlockingIOError(errno.EWOULDBLOCK, "another process removes it", str(path))


def remove_foreign(directory: Path, name: str, record_bytes: int, records: int, numbers: int) -> None:
    """Removes files that no process has open and that nobody will use: of other plans, and of this one in another size.

    Names are those of `Tiers.open`, with a number below `numbers` behind them; a plan's stages have names that differ
    before the last "-". Raises OSError where the directory cannot be read.
    """
    plan = name.rpartition("-")[2]
    header = HEADER.pack(MAGIC, records, record_bytes)
    for path in directory.iterdir():
        whose = NAME.fullmatch(path.name)
        if whose is None:
            continue
        if whose["stage"] == name:
            _remove(path, but=header if int(whose["number"]) < numbers else None)
        elif whose["plan"] != plan:
            _remove(path)


def _remove(path: Path, but: bytes | None = None) -> None:
    """Removes a file of records that begins in another way than `but`, unless a process has it."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        header = os.pread(file, HEADER.size, 0)
        if header != but and (not header or header.startswith(MAGIC)):
            path.unlink()
    except OSError:
        return
    finally:
        os.close(file)


def file_bytes(record_bytes: int, records: int) -> int:
    """The size of a file that is full."""
    return HEADER.size + records * (ENTRY.size + record_bytes)


def records_within(size: int, record_bytes: int) -> int:
    """How many records a file of `size` bytes has room for; a table of more than RECORDS_MAX takes long to read."""
    return min(max((size - HEADER.size) // (ENTRY.size + record_bytes), 0), RECORDS_MAX)


def _checksum(key: bytes, record: Record) -> int:
    return zlib.crc32(record, zlib.crc32(key))
