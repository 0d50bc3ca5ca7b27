"""The tiers beside a device: what they keep, what they tell of it, and a disk that is slower than the stage."""

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from stages.kv.record_file import Record, RecordFile, file_bytes
from stages.kv.tiers import CHANGES_KEPT, ChangeLog, Tiers
from stages.options import TierOptions
from tests.support.stage_driver import key_of

RECORD = 64
SECONDS = 30
MODEL = "weights"


def record_of(number: int) -> bytes:
    return bytes([number]) * RECORD


class GatedFile(RecordFile):
    """A file whose writes wait at a gate, as those of a disk may, and that says when it comes to one."""

    def __init__(self, path: Path, records: int) -> None:
        super().__init__(path, RECORD, records)
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        self.written = threading.Semaphore(0)

    def write(self, key: bytes, record: Record) -> bytes | None:
        self.begun.release()
        assert self.gate.wait(SECONDS)
        evicted = super().write(key, record)
        self.written.release()
        return evicted


MakeTiers = Callable[[int | None, int | None], Tiers]


@pytest.fixture
def tiers_of(tmp_path: Path) -> Iterator[MakeTiers]:
    """Makes tiers of so many records in memory and on disk, which are closed at the end."""
    made: list[Tiers] = []

    def make(host: int | None, disk: int | None) -> Tiers:
        files = [
            None if records is None else RecordFile(tmp_path / name, RECORD, records)
            for name, records in (("host", host), ("disk", disk))
        ]
        made.append(Tiers(*files))
        return made[-1]

    yield make
    for tiers in made:
        tiers.close()


@pytest.fixture
def slow_disk(tmp_path: Path) -> Iterator[GatedFile]:
    """A disk that is let go at the end."""
    disk = GatedFile(tmp_path / "slow", 8)
    yield disk
    disk.gate.set()


def keys_of(tiers: Tiers) -> set[bytes]:
    whole = tiers.inventory(0, MODEL)
    assert whole.is_whole
    assert not whole.removed
    return set(whole.added)


def test_without_tiers_nothing_is_kept(tiers_of: MakeTiers) -> None:
    tiers = tiers_of(None, None)
    assert tiers.is_empty
    tiers.keep(key_of(1), record_of(1))
    assert key_of(1) not in tiers
    assert tiers.fetch(key_of(1)) is None
    tiers.forget(key_of(1))
    assert keys_of(tiers) == set()


def test_a_block_is_kept_in_memory_at_once_and_makes_room_for_others(tiers_of: MakeTiers) -> None:
    tiers = tiers_of(2, None)
    for number in (1, 2):
        tiers.keep(key_of(number), record_of(number))
    assert tiers.fetch(key_of(1)) == record_of(1)
    tiers.keep(key_of(3), record_of(3))
    assert keys_of(tiers) == {key_of(1), key_of(3)}
    assert tiers.fetch(key_of(2)) is None
    inventory = tiers.inventory(0, MODEL)
    assert (inventory.model, inventory.host_bytes, inventory.disk_bytes) == (MODEL, 2 * RECORD, 0)


def test_nobody_waits_for_a_disk_that_is_slow(tmp_path: Path, slow_disk: GatedFile) -> None:
    host = RecordFile(tmp_path / "host", RECORD, 1)
    with closing(Tiers(host, slow_disk)) as tiers:
        for number in (1, 2, 3):
            tiers.keep(key_of(number), record_of(number))
        assert slow_disk.begun.acquire(timeout=SECONDS)
        # The disk is in the midst of writing, and memory has room for one.
        assert keys_of(tiers) == {key_of(3)}
        assert key_of(1) not in tiers
        assert tiers.fetch(key_of(3)) == record_of(3)
        slow_disk.gate.set()
        for _ in range(3):
            assert slow_disk.written.acquire(timeout=SECONDS)
        # It comes back into memory, where it takes the place of the other.
        assert tiers.fetch(key_of(1)) == record_of(1)
        assert host.keys() == [key_of(1)]
        assert keys_of(tiers) == {key_of(number) for number in (1, 2, 3)}


