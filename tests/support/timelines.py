"""A timeline of steps, read back as Perfetto does, and what holds for each."""

import itertools
import json
from collections import defaultdict
from typing import Any

from api.engine.timeline import ENGINE_PID, STAGE_PID

Event = dict[str, Any]


def read(text: str) -> list[Event]:
    """All events. The array may lack its end, as after a kill."""
    events: list[Event] = json.loads(text if text.endswith("]\n") else text + "]")
    return events


def steps_by_track(events: list[Event]) -> dict[tuple[int, int], list[Event]]:
    """The complete events of each (process, thread)."""
    tracks: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append(event)
    return tracks


def check_nesting(events: list[Event]) -> None:
    """No two steps of one track overlap: readers draw only what nests."""
    for track in steps_by_track(events).values():
        spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in track)
        for (_, ended), (began, _) in itertools.pairwise(spans):
            assert ended <= began + 1e-6


def check_order(events: list[Event], stages: int, clocks_differ_us: float = 1e-6) -> None:
    """Every step is in flight first, then on stage after stage, and all within its flight."""
    by_step: dict[int, dict[int, Event]] = defaultdict(dict)
    for event in events:
        if event["ph"] == "X":
            by_step[event["args"]["step_id"]][event["pid"]] = event
    for on_tracks in by_step.values():
        flight = on_tracks.pop(ENGINE_PID)
        assert sorted(on_tracks) == list(range(STAGE_PID, STAGE_PID + stages))
        at = flight["ts"]
        for pid in sorted(on_tracks):
            event = on_tracks[pid]
            assert at <= event["ts"] + clocks_differ_us
            at = event["ts"] + event["dur"]
            assert (event["name"], event["args"]) == (flight["name"], flight["args"])
            assert event["bind_id"] == flight["bind_id"]
        assert at <= flight["ts"] + flight["dur"] + clocks_differ_us
