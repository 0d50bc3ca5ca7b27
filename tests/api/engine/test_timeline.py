"""The timeline of steps, read back as Perfetto would: what is on it, and how it nests."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from structlog.testing import capture_logs

from actors.clock import now_ns
from api.client.engine_client import EngineClient
from api.engine.meters import StepRecord
from api.engine.timeline import ENGINE_PID, STAGE_PID, Timeline, open_timeline
from api.errors import OptionError
from api.messages.engine import AddRequest
from stages.step import SamplingParams, StageTiming
from tests import ROOT
from tests.support.engine_fakes import engine_options
from tests.support.step_flows import Flow, flows, step_of
from tests.support.timelines import Event, check_nesting, check_order, read, steps_by_track

SECONDS = 20.0


def names(events: list[Event], kind: str) -> dict[tuple[int, int], str]:
    """The names of processes or threads."""
    return {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["ph"] == "M" and event["name"] == kind
    }


def moved(passage_ns: int, by_ns: int) -> int:
    """Returns the times of a step in nanoseconds after the timeline's beginning, given in tenths of a millisecond."""
    return by_ns + passage_ns * 100_000


@given(flows())
def test_all_steps_are_on_the_track_of_every_stage_in_order(flow: Flow) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "timeline.json"
        timeline = Timeline(open_timeline(path))
        timeline.name_stages([f"host-{stage}" for stage in range(flow.stages)])
        start_ns = now_ns()
        for record, result, returned_ns in flow.transfers:
            timings = [
                StageTiming(
                    received_ns=moved(timing.received_ns, start_ns),
                    began_ns=moved(timing.began_ns, start_ns),
                    ended_ns=moved(timing.ended_ns, start_ns),
                )
                for timing in result.timings
            ]
            moved_record = StepRecord(record.step, moved(record.submitted_ns, start_ns), record.request_ids)
            timeline.step_done(moved_record, timings, moved(returned_ns, start_ns))
        killed = path.read_text()
        timeline.close()
        timeline.close()
        events = read(path.read_text())
    assert read(killed) == events
    check_nesting(events)
    check_order(events, flow.stages)
    tracks = steps_by_track(events)
    count = len(flow.transfers)
    for stage in range(flow.stages):
        track = tracks[STAGE_PID + stage, STAGE_PID + stage]
        assert [event["args"]["step_id"] for event in track] == list(range(count))
        for event, (record, result, _) in zip(track, flow.transfers, strict=True):
            timing = result.timings[stage]
            assert event["dur"] == pytest.approx((timing.ended_ns - timing.began_ns) * 100)
            assert event["name"] == event["args"]["mode"] == record.step.mode
            assert event["args"]["tokens"] == event["args"]["segments"] == record.step.token_count
            assert event["args"]["request_ids"] == record.request_ids
    threads = names(events, "thread_name")
    assert set(threads) == set(tracks)
    assert sum(len(track) for (pid, _), track in tracks.items() if pid == ENGINE_PID) == count
    processes = {pid: name for (pid, _), name in names(events, "process_name").items()}
    assert processes == {
        ENGINE_PID: "engine",
        **{STAGE_PID + stage: f"stage {stage} on host-{stage}" for stage in range(flow.stages)},
    }


def test_arrows_lead_from_the_engine_through_all_stages(tmp_path: Path) -> None:
    timeline = Timeline(open_timeline(tmp_path / "timeline.json"))
    timing = StageTiming(received_ns=1, began_ns=2, ended_ns=3)
    timeline.step_done(StepRecord(step_of(26, "decode", 1), 0, []), [timing] * 3, 4)
    timeline.close()
    events = [event for event in read((tmp_path / "timeline.json").read_text()) if event["ph"] == "X"]
    assert {event["bind_id"] for event in events} == {"0x1a"}
    assert [(event.get("flow_in", False), event.get("flow_out", False)) for event in events] == [
        (False, True),
        (True, True),
        (True, True),
        (True, False),
    ]