def test_what_is_forgotten_before_it_is_written_stays_away(tmp_path: Path, slow_disk: GatedFile) -> None:
    with closing(Tiers(None, slow_disk)) as tiers:
        for number in (1, 2, 3):
            tiers.keep(key_of(number), record_of(number))
        assert slow_disk.begun.acquire(timeout=SECONDS)
        # The first is being written: it is waited for. The second still waits.
        first, second = (threading.Thread(target=tiers.forget, args=(key_of(number),)) for number in (1, 2))
        for forgetting in (first, second):
            forgetting.start()
        slow_disk.gate.set()
        for forgetting in (first, second):
            forgetting.join(SECONDS)
            assert not forgetting.is_alive()
        while key_of(3) not in tiers:
            assert slow_disk.written.acquire(timeout=SECONDS)
        assert slow_disk.keys() == [key_of(3)]
    with closing(RecordFile(tmp_path / "slow", RECORD, 8)) as again:
        assert again.keys() == [key_of(3)]


def test_a_forgotten_block_that_waits_is_not_written(tmp_path: Path, slow_disk: GatedFile) -> None:
    tiers = Tiers(RecordFile(tmp_path / "host", RECORD, 4), slow_disk)
    tiers._disk_lock.acquire()
    tiers.keep(key_of(1), record_of(1))
    tiers.keep(key_of(2), record_of(2))
    # As forget does, which has the disk by now.
    tiers._waiting.pop(key_of(1))
    tiers._disk_lock.release()
    slow_disk.gate.set()
    assert slow_disk.written.acquire(timeout=SECONDS)
    tiers.close()
    with closing(RecordFile(tmp_path / "slow", RECORD, 8)) as again:
        assert again.keys() == [key_of(2)]


def test_close_leaves_what_waits_and_gives_the_files_away(tmp_path: Path, slow_disk: GatedFile) -> None:
    tiers = Tiers(RecordFile(tmp_path / "host", RECORD, 4), slow_disk)
    for number in range(4):
        tiers.keep(key_of(number), record_of(number))
    assert slow_disk.begun.acquire(timeout=SECONDS)
    closer = threading.Thread(target=tiers.close)
    closer.start()
    while not tiers._is_closing:
        closer.join(0.001)
    slow_disk.gate.set()
    closer.join(SECONDS)
    assert not closer.is_alive()
    with (
        closing(RecordFile(tmp_path / "slow", RECORD, 8)) as disk,
        closing(RecordFile(tmp_path / "host", RECORD, 4)) as host,
    ):
        assert disk.keys() == [key_of(0)]
        assert len(host) == 4


def options_in(folder: Path, records: int) -> TierOptions:
    return TierOptions(host_directory=str(folder), host_bytes=file_bytes(RECORD, records))


def test_files_outlive_who_wrote_them(tmp_path: Path) -> None:
    options = TierOptions(
        host_directory=str(tmp_path / "host"),
        host_bytes=file_bytes(RECORD, 4),
        disk_directory=str(tmp_path / "disk"),
        disk_bytes=file_bytes(RECORD, 8),
    )
    for name in ("host", "disk"):
        (tmp_path / name).mkdir()
    first = Tiers.open(options, "layers", RECORD)
    for number in range(3):
        first.keep(key_of(number), record_of(number))
    before = first.inventory(0, MODEL)
    first.close()
    with closing(Tiers.open(options, "layers", RECORD)) as second:
        assert {key_of(number) for number in range(3)} == keys_of(second)
        assert second.fetch(key_of(1)) == record_of(1)
        # The versions of another process mean nothing to it.
        assert second.inventory(before.version, MODEL).is_whole


