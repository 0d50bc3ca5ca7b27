"""The tiers beside a stage's device: full blocks in the host's memory, and on its disk."""

import contextlib
import threading
import time
from collections import deque
from pathlib import Path

import structlog

from stages.kv.inventory import Inventory
from stages.kv.record_file import Record, RecordFile, records_within, remove_foreign
from stages.options import TierOptions

CHANGES_KEPT = 1 << 16
"""Changes after which whoever has not asked meanwhile gets all keys."""

QUEUED = 256
"""Blocks that wait to be written to the disk: further ones are not, as the disk does not keep up."""

OPEN_SECONDS = 5.0
"""How long a process that is killed may have its files: Ray takes some seconds for one that is stopped."""

OPEN_POLL_SECONDS = 0.05

log = structlog.get_logger()


class ChangeLog:
    """Which keys came and went lately, by versions that rise, from process to process too."""

    def __init__(self) -> None:
        self._version = time.time_ns()
        self._changes: deque[tuple[bytes, bool]] = deque(maxlen=CHANGES_KEPT)

    def note(self, key: bytes, *, is_there: bool) -> None:
        """Records that a key came, or went."""
        self._version += 1
        self._changes.append((key, is_there))

    @property
    def version(self) -> int:
        """The version now."""
        return self._version

    def since(self, version: int) -> dict[bytes, bool] | None:
        """Whether each key that changed since then is there now; None where that is not known any more."""
        count = self._version - version
        if not 0 <= count <= len(self._changes):
            return None
        return dict(list(self._changes)[len(self._changes) - count :]) if count else {}


class Tiers:
    """Keeps blocks in memory at once, and on disk in the background. Its methods may be called from any thread.

    Nobody waits for the disk but who reads or forgets a block there.
    """

    def __init__(self, host: RecordFile | None, disk: RecordFile | None) -> None:
        self._host = host
        self._disk = disk
        self._changes = ChangeLog()
        self._waiting: dict[bytes, Record] = {}
        self._is_closing = False
        # The disk's lock is held while records are read from it or written to it, and is taken before the other one.
        self._disk_lock = threading.Lock()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._writer: threading.Thread | None = None
        if disk is not None:
            self._writer = threading.Thread(target=self._write_to_disk, args=(disk,), name="kv-disk", daemon=True)
            self._writer.start()

    @classmethod
    def open(cls, options: TierOptions, name: str, record_bytes: int) -> "Tiers":
        """Opens the files of a stage, `name`; what cannot be opened is done without, and logged."""
        host = _open(options.host_directory, name, record_bytes, options.host_bytes or 0)
        disk = _open(options.disk_directory, name, record_bytes, options.disk_bytes, options.disk_sharers)
        return cls(host, disk)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept anywhere."""
        return self._host is None and self._disk is None

    def __contains__(self, key: bytes) -> bool:
        """Whether a tier has the block."""
        with self._lock:
            return self._has(key)

    def keep(self, key: bytes, record: Record) -> None:
        """Keeps a block in memory, and on disk soon."""
        with self._lock:
            self._keep_in_memory(key, record)
            if self._disk is not None and key not in self._disk and len(self._waiting) < QUEUED:
                self._waiting[key] = record
                self._work.notify()

    def fetch(self, key: bytes) -> bytes | None:
        """Returns a block from memory, or from disk, which puts it into memory too; None where neither has it."""
        with self._lock:
            record = None if self._host is None else self._host.read(key)
        if record is not None:
            return record
        with self._disk_lock:
            record = None if self._disk is None else self._disk.read(key)
            with self._lock:
                if record is not None:
                    self._keep_in_memory(key, record)
                self._note(key)
        return record

    def forget(self, key: bytes) -> None:
        """Drops a block everywhere."""
        with self._disk_lock, self._lock:
            self._waiting.pop(key, None)
            for tier in (self._host, self._disk):
                if tier is not None:
                    tier.forget(key)
            self._note(key)

    def inventory(self, version: int, model: str) -> Inventory:
        """Returns what changed since a version, or all where that is not known."""
        with self._lock:
            changes = self._changes.since(version)
            keys = self._keys() if changes is None else [key for key, is_there in changes.items() if is_there]
            return Inventory(
                version=self._changes.version,
                is_whole=changes is None,
                added=keys,
                removed=[key for key, is_there in (changes or {}).items() if not is_there],
                model=model,
                host_bytes=0 if self._host is None else self._host.bytes_kept,
                disk_bytes=0 if self._disk is None else self._disk.bytes_kept,
            )

    def close(self) -> None:
        """Ends the writing, without what still waits for it, and gives the files to others."""
        if self._writer is not None:
            with self._lock:
                self._is_closing = True
                self._work.notify()
            self._writer.join()
        for tier in (self._host, self._disk):
            if tier is not None:
                tier.close()

    def _keys(self) -> list[bytes]:
        host = [] if self._host is None else self._host.keys()
        disk = [] if self._disk is None else self._disk.keys()
        return list(dict.fromkeys([*host, *disk]))

    def _has(self, key: bytes) -> bool:
        return any(tier is not None and key in tier for tier in (self._host, self._disk))

    def _note(self, key: bytes) -> None:
        self._changes.note(key, is_there=self._has(key))

    def _keep_in_memory(self, key: bytes, record: Record) -> None:
        if self._host is not None:
            evicted = self._host.write(key, record)
            self._note(key)
            if evicted is not None:
                self._note(evicted)

    def _write_to_disk(self, disk: RecordFile) -> None:
        while True:
            with self._lock:
                self._work.wait_for(lambda: self._waiting or self._is_closing)
                if self._is_closing:
                    return
            with self._disk_lock:
                # Only now: what is forgotten up to here is not written.
                with self._lock:
                    key = next(iter(self._waiting), None)
                    record: Record = b"" if key is None else self._waiting.pop(key)
                if key is not None:
                    evicted = disk.write(key, record)
                    with self._lock:
                        self._note(key)
                        if evicted is not None:
                            self._note(evicted)


def _open(directory: str, name: str, record_bytes: int, size: int, numbers: int = 1) -> RecordFile | None:
    """Opens the first file of so many with the name that no other process has, or one that it gives back soon."""
    records = records_within(size, record_bytes) if record_bytes else 0
    if not directory or not records:
        return None
    deadline = time.monotonic() + OPEN_SECONDS
    cause: str | None = "other processes have all files for it"
    try:
        remove_foreign(Path(directory), name, record_bytes, records, numbers)
        while True:
            for number in range(numbers):
                with contextlib.suppress(BlockingIOError):
                    return RecordFile(Path(directory) / f"{name}.{number}", record_bytes, records)
            if time.monotonic() > deadline:
                break
            time.sleep(OPEN_POLL_SECONDS)
    except OSError as error:
        cause = error.strerror
    log.warning("blocks are not kept beside the device", directory=directory, cause=cause)
    return None
