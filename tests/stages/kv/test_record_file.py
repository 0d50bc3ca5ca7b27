"""Record files against a dict, whatever happens to the file meanwhile, and with other processes."""

import errno
import subprocess
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from stages.kv.record_file import HEADER, KEY_BYTES, RecordFile, file_bytes, records_within
from tests.support.disks import files_of_at_most
from tests.support.stage_driver import key_of

RECORD = 100
RECORDS = 4
NUMBERS = st.integers(0, 5)


def record_of(number: int) -> bytes:
    """What a key stands for, as keys of blocks do."""
    return bytes((number + at) % 256 for at in range(RECORD))


def opened(path: Path, records: int = RECORDS) -> RecordFile:
    return RecordFile(path, RECORD, records)


class RecordFileMachine(RuleBasedStateMachine):
    """Keeps the records that there are in the order of their use, as long as nobody else has changed the file."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "records"

    @initialize()
    def open(self) -> None:
        self.records = RECORDS
        self.file = opened(self.path)
        self.model: OrderedDict[int, None] = OrderedDict()
        self.is_damaged = False

    def teardown(self) -> None:
        self.file.close()
        self.folder.cleanup()

    @rule(number=NUMBERS)
    def write(self, number: int) -> None:
        evicted = self.file.write(key_of(number), record_of(number))
        if self.is_damaged:
            return
        oldest = None
        if number not in self.model and len(self.model) == self.records:
            oldest = self.model.popitem(last=False)[0]
        self.model[number] = None
        self.model.move_to_end(number)
        assert evicted == (None if oldest is None else key_of(oldest))

    @rule(number=NUMBERS)
    def read(self, number: int) -> None:
        record = self.file.read(key_of(number))
        if self.is_damaged:
            assert record in {None, record_of(number)}
            assert (key_of(number) in self.file) is (record is not None)
            return
        assert record == (record_of(number) if number in self.model else None)
        if record is not None:
            self.model.move_to_end(number)

    @rule(number=NUMBERS)
    def forget(self, number: int) -> None:
        self.file.forget(key_of(number))
        self.model.pop(number, None)
        assert key_of(number) not in self.file

    @rule()
    def reopen(self) -> None:
        self.file.close()
        self.file = opened(self.path, self.records)

    @rule(records=st.integers(1, RECORDS))
    def reopen_with_another_header(self, records: int) -> None:
        self.file.close()
        if records != self.records:
            self.model.clear()
            self.is_damaged = False
        self.records = records
        self.file = opened(self.path, records)

    @rule()
    def remove(self) -> None:
        self.file.close()
        self.path.unlink()
        self.model.clear()
        self.is_damaged = False
        self.file = opened(self.path, self.records)

    @invariant()
    def it_has_what_was_written_and_no_more(self) -> None:
        assert self.path.stat().st_size <= file_bytes(RECORD, self.records)
        assert len(self.file) == len(self.file.keys()) <= self.records
        assert self.file.bytes_kept == len(self.file) * RECORD
        if not self.is_damaged:
            assert self.file.keys() == [key_of(number) for number in self.model]


class DamagedFileMachine(RecordFileMachine):
    """Changes the file too: what is read is right then or is not there."""

    @rule(
        at=st.integers(0, file_bytes(RECORD, RECORDS) - 1),
        garbage=st.binary(min_size=1, max_size=40) | st.integers(1, 60).map(lambda count: b"\xff" * count),
    )
    def damage(self, at: int, garbage: bytes) -> None:
        size = file_bytes(RECORD, self.records)
        with self.path.open("r+b") as file:
            file.seek(at % size)
            file.write(garbage[: size - at % size])
        self.is_damaged = True

    @rule(size=st.integers(0, file_bytes(RECORD, RECORDS)))
    def truncate(self, size: int) -> None:
        with self.path.open("r+b") as file:
            file.truncate(min(size, self.path.stat().st_size))
        self.is_damaged = True


RecordFileMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestRecordFile = RecordFileMachine.TestCase
DamagedFileMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestDamagedFile = DamagedFileMachine.TestCase


def test_a_file_of_a_size_has_room_for_as_many_records_as_fit() -> None:
    assert records_within(file_bytes(RECORD, 7), RECORD) == 7
    assert records_within(file_bytes(RECORD, 7) - 1, RECORD) == 6
    assert records_within(0, RECORD) == 0


def test_a_bit_that_flips_costs_its_record_alone(tmp_path: Path) -> None:
    path = tmp_path / "records"
    file = opened(path)
    for number in range(3):
        file.write(key_of(number), record_of(number))
    content = bytearray(path.read_bytes())
    content[content.index(record_of(1)) + 50] ^= 4
    path.write_bytes(content)
    assert [file.read(key_of(number)) for number in range(3)] == [record_of(0), None, record_of(2)]
    file.close()
    again = opened(path)
    assert set(again.keys()) == {key_of(0), key_of(2)}
    again.close()


def test_a_stamp_that_is_damaged_costs_its_record_alone(tmp_path: Path) -> None:
    path = tmp_path / "records"
    file = opened(path)
    file.write(key_of(0), record_of(0))
    file.write(key_of(1), record_of(1))
    file.close()
    content = bytearray(path.read_bytes())
    stamp = content.index(key_of(0), HEADER.size) + KEY_BYTES
    content[stamp : stamp + 8] = b"\xff" * 8
    path.write_bytes(content)
    again = opened(path)
    assert again.keys() == [key_of(1)]
    for number in range(RECORDS):
        again.write(key_of(number), record_of(number))
    assert [again.read(key_of(number)) for number in range(RECORDS)] == [record_of(number) for number in range(RECORDS)]
    again.close()


WRITER = """
import itertools, sys
from pathlib import Path
from stages.kv.record_file import RecordFile
file = RecordFile(Path(sys.argv[1]), 100, 4)
for number in itertools.count():
    file.write(number.to_bytes(16, "little"), bytes((number + at) % 256 for at in range(100)))
    if number == 10:
        print("writing", flush=True)