def test_processes_that_share_a_directory_have_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.kv.tiers.OPEN_SECONDS", 0.1)
    options = TierOptions(disk_directory=str(tmp_path), disk_bytes=file_bytes(RECORD, 4), disk_sharers=2)
    opened = [Tiers.open(options, "layers", RECORD) for _ in range(3)]
    for number, tiers in enumerate(opened):
        tiers.keep(key_of(number), record_of(number))
    assert [tiers.is_empty for tiers in opened] == [False, False, True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layers.0", "layers.1"]
    assert opened[-1].is_empty
    for tiers in opened:
        tiers.close()


def test_a_directory_that_is_not_there_is_done_without(tmp_path: Path) -> None:
    with closing(Tiers.open(options_in(tmp_path / "gone", 4), "layers", RECORD)) as tiers:
        assert tiers.is_empty
    with closing(Tiers.open(options_in(tmp_path, 4), "no-layers", 0)) as tiers:
        assert tiers.is_empty
    with closing(Tiers.open(options_in(tmp_path, 0), "no-room", RECORD)) as tiers:
        assert tiers.is_empty


def test_a_version_that_is_too_old_or_of_nobody_gives_all() -> None:
    log = ChangeLog()
    oldest = log.version
    for number in range(CHANGES_KEPT):
        log.note(key_of(number), is_there=True)
    assert log.since(log.version) == {}
    assert log.since(log.version + 1) is None
    assert len(log.since(oldest) or {}) == CHANGES_KEPT
    log.note(key_of(0), is_there=False)
    assert log.since(oldest) is None
    assert (log.since(oldest + 1) or {})[key_of(0)] is False


class InventoryMachine(RuleBasedStateMachine):
    """Several that ask now and then: whoever adds up the changes has the keys that all together are."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()

    @initialize(host=st.integers(1, 3), has_disk=st.booleans())
    def open(self, host: int, has_disk: bool) -> None:
        folder = Path(self.folder.name)
        self.disk = RecordFile(folder / "disk", RECORD, 4) if has_disk else None
        self.tiers = Tiers(RecordFile(folder / "host", RECORD, host), self.disk)
        self.known: list[set[bytes]] = [set(), set()]
        self.versions = [0, 0]

    def teardown(self) -> None:
        self.tiers.close()
        self.folder.cleanup()

    @rule(number=st.integers(0, 7))
    def keep(self, number: int) -> None:
        self.tiers.keep(key_of(number), record_of(number))
        assert key_of(number) in self.tiers

    @rule(number=st.integers(0, 7))
    def fetch(self, number: int) -> None:
        assert self.tiers.fetch(key_of(number)) in {None, record_of(number)}

    @rule(number=st.integers(0, 7))
    def forget(self, number: int) -> None:
        self.tiers.forget(key_of(number))
        assert key_of(number) not in self.tiers

    @rule(name=st.sampled_from(["host", "disk"]), at=st.integers(0, 300))
    def damage(self, name: str, at: int) -> None:
        path = Path(self.folder.name) / name
        if path.exists():
            with path.open("r+b") as file:
                file.seek(at)
                file.write(b"\xff" * 30)

    @rule(asks=st.integers(0, 1))
    def ask(self, asks: int) -> None:
        inventory = self.tiers.inventory(self.versions[asks], MODEL)
        assert inventory.is_whole is (self.versions[asks] == 0)
        if inventory.is_whole:
            self.known[asks] = set()
        self.known[asks] |= set(inventory.added)
        self.known[asks] -= set(inventory.removed)
        self.versions[asks] = inventory.version
        assert not set(inventory.added) & set(inventory.removed)

    @invariant()
    def changes_add_up(self) -> None:
        for asks in (0, 1):
            if self.versions[asks] == 0:
                continue
            # Nothing comes to the disk between the two answers.
            with self.tiers._disk_lock:
                self.ask(asks)
                whole = self.tiers.inventory(0, MODEL)
            assert self.known[asks] == set(whole.added)


InventoryMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
TestInventory = InventoryMachine.TestCase


def test_files_of_other_plans_and_sizes_go_unless_a_process_has_them(tmp_path: Path) -> None:
    names = ["layers-0-3-aaaa.kv.0", "layers-3-6-aaaa.kv.0", "layers-0-3-bbbb.kv.0", "layers-0-6-cccc.kv.0", "key"]
    mine = ["my-thesis.kv.docx", "layers-0-3-bbbb.kv.md", "layers-0-3-dddd.kv.0"]
    for name in mine:
        (tmp_path / name).write_text("not blocks at all, but what somebody wrote")
    for name in names:
        with closing(RecordFile(tmp_path / name, RECORD, 8)):
            pass
    with closing(RecordFile(tmp_path / "layers-0-3-aaaa.kv.1", RECORD, 8)):
        pass
    options = TierOptions(disk_directory=str(tmp_path), disk_bytes=file_bytes(RECORD, 8))
    with closing(RecordFile(tmp_path / "layers-0-6-cccc.kv.0", RECORD, 8)):
        Tiers.open(options, "layers-0-3-aaaa.kv", RECORD).close()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted(["key", "layers-0-3-aaaa.kv.0", "layers-0-6-cccc.kv.0", "layers-3-6-aaaa.kv.0", *mine])