def test_a_step_that_is_lost_is_shown_until_then(tmp_path: Path) -> None:
    timeline = Timeline(open_timeline(tmp_path / "timeline.json"))
    timeline.step_lost(StepRecord(step_of(3, "prefill", 2), 1_000, [8]), 6_000)
    timeline.close()
    [event] = [event for event in read((tmp_path / "timeline.json").read_text()) if event["ph"] == "X"]
    assert (event["name"], event["pid"], event["dur"]) == ("prefill (lost)", ENGINE_PID, 5.0)
    assert event["args"]["request_ids"] == [8]


class FullFile(io.FileIO):
    """A file on a disk that fills up."""

    def __init__(self, path: Path, fail: Callable[[], int]) -> None:
        super().__init__(path, "wb")
        self.fail: Callable[[], int] | None = None
        self.later = fail

    def write(self, data: Any) -> int:
        return super().write(data) if self.fail is None else self.fail()


def no_space() -> int:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("fail", "cause"), [(no_space, "No space left on device"), (lambda: 3, "no room is left")])
def test_a_full_disk_ends_the_timeline_with_one_warning(fail: Callable[[], int], cause: str, tmp_path: Path) -> None:
    file = FullFile(tmp_path / "timeline.json", fail)
    timeline = Timeline(file)
    record = StepRecord(step_of(1, "decode", 1), 0, [])
    file.fail = file.later
    with capture_logs() as logs:
        timeline.step_done(record, [], 5)
        timeline.step_done(record, [], 5)
        timeline.close()
    [warning] = logs
    assert (warning["event"], warning["cause"]) == ("the timeline ends here", cause)
    assert file.closed


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"--timeline .*/absent/t.json cannot be written: No such file or directory\."
    ):
        open_timeline(tmp_path / "absent" / "t.json")
    with pytest.raises(OptionError, match="Is a directory"):
        open_timeline(tmp_path)


def test_serve_ends_at_once_where_the_timeline_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "t.json"
    command = [sys.executable, "-m", "api.cli", "serve", "--port", "0", "--timeline", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"Error: Cannot write --timeline '{path}': Not a directory.\n"


def request(request_id: int) -> AddRequest:
    return AddRequest(
        request_id=request_id,
        tokens=list(range(30)),
        max_tokens=12,
        stop_token_ids=[],
        sampling=SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, choice=0),
    )


@pytest.mark.parametrize("is_killed", [False, True])
async def test_an_engine_leaves_a_timeline_however_it_ends(
    is_killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = tmp_path / "timeline.json"
    options = msgspec.structs.replace(engine_options(), timeline=str(path))

    async def consume(engine: EngineClient, request_id: int) -> None:
        async for _ in engine.generate(request(request_id)):
            pass

    async with EngineClient.start(options) as engine:
        await engine.wait_ready(SECONDS)
        await asyncio.gather(*(consume(engine, request_id) for request_id in range(15)))
        metrics = await engine.metrics()
        if is_killed:
            os.kill(engine.pid, signal.SIGKILL)
    text = path.read_text()
    assert text.endswith("]\n") is not is_killed
    events = read(text)
    check_nesting(events)
    check_order(events, 2)
    tracks = steps_by_track(events)
    steps = sum(metrics.steps["prefill"].counts) + sum(metrics.steps["decode"].counts)
    for stage in range(2):
        track = tracks[STAGE_PID + stage, STAGE_PID + stage]
        assert [event["args"]["step_id"] for event in track] == list(range(steps))
        assert {each for event in track for each in event["args"]["request_ids"]} == set(range(15))
        # Each request gets a token from its last prefill step, and from each of its decode steps.
        decoded = sum(event["args"]["tokens"] for event in track if event["name"] == "decode")
        assert decoded == 15 * 11
    assert len(events) < 4 * steps + 20
