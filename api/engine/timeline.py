"""The trace of all steps that Perfetto and chrome://tracing open: a track for each stage, and one for the engine.

The format is Chrome's array of trace events ("Trace Event Format"), whose closing bracket may be missing. A step is
written when its result comes, in one write that nothing buffers: a process that is killed leaves every step that came
back in the file, and nothing is kept in memory.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import msgspec
import structlog

from actors.clock import now_ns
from api.engine.meters import StepRecord
from api.errors import OptionError
from stages.step import StageTiming

ENGINE_PID = 1
STAGE_PID = 1000
"""Stage i is shown as process STAGE_PID + i, with one thread of the same number: all numbers must be different."""

FLOW_BEGINS = b'"flow_out":true'
FLOW_PASSES = b'"flow_in":true,"flow_out":true'
FLOW_ENDS = b'"flow_in":true'

log = structlog.get_logger()


class StepArguments(msgspec.Struct, frozen=True):
    """The arguments of a step's event, which a click on it shows."""

    step_id: int
    mode: str
    tokens: int
    segments: int
    request_ids: list[int]
    epoch: int


def open_timeline(path: Path) -> io.FileIO:
    """Opens and empties the file. Raises OptionError where it cannot be written."""
    try:
        return path.open("wb", buffering=0)
    except OSError as error:
        raise OptionError(f"--timeline {path} cannot be written: {error.strerror}.") from error


class Timeline:
    """Writes steps to a file. Times count from its construction, in microseconds with three decimals.

    Several steps are in flight at once, so the engine has as many rows, and a step is in the first one that is free.
    Arrows lead from the engine through all stages. When the file cannot be written to any more, the timeline
    ends with a warning, and requests go on.
    """

    def __init__(self, file: io.FileIO) -> None:
        """`file` must be empty; `close` closes it."""
        self._file = file
        self._origin_ns = now_ns()
        self._rows_end_ns: list[int] = []
        self._write(b"[\n" + _name("process_name", ENGINE_PID, 1, "engine"))

    def name_stages(self, hosts: Sequence[str]) -> None:
        """Names each stage's track after the stage and its host."""
        for pid, host in enumerate(hosts, STAGE_PID):
            self._write(b",\n" + _name("process_name", pid, pid, f"stage {pid - STAGE_PID} on {host}"))
            self._write(b",\n" + _name("thread_name", pid, pid, "steps"))

    def step_done(self, record: StepRecord, timings: Sequence[StageTiming], returned_ns: int) -> None:
        """Writes a step that came back. Steps come in the order of their submission."""
        head, tail = _head(record.step.mode, record.step.step_id), _tail(record)
        events = self._in_flight(record, returned_ns, head, tail)
        last = STAGE_PID + len(timings) - 1
        for pid, timing in enumerate(timings, STAGE_PID):
            flow = FLOW_ENDS if pid == last else FLOW_PASSES
            events += self._event(head + flow, pid, pid, (timing.began_ns, timing.ended_ns)) + tail
        self._write(events)

    def step_lost(self, record: StepRecord, lost_ns: int) -> None:
        """Writes a step that will not come back: the engine's track shows how long it was waited for."""
        head = _head(f"{record.step.mode} (lost)", record.step.step_id)
        self._write(self._in_flight(record, lost_ns, head, _tail(record)))

    def close(self) -> None:
        """Ends the array and closes the file. May be repeated."""
        self._write(b"\n]\n")
        self._file.close()

    def _in_flight(self, record: StepRecord, ended_ns: int, head: bytes, tail: bytes) -> bytes:
        span = (record.submitted_ns, ended_ns)
        for row, row_ends_ns in enumerate(self._rows_end_ns):
            if row_ends_ns <= record.submitted_ns:
                self._rows_end_ns[row] = ended_ns
                return self._event(head + FLOW_BEGINS, ENGINE_PID, row + 1, span) + tail
        self._rows_end_ns.append(ended_ns)
        tid = len(self._rows_end_ns)
        name = b",\n" + _name("thread_name", ENGINE_PID, tid, f"in flight {tid}")
        return name + self._event(head + FLOW_BEGINS, ENGINE_PID, tid, span) + tail

    def _event(self, head: bytes, pid: int, tid: int, span: tuple[int, int]) -> bytes:
        began_us, took_us = (span[0] - self._origin_ns) / 1000, (span[1] - span[0]) / 1000
        return b'%b,"pid":%d,"tid":%d,"ts":%.3f,"dur":%.3f' % (head, pid, tid, began_us, took_us)

    def _write(self, data: bytes) -> None:
        if self._file.closed:
            return
        cause: str | None = "no room is left"
        try:
            if self._file.write(data) == len(data):
                return
        except OSError as error:
            cause = error.strerror
        log.warning("the timeline ends here", file=str(self._file.name), cause=cause)
        self._file.close()


def _head(name: str, step_id: int) -> bytes:
    return b',\n{"ph":"X","name":"%b","bind_id":"0x%x",' % (name.encode(), step_id)


def _tail(record: StepRecord) -> bytes:
    step = record.step
    arguments = StepArguments(
        step_id=step.step_id,
        mode=step.mode,
        tokens=step.token_count,
        segments=len(step.segments),
        request_ids=record.request_ids,
        epoch=step.epoch,
    )
    return b',"args":%b}' % msgspec.json.encode(arguments)


def _name(kind: str, pid: int, tid: int, name: str) -> bytes:
    event = {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}
    return msgspec.json.encode(event)