"""


def test_a_writer_that_is_killed_leaves_whole_records(tmp_path: Path) -> None:
    path = tmp_path / "records"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"writing\n"
            with pytest.raises(BlockingIOError):
                opened(path)
        finally:
            writer.kill()
    file = opened(path)
    keys = file.keys()
    found = [int.from_bytes(key, "little") for key in keys]
    # All but the one that it was writing, and those that were used last.
    assert len(found) >= RECORDS - 1
    assert found == list(range(found[0], found[0] + len(found)))
    assert [file.read(key_of(number)) for number in found] == [record_of(number) for number in found]
    file.close()


def test_one_process_at_a_time_has_it(tmp_path: Path) -> None:
    path = tmp_path / "records"
    first = opened(path)
    first.write(key_of(1), record_of(1))
    with pytest.raises(BlockingIOError):
        opened(path)
    assert first.read(key_of(1)) == record_of(1)
    first.close()
    opened(path).close()


def test_a_full_disk_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "records"
    file = opened(path)
    with files_of_at_most(file_bytes(RECORD, RECORDS) - 2 * RECORD - 10):
        for number in range(8):
            file.write(key_of(number), record_of(number))
        kept = [number for number in range(8) if key_of(number) in file]
        # One place has room for its record. Those of the others are not tried again.
        assert kept == [7]
        assert file.read(key_of(7)) == record_of(7)
    file.close()
    again = opened(path)
    assert again.keys() == [key_of(7)]
    for number in range(RECORDS):
        again.write(key_of(number), record_of(number))
    assert len(again) == RECORDS
    again.close()


def test_a_link_is_not_followed_and_the_file_is_private(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"text")
    link = tmp_path / "records"
    link.symlink_to(target)
    with pytest.raises(OSError, match="symbolic links") as refused:
        opened(link)
    assert refused.value.errno == errno.ELOOP
    assert target.read_bytes() == b"text"
    opened(tmp_path / "own").close()
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o600
